"""Which parameter matters: importances, always beside how well their model predicts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut
from sklearn.utils.parallel import Parallel, delayed

from analysis.anova import anova_importances
from analysis.frame import (
    FACTORS,
    PARAMETERS,
    QUALITY,
    FullCatalog,
    numeric,
    parameter_frame,
    point_labels,
)

Floats = npt.NDArray[np.float64]
Method = Literal["impurity", "permutation", "permutation_grouped", "fanova", "ped_anova"]
METHODS: tuple[Method, ...] = (
    "impurity", "permutation", "permutation_grouped", "fanova", "ped_anova",
)  # fmt: skip
COLUMNS: tuple[str, ...] = (
    "dataset", "metric", "parameter", "method", "importance", "low", "high", "score_in_sample",
    "score_out_of_sample",
)  # fmt: skip
"""Columns of `importances.csv`."""
SCORE_COLUMNS: tuple[str, ...] = ("dataset", "metric", "scheme", "r2", "low", "high", "n")
"""Columns of `model_scores.csv`."""
MIN_POINTS = 10
"""Fewer points make no five folds worth the name."""
_FOLDS = 5
_WORTH_PROCESSES = 600
"""Rows of all cases below which starting processes takes longer than the work."""


@dataclass(frozen=True)
class Importance:
    """Importance of one parameter for one metric on one dataset by one method.

    Attributes
    ----------
    dataset, metric, parameter, method : str
        Dataset `mean` is the mean over the datasets, as in the paper's Fig. 7b.
    importance : float
        Share of the impurity decrease; loss of out-of-sample R^2 when the values are shuffled
        (permutation; with all products of the factor for permutation_grouped); share of the
        variance (fanova); share of the divergence of the best runs' settings (ped_anova).
    low, high : float or None
        Central 95 % over repeated folds and shuffles, or over seeds of the forest.
    score_in_sample, score_out_of_sample : float or None
        R^2 of the forest on the runs it was fitted to, and on points it has not seen.
    """

    dataset: str
    metric: str
    parameter: str
    method: Method
    importance: float
    low: float | None
    high: float | None
    score_in_sample: float | None
    score_out_of_sample: float | None

    @property
    def predicts(self) -> bool:
        """Whether the model behind the number predicts unseen points at all."""
        return self.score_out_of_sample is not None and self.score_out_of_sample > 0


@dataclass(frozen=True)
class ModelScore:
    """R^2 of the random forest under one way to hold runs out.

    Attributes
    ----------
    dataset, metric : str
    scheme : str
        in_sample; kfold (five shuffled folds of the runs, repeats leak between them);
        kfold_by_point (no point is in two folds); leave_one_batch_size_out.
    r2 : float
        Pooled over the folds, mean over their repeats.
    low, high : float or None
        Least and greatest over the repeats.
    n : int
    """

    dataset: str
    metric: str
    scheme: str
    r2: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Importances:
    """Importances and scores of the models behind them."""

    rows: tuple[Importance, ...]
    scores: tuple[ModelScore, ...]
    notes: tuple[str, ...]
    full_catalog: FullCatalog
    encodings: pd.DataFrame
    """fANOVA and PED-ANOVA under each encoding of the parameters."""

    def to_frame(self) -> pd.DataFrame:
        """One row per number, with the columns of `importances.csv`."""
        return pd.DataFrame([row.__dict__ for row in self.rows], columns=list(COLUMNS))

    def scores_frame(self) -> pd.DataFrame:
        """One row per model and scheme, with the columns of `model_scores.csv`."""
        return pd.DataFrame([row.__dict__ for row in self.scores], columns=list(SCORE_COLUMNS))


def importances(
    frame: pd.DataFrame,
    *,
    metrics: Sequence[str] = QUALITY,
    full_catalog: FullCatalog = "paper",
    repeats: int = 3,
    permutations: int = 5,
    seed: int = 42,
    jobs: int = 1,
    methods: Sequence[Method] = METHODS,
    forests: int = 5,
) -> Importances:
    """Importances of the parameters and their products, per dataset and averaged.

    Parameters
    ----------
    frame : DataFrame
        Finished, comparable runs in the order of the database: the forest's bootstrap depends
        on it, and the paper's figures are recovered from the order of its files.
    metrics : sequence of str
    full_catalog : {"paper", "vocabulary", "drop"}
        `paper` and `drop` both leave full-catalog runs out: a forest needs every feature.
    repeats, permutations : int
        Of the folds, and of the shuffles within each.
    seed : int
        Of the forest; 42 is the paper's.
    jobs : int
        Processes; the numbers do not depend on it.
    methods : sequence of str
        With `impurity` alone nothing is held out and there is no out-of-sample score.
    forests : int
        Seeds of the forest behind the interval of an impurity importance; with one there is none.
    """
    cases, notes = _cases(frame, metrics, full_catalog)
    if sum(len(case.target) for case in cases) < _WORTH_PROCESSES:
        jobs = 1
    work: Iterable[_Fitted] = Parallel(n_jobs=jobs)(
        delayed(_fit_case)(
            case,
            repeats if set(methods) != {"impurity"} else 0,
            permutations,
            seed,
            forests,
            bool({"fanova", "ped_anova"} & set(methods)),
        )
        for case in cases
    )
    fitted = list(work)
    rows = [row for item in fitted for row in item.rows if row.method in methods]
    encodings = pd.concat([item.encodings for item in fitted]) if fitted else pd.DataFrame()
    return Importances(
        (*rows, *_mean_rows(rows)),
        tuple(score for item in fitted for score in item.scores),
        tuple(notes),
        full_catalog,
        encodings,
    )


def model_scores(
    frame: pd.DataFrame,
    *,
    metrics: Sequence[str] = QUALITY,
    full_catalog: FullCatalog = "paper",
    seed: int = 42,
) -> list[ModelScore]:
    """R^2 of the paper's forest on the runs it was fitted to, and five-fold out of sample.

    Parameters
    ----------
    frame : DataFrame
        Finished, comparable runs in the order of the database.
    metrics : sequence of str
    full_catalog : {"paper", "vocabulary", "drop"}
        See `importances`.
    seed : int
        Of the forest.

    Returns
    -------
    list of ModelScore
        Schemes in_sample and kfold; repeats of a point leak between the folds of the latter.
    """
    cases, _ = _cases(frame, metrics, full_catalog)
    found = []
    for case in cases:
        model = _forest(seed).fit(case.features, case.target)
        in_sample = float(model.score(case.features, case.target))
        found += [_score(case, "in_sample", [in_sample]), _kfold_score(case, seed)]
    return found


@dataclass(frozen=True)
class _Case:
    """One forest: features, target and what may not be torn apart between folds."""

    dataset: str
    metric: str
    features: Floats
    target: Floats
    points: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Fitted:
    rows: list[Importance]
    scores: list[ModelScore]
    encodings: pd.DataFrame


def _cases(
    frame: pd.DataFrame, metrics: Sequence[str], full_catalog: FullCatalog
) -> tuple[list[_Case], list[str]]:
    cases, notes = [], []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = parameter_frame(group, full_catalog)
        points = point_labels(group).to_numpy()
        for metric in metrics:
            target = numeric(group, metric)
            rows = (values.notna().all(axis=1) & target.notna()).to_numpy()
            case = _Case(
                str(dataset), metric, values.to_numpy(float)[rows],
                target.to_numpy(float)[rows], points[rows],
            )  # fmt: skip
            reason = _reason(case)
            if reason:
                notes.append(reason)
            else:
                cases.append(case)
                notes += _fixed_parameters(case)
    return cases, list(dict.fromkeys(notes))


def _reason(case: _Case) -> str:
    """Why no model can be fitted, or nothing."""
    count = len(np.unique(case.points))
    if count < MIN_POINTS:
        return (
            f"{case.dataset}: {count} points with {case.metric} and a number of negatives are too "
            f"few for importances; {MIN_POINTS} are needed."
        )
    if np.ptp(case.target) == 0:
        return f"{case.dataset}: {case.metric} is constant ({case.target[0]:g}), nothing to model."
    return ""


def _fixed_parameters(case: _Case) -> list[str]:
    return [
        f"{case.dataset}: {name} never varies (it is {case.features[0, column]:g}); its "
        "importance is 0 for that reason alone."
        for column, name in enumerate(FACTORS)
        if np.ptp(case.features[:, column]) == 0
    ]


def _forest(seed: int) -> RandomForestRegressor:
    """The paper's model: scikit-learn's defaults."""
    return RandomForestRegressor(random_state=seed)


def _fit_case(
    case: _Case, repeats: int, permutations: int, seed: int, forests: int, decompose: bool
) -> _Fitted:
    model = _forest(seed).fit(case.features, case.target)
    in_sample = float(model.score(case.features, case.target))
    passes = [_held_out(case, permutations, seed, repeat) for repeat in range(repeats)]
    row = _RowMaker(
        case, in_sample, float(np.mean([item.r2 for item in passes])) if passes else None
    )
    rows = _impurity_rows(row, model, seed, forests - 1)
    if not passes:
        return _Fitted(rows, [_score(case, "in_sample", [in_sample])], pd.DataFrame())
    permuted: tuple[tuple[Method, tuple[str, ...]], ...] = (
        ("permutation", PARAMETERS), ("permutation_grouped", FACTORS),
    )  # fmt: skip
    for method, names in permuted:
        drops = np.concatenate([getattr(item, method) for item in passes])
        rows += [row(method, name, drops[:, column]) for column, name in enumerate(names)]
    scores = _scores(case, in_sample, [item.r2 for item in passes], seed)
    if not decompose:
        return _Fitted(rows, scores, pd.DataFrame())
    encodings = anova_importances(
        pd.DataFrame(case.features[:, : len(FACTORS)], columns=list(FACTORS)),
        case.target, seed=seed,
    )  # fmt: skip
    decomposed: tuple[Method, ...] = ("fanova", "ped_anova")
    for method in decomposed:
        chosen = encodings[(encodings["method"] == method) & encodings["shown"]]
        rows += [
            row(method, name, np.array([share]))
            for name, share in zip(chosen["parameter"], chosen["importance"], strict=True)
        ]
    encodings.insert(0, "metric", case.metric)
    encodings.insert(0, "dataset", case.dataset)
    return _Fitted(rows, scores, encodings)


@dataclass(frozen=True)
class _RowMaker:
    """Rows of one forest, with the scores that belong beside every number."""

    case: _Case
    in_sample: float
    out_of_sample: float | None

    def __call__(
        self, method: Method, parameter: str, values: Floats, at: float | None = None
    ) -> Importance:
        # five seeds of a forest have no quantiles, only extremes
        levels = [0.0, 1.0] if method == "impurity" else [0.025, 0.975]
        low, high = np.quantile(values, levels) if len(values) > 1 else (None, None)
        return Importance(
            self.case.dataset, self.case.metric, parameter, method,
            float(np.mean(values)) if at is None else float(at),
            None if low is None else float(low), None if high is None else float(high),
            self.in_sample, self.out_of_sample,
        )  # fmt: skip


def _impurity_rows(
    row: _RowMaker, model: RandomForestRegressor, seed: int, extra_seeds: int
) -> list[Importance]:
    """The paper's importances, and how far other seeds of the forest move them."""
    case = row.case
    others = [
        _forest(seed + 1 + extra).fit(case.features, case.target).feature_importances_
        for extra in range(extra_seeds)
    ]
    found = np.array([model.feature_importances_, *others])
    return [
        row("impurity", name, found[:, column], found[0, column])
        for column, name in enumerate(PARAMETERS)
    ]


