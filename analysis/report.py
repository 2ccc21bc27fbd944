"""The report: figures, tables and one HTML page from a run database."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd

from analysis.association import Associations, associations
from analysis.audit import audit_tables
from analysis.cache import ResultCache, content_key
from analysis.dependence import dependences
from analysis.findings import Findings, findings
from analysis.frame import (
    MEMORY,
    PAPER_SOURCE,
    QUALITY,
    TIME,
    FullCatalog,
    Repeats,
    Runs,
    Selection,
    comparable,
    load_runs,
    same_memory,
    select,
)
from analysis.importance import METHODS, Importances, importances
from analysis.page import Page, render_page
from analysis.pareto import (
    attainment,
    best_under_budget,
    hypervolume_by_seed,
    marginal_gains,
    pareto_fronts,
)
from analysis.plots.curves import curves_figure
from analysis.plots.equal_budget import equal_budget, equal_budget_figure
from analysis.plots.filtering import filtering_figures
from analysis.plots.gradients import gradients_figure
from analysis.plots.heatmap import heatmap_figure
from analysis.plots.importances import importances_figure
from analysis.plots.losses import losses_figure
from analysis.plots.negatives import Bars, negatives_figure
from analysis.plots.style import Drawing
from analysis.plots.tradeoff import Hidden, tradeoff_data, tradeoff_figure
from analysis.saturation import saturation_frame, saturations
from analysis.tables import beside_the_paper
from analysis.traces import (
    CURVE_COLUMNS,
    HISTOGRAM_COLUMNS,
    chosen_runs,
    curves,
    gradient_histograms,
)
from db.errors import AnalysisError

Result = TypeVar("Result")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "pareto": (MEMORY, "ndcg_at_10"),
    "pareto_time": (TIME, "ndcg_at_10"),
    "pareto_memory_time": (MEMORY, TIME, "ndcg_at_10"),
    "pareto_coverage": (MEMORY, "ndcg_at_10", "coverage_at_10"),
    "pareto_surprisal": (MEMORY, "ndcg_at_10", "surprisal_at_10"),
}
"""Name of each front's CSV and its objectives."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report rests on; printed in it."""

    selection: Selection = "published"
    """`published` leaves out of the paper's runs what its figures leave out; `all` takes all."""
    repeats: Repeats = "as_published"
    """Repeats of a point and seed count as often as they occur, or once (`without`)."""
    full_catalog: FullCatalog = "paper"
    """How runs over the whole catalog enter relations with the number of negatives."""
    bars: Bars = "standard_deviation"
    """Error bars of quality against negatives."""
    hidden: Hidden = "none"
    """Runs that the trade-off figure leaves out: `none`, or `paper`, those in the boxes that the
    paper's Fig. 5 leaves out."""
    metrics: tuple[str, ...] = QUALITY
    """Qualities of associations and importances."""
    resamples: int = 10_000
    """Bootstrap resamples of every interval."""
    fold_repeats: int = 3
    """Repeats of the folds behind importances."""
    jobs: int = 2
    """Processes."""


@dataclass
class Report:
    """What was written.

    Attributes
    ----------
    folder : Path
    index : Path
        The HTML page.
    files : list of Path
    notes : list of str
        What was left out, and why.
    seconds : dict of str to float
        Time of each stage.
    computed : list of str
        Results that could not be taken from an earlier report.
    unchanged : bool
        Whether the folder already held exactly this report.
    """

    folder: Path
    index: Path
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    unchanged: bool = False


