"""From the run database to associations, importances, fronts, findings, figures and reports."""