Folds = Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def _point_folds(case: _Case, repeat: int) -> Folds:
    splitter = GroupKFold(_FOLDS, shuffle=True, random_state=repeat)
    folds: Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = splitter.split(
        case.features, case.target, case.points
    )
    return folds


@dataclass(frozen=True)
class _HeldOut:
    """One pass over the folds: the pooled score and what shuffling takes away from it."""

    r2: float
    permutation: Floats
    """Shape (permutations, 6)."""
    permutation_grouped: Floats
    """Shape (permutations, 3)."""


def _held_out(case: _Case, permutations: int, seed: int, repeat: int) -> _HeldOut:
    rng = np.random.default_rng([seed, repeat])
    variance = np.sum((case.target - case.target.mean()) ** 2)
    shuffles: list[Callable[[Floats], Floats]] = [
        *(_shuffle_column(column, rng) for column in range(len(PARAMETERS))),
        *(_shuffle_factor(column, rng) for column in range(len(FACTORS))),
    ]
    error, shuffled = 0.0, np.zeros((permutations, len(shuffles)))
    for train, test in _point_folds(case, repeat):
        model = _forest(seed).fit(case.features[train], case.target[train])
        features, target = case.features[test], case.target[test]
        variants = [shuffle(features) for _ in range(permutations) for shuffle in shuffles]
        predicted = model.predict(np.concatenate([features, *variants]))
        errors = ((predicted.reshape(-1, len(test)) - target) ** 2).sum(axis=1)
        error += errors[0]
        shuffled += errors[1:].reshape(permutations, len(shuffles))
    drops = (shuffled - error) / variance
    return _HeldOut(
        float(1 - error / variance), drops[:, : len(PARAMETERS)], drops[:, len(PARAMETERS) :]
    )


