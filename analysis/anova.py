"""fANOVA and PED-ANOVA by optuna, under named encodings of the parameters."""

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

from analysis.frame import records

ENCODINGS: tuple[str, ...] = ("log", "categorical")
"""A parameter as the logarithm of its value, or as unordered levels. The importances depend on
the choice, so both are computed; `log` is shown in the figures."""
_TREES = 16


def anova_importances(
    parameters: pd.DataFrame, target: npt.NDArray[np.float64], *, seed: int = 42
) -> pd.DataFrame:
    """Share of each parameter in the variance (fANOVA) and in the best runs (PED-ANOVA).

    Parameters
    ----------
    parameters : DataFrame, shape (runs, factors)
        Positive values; a parameter that never varies has importance 0.
    target : ndarray, shape (runs,)
    seed : int
        Of fANOVA's forest.

    Returns
    -------
    DataFrame
        Columns method, encoding, parameter, importance, shown.

    References
    ----------
    .. [1] F. Hutter, H. Hoos, K. Leyton-Brown, "An Efficient Approach for Assessing
       Hyperparameter Importance", ICML 2014.
    .. [2] S. Watanabe, A. Bansal, F. Hutter, "PED-ANOVA", IJCAI 2023, arXiv:2304.10255.
    """
    names = [str(name) for name in parameters]
    varying = [name for name in names if parameters[name].nunique() > 1]
    rows: list[dict[str, object]] = []
    for encoding in ENCODINGS:
        study = _study(parameters[varying], target, encoding)
        evaluators = {
            "fanova": FanovaImportanceEvaluator(n_trees=_TREES, seed=seed),
            "ped_anova": PedAnovaImportanceEvaluator(),
        }
        for method, evaluator in evaluators.items():
            found: dict[str, float] = evaluator.evaluate(study) if varying else {}
            # fANOVA's shares leave the interactions' part of the variance over; PED-ANOVA's
            # divergences have no unit and are shown as shares of their sum.
            total = (sum(found.values()) or 1.0) if method == "ped_anova" else 1.0
            rows += [
                {
                    "method": method,
                    "encoding": encoding,
                    "parameter": name,
                    "importance": float(found.get(name, 0.0)) / total,
                    "shown": encoding == "log",
                }
                for name in names
            ]
    return pd.DataFrame(rows)


def _study(
    parameters: pd.DataFrame, target: npt.NDArray[np.float64], encoding: str
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {}
    for name in map(str, parameters):
        values = parameters[name].astype(float)
        distributions[name] = (
            FloatDistribution(float(values.min()), float(values.max()), log=True)
            if encoding == "log"
            else CategoricalDistribution(sorted(values.unique().tolist()))
        )
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: float(value) for name, value in row.items()},
                distributions=distributions,
                value=float(goal),
            )
            for row, goal in zip(records(parameters), target, strict=True)
        ]
    )
    return study
