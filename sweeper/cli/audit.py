"""`srsweep audit`: what published runs and the paper's tables say about themselves."""

from typing import TYPE_CHECKING, Annotated

import typer

from db.errors import SrsweepError
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    output_format,
    print_rows,
)

if TYPE_CHECKING:
    import pandas as pd

OF_RUNS = ("repeats", "hidden", "memory", "fit", "beside")
OF_THE_PAPER = ("contradictions", "denominators", "values")
TABLES = (*OF_RUNS, *OF_THE_PAPER)


def audit(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="One of " + ", ".join(TABLES))],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Check imported runs and the paper's printed tables against themselves.

    repeats: points run more than once. hidden: runs in the boxes that the paper's Fig. 5 leaves
    out. memory: runs that take more memory than one that is nowhere smaller. fit: R^2 of the
    paper's random forest in and out of sample. beside: the paper's tables with the runs beside
    them. Of the paper's tables alone: contradictions, printed differences that the printed values
    do not give; denominators, which value each table divides by; values, what two tables give
    differently.

    Examples
    --------
        srsweep audit repeats --db sqlite:///paper.db
        srsweep audit contradictions --csv
    """
    if table not in TABLES:
        raise SrsweepError(f"no table {table!r}; there are {', '.join(TABLES)}")
    format = output_format(as_json, as_csv)

    found = _of_the_paper(table) if table in OF_THE_PAPER else _of_runs(table, db)
    rows = [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in found.to_dict("records")
    ]
    print_rows(rows, format, columns=list(found.columns))


def _of_the_paper(table: str) -> "pd.DataFrame":
    from analysis.audit import contradictions, denominators
    from analysis.tables import printed_twice

    if table == "values":
        return printed_twice()
    return contradictions() if table == "contradictions" else denominators()


def _of_runs(table: str, db: str) -> "pd.DataFrame":
    import pandas as pd

    from analysis.audit import hidden_points, memory_out_of_order, repeats
    from analysis.frame import comparable, load_runs, select
    from analysis.importance import model_scores
    from analysis.tables import beside_the_paper

    loaded = load_runs(db)
    if table == "fit":
        scores = model_scores(comparable(select(loaded).frame)[0])
        rows = [(item.dataset, item.metric, item.scheme, item.r2) for item in scores]
        long = pd.DataFrame(rows, columns=["dataset", "metric", "scheme", "r2"])
        return long.pivot_table(
            index=["dataset", "metric"], columns="scheme", values="r2", sort=False
        ).reset_index()
    runs = select(loaded, selection="all").frame
    if table == "beside":
        return beside_the_paper(runs)
    compute = {"repeats": repeats, "hidden": hidden_points, "memory": memory_out_of_order}
    return compute[table](runs)