def _shuffle_column(column: int, rng: np.random.Generator) -> Callable[[Floats], Floats]:
    def shuffle(features: Floats) -> Floats:
        out = features.copy()
        out[:, column] = rng.permutation(out[:, column])
        return out

    return shuffle


def _shuffle_factor(column: int, rng: np.random.Generator) -> Callable[[Floats], Floats]:
    """Shuffle a factor and carry it into its products: collinear features move as one."""

    def shuffle(features: Floats) -> Floats:
        factors = features[:, : len(FACTORS)].copy()
        factors[:, column] = rng.permutation(factors[:, column])
        negatives, batch, length = factors.T
        products: Floats = np.column_stack([negatives * batch, negatives * length, length * batch])
        return np.hstack([factors, products])

    return shuffle


def _score(case: _Case, scheme: str, values: Sequence[float]) -> ModelScore:
    several = len(values) > 1
    return ModelScore(
        case.dataset, case.metric, scheme, float(np.mean(values)),
        min(values) if several else None, max(values) if several else None, len(case.target),
    )  # fmt: skip


def _scores(
    case: _Case, in_sample: float, by_point: Sequence[float], seed: int
) -> list[ModelScore]:
    found = [_score(case, "in_sample", [in_sample]), _kfold_score(case, seed)]
    found.append(_score(case, "kfold_by_point", by_point))
    batch_sizes = case.features[:, FACTORS.index("batch_size")]
    if len(np.unique(batch_sizes)) > 1:
        folds = LeaveOneGroupOut().split(case.features, case.target, batch_sizes)
        found.append(_score(case, "leave_one_batch_size_out", [_pooled_r2(case, folds, seed)]))
    return found