def write_report(
    url: str,
    out: str | Path,
    *,
    sweeps: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    options: ReportOptions = ReportOptions(),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Analyse the runs of a database and write the report into a folder.

    Parameters
    ----------
    url : str
        Run database.
    out : str or Path
        Folder; files of an earlier report in it are replaced.
    sweeps, datasets : sequence of str, optional
        Only their runs.
    options : ReportOptions
    progress : callable, optional
        Called with the name of each stage as it begins.

    Raises
    ------
    AnalysisError
        There are no runs, none is finished, or the frame does not fit.
    """
    frame = load_runs(url, sweeps, datasets)
    return report_of_frame(frame, out, traces=_traces(url, frame), options=options,
                           progress=progress)  # fmt: skip


@dataclass(frozen=True)
class Traces:
    """What happened within some of the runs (`analysis.traces`)."""

    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CURVE_COLUMNS))
    gradients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=HISTOGRAM_COLUMNS))


def _traces(url: str, frame: pd.DataFrame) -> Traces:
    runs = select(frame).frame
    return Traces(curves(url, chosen_runs(same_memory(runs)[0])), gradient_histograms(url, runs))


def report_of_frame(
    frame: pd.DataFrame,
    out: str | Path,
    *,
    traces: Traces = Traces(),
    options: ReportOptions = ReportOptions(),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Like `write_report`, from a frame shaped as `db.query.summary_frame`."""
    folder = Path(out)
    key = content_key(frame, traces.curves, traces.gradients, asdict(options))
    report = Report(folder, folder / "index.html")
    if _is_current(folder, key):
        report.unchanged = True
        manifest = json.loads((folder / "manifest.json").read_text())
        report.files = [folder / name for name in manifest["files"]]
        report.notes = manifest["notes"]
        return report
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(report, options, ResultCache(folder / ".cache"), progress or (lambda _: None))
    writer.write(select(frame, selection=options.selection, repeats=options.repeats), traces)
    _write_manifest(report, key)
    return report


class _Writer:
    """One pass over the stages; each writes its files as soon as they are known."""

    def __init__(
        self,
        report: Report,
        options: ReportOptions,
        cache: ResultCache,
        progress: Callable[[str], None],
    ) -> None:
        self.report, self.options, self.cache, self.progress = report, options, cache, progress
        self.drawings: list[Drawing] = []
        self.tables: dict[str, pd.DataFrame] = {}
        self.comparisons: dict[str, pd.DataFrame] = {}

    def write(self, runs: Runs, traces: Traces) -> None:
        """All stages."""
        if runs.frame.empty:
            raise AnalysisError(
                "no finished run to report on"
                + (f"; {len(runs.infeasible)} ran out of memory" if len(runs.infeasible) else "")
                + "; 'srsweep runs' shows what became of them"
            )
        self.report.notes += runs.notes
        alike, notes = comparable(runs.frame)
        self.report.notes += notes
        measured, notes = same_memory(runs.frame)
        self.report.notes += notes
        found = self._stage("associations", lambda: self._associations(alike))
        weighed = self._stage("importances", lambda: self._importances(alike))
        judged = self._stage("findings", lambda: self._findings(runs.frame, weighed))
        self._stage("trade-off", lambda: self._tradeoff(measured, runs.infeasible))
        self._stage("figures", lambda: self._figures(alike, found, weighed))
        self._stage("losses and curves", lambda: self._losses_and_curves(measured, traces))
        self._stage("comparisons", lambda: self._comparisons(runs.frame))
        self._table("runs", _runs_table(runs))
        self._stage("page", lambda: self._page(runs, judged))
        self.report.computed = self.cache.computed
        self.cache.prune()

    def _stage(self, name: str, work: Callable[[], Result]) -> Result:
        self.progress(name)
        begin = time.perf_counter()
        result = work()
        self.report.seconds[name] = time.perf_counter() - begin
        return result

    def _associations(self, frame: pd.DataFrame) -> Associations:
        options = self.options
        found = self.cache.get(
            "associations",
            (frame, options.metrics, options.full_catalog, options.resamples),
            lambda: associations(
                frame, metrics=options.metrics, full_catalog=options.full_catalog,
                resamples=options.resamples,
            ),
        )  # fmt: skip
        self._table("associations", found.to_frame())
        self.report.notes += found.notes
        beside = self.cache.get(
            "dependence",
            (frame, options.metrics, options.full_catalog),
            lambda: dependences(
                frame, metrics=options.metrics, full_catalog=options.full_catalog
            ),
        )  # fmt: skip
        self._table("dependence", beside.to_frame())
        self.report.notes += beside.notes
        return found

    def _importances(self, frame: pd.DataFrame) -> Importances:
        options = self.options
        found = self.cache.get(
            "importances",
            (frame, options.metrics, options.full_catalog, options.fold_repeats),
            lambda: importances(
                frame, metrics=options.metrics, full_catalog=options.full_catalog,
                repeats=options.fold_repeats, jobs=options.jobs,
            ),
        )  # fmt: skip
        self._table("importances", found.to_frame())
        self._table("model_scores", found.scores_frame())
        self._table("importance_encodings", found.encodings)
        self.report.notes += found.notes
        return found

    def _findings(self, frame: pd.DataFrame, weighed: Importances) -> Findings:
        found = self.cache.get(
            "findings", (frame, weighed.to_frame()), lambda: findings(frame, weighed)
        )
        self._table("findings", found.to_frame())
        self._table("findings_runs", found.runs_frame())
        return found

    def _tradeoff(self, frame: pd.DataFrame, infeasible: pd.DataFrame) -> None:
        for name, objectives in OBJECTIVES.items():
            fronts = pareto_fronts(frame, objectives)
            columns = ["dataset", "run_key", *objectives]
            tables = [front.to_frame() for front in fronts]
            self._table(name, pd.concat(tables) if tables else pd.DataFrame(columns=columns))
        self._table("saturation", saturation_frame(saturations(frame)))
        self._table("budgets", best_under_budget(frame))
        self._table("marginal_gains", marginal_gains(frame))
        self._table("hypervolume", hypervolume_by_seed(frame, OBJECTIVES["pareto"]))
        self._table("attainment", attainment(frame, OBJECTIVES["pareto"]))
        for cost in (MEMORY, TIME):
            data = tradeoff_data(frame, infeasible, cost=cost, hidden=self.options.hidden)
            self._draw(tradeoff_figure(data))

    def _figures(self, frame: pd.DataFrame, found: Associations, weighed: Importances) -> None:
        self._draw(negatives_figure(frame, bars=self.options.bars))
        self._draw(heatmap_figure(found))
        for method in METHODS if weighed.rows else METHODS[:1]:
            self._draw(importances_figure(weighed, method))

    def _losses_and_curves(self, frame: pd.DataFrame, traces: Traces) -> None:
        self._draw(losses_figure(frame))
        for cost in (MEMORY, TIME):
            self._draw(equal_budget_figure(equal_budget(frame, cost=cost)))
        for drawing in filtering_figures(frame):
            self._draw(drawing)
        for column in ("loss", "ndcg_at_10"):
            self._draw(curves_figure(traces.curves, column))
        self._draw(gradients_figure(traces.gradients))

    def _comparisons(self, frame: pd.DataFrame) -> None:
        beside = beside_the_paper(frame)
        if len(beside):
            self._table("paper_tables", beside)
            for number, rows in beside.groupby("table"):
                shown = rows.drop(columns="table").dropna(axis=1, how="all").round(5)
                self.comparisons[f"Table {number} of the paper"] = shown
        if frame["source"].astype(str).str.split("/").str[0].eq(PAPER_SOURCE).any():
            for name, table in audit_tables(frame).items():
                self._table(f"audit_{name}", table)
                self.comparisons[f"Audit: {name}"] = table.round(4)

    def _page(self, runs: Runs, judged: Findings) -> None:
        page = Page(
            runs=runs,
            drawings=tuple(self.drawings),
            tables=tuple(self.tables),
            notes=tuple(dict.fromkeys(self.report.notes)),
            options=asdict(self.options),
            verdicts=judged.texts_frame(),
            comparisons=self.comparisons,
        )
        self.report.index.write_text(render_page(page, self.report.folder), encoding="utf-8")
        self.report.files.append(self.report.index)

    def _table(self, name: str, table: pd.DataFrame) -> None:
        path = self.report.folder / f"{name}.csv"
        table.to_csv(path, index=False, float_format="%.10g", lineterminator="\n")
        self.tables[name] = table
        self.report.files.append(path)

    def _draw(self, drawing: Drawing) -> None:
        folder = self.report.folder / "figures"
        folder.mkdir(exist_ok=True)
        self.report.files += drawing.save(folder)
        self.drawings.append(drawing)


def _runs_table(runs: Runs) -> pd.DataFrame:
    table = pd.concat([runs.frame, runs.infeasible], ignore_index=True)
    return table.dropna(axis=1, how="all")


def _is_current(folder: Path, key: str) -> bool:
    """Whether the folder holds the report of this key, every file unchanged."""
    path = folder / "manifest.json"
    if not path.exists():
        return False
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return False
    return manifest.get("key") == key and all(
        (folder / name).is_file() and _sha256(folder / name) == digest
        for name, digest in manifest["files"].items()
    )


def _write_manifest(report: Report, key: str) -> None:
    names = {str(path.relative_to(report.folder)): _sha256(path) for path in report.files}
    content = {"key": key, "files": names, "notes": list(dict.fromkeys(report.notes))}
    (report.folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