def _kfold_score(case: _Case, seed: int) -> ModelScore:
    splitter = KFold(_FOLDS, shuffle=True, random_state=0)
    return _score(case, "kfold", [_pooled_r2(case, splitter.split(case.features), seed)])


def _pooled_r2(case: _Case, folds: Folds, seed: int) -> float:
    predicted = np.empty_like(case.target)
    for train, test in folds:
        model = _forest(seed).fit(case.features[train], case.target[train])
        predicted[test] = model.predict(case.features[test])
    residual = np.sum((case.target - predicted) ** 2)
    return float(1 - residual / np.sum((case.target - case.target.mean()) ** 2))


def _mean_rows(rows: Sequence[Importance]) -> list[Importance]:
    """Mean over the datasets; the interval is the mean of theirs."""
    table = pd.DataFrame([row.__dict__ for row in rows], columns=list(COLUMNS))
    means = []
    for _, group in table.groupby(["metric", "method", "parameter"], sort=False):
        numbers = group[list(COLUMNS[4:])].astype(float).mean()
        importance, *others = numbers.to_numpy(float).tolist()
        low, high, in_sample, unseen = (None if np.isnan(value) else value for value in others)
        first = rows[int(group.index[0])]
        means.append(
            Importance("mean", first.metric, first.parameter, first.method, importance, low, high,
                       in_sample, unseen)
        )  # fmt: skip
    return means
