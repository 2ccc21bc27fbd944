"""The report's HTML page: one file that opens offline, plotly inside it once."""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image
from plotly.offline import get_plotlyjs

from analysis.frame import FACTORS, MEMORY, QUALITY, Runs, numeric, records
from analysis.pareto import pareto_fronts
from analysis.plots.style import Drawing
from db.errors import SpecError
from db.measures import MEASURES, METRICS, metric_column
from db.spec import RunSpec, field_types

MEASURES_SHOWN: tuple[str, ...] = (
    MEMORY,
    "peak_eval_memory_bytes",
    "epoch_seconds",
    "step_seconds",
    "train_seconds",
    *(metric_column(metric, 10) for metric in METRICS),
    "ndcg_at_1",
    "ndcg_at_100",
)
"""Measures that the scatter offers and the table shows, where any run has them."""
_BRUSHES = ("dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives")
_IMAGE_WIDTH = 1100


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes
    ----------
    runs : Runs
    drawings : tuple of Drawing
        In order.
    tables : tuple of str
        Names of the CSV files beside the page.
    notes : tuple of str
        What was left out, and why.
    options : dict
        What the report rests on.
    verdicts : DataFrame
        Columns of `findings.csv` with the text of each claim; empty without findings.
    comparisons : dict of str to DataFrame
        Further tables by heading.
    """

    runs: Runs
    drawings: tuple[Drawing, ...]
    tables: tuple[str, ...]
    notes: tuple[str, ...]
    options: dict[str, Any]
    verdicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    comparisons: dict[str, pd.DataFrame] = field(default_factory=dict)


def render_page(page: Page, folder: Path) -> str:
    """HTML of the page.

    Parameters
    ----------
    page : Page
    folder : Path
        Of the report, where the figures' PNG files are already written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    data = page_data(page.runs)
    return environment.get_template("report.html.j2").render(
        data=_script_json(data),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        script=(Path(__file__).parent / "templates" / "report.js").read_text(encoding="utf-8"),
        style=(Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8"),
        figures=[
            {
                "name": item.name,
                "caption": item.caption,
                "image": _embedded(folder / "figures" / f"{item.name}.png"),
            }
            for item in page.drawings
            if not item.said
        ],
        empty_figures=[item for item in page.drawings if item.said],
        tables=page.tables,
        notes=page.notes,
        options=page.options,
        claims=_claims(page.verdicts),
        comparisons=page.comparisons,
        datasets=page.runs.datasets,
        num_runs=len(page.runs.frame),
        num_infeasible=len(page.runs.infeasible),
        definitions=[
            MEASURES[name] for name in (*QUALITY, MEMORY, "epoch_seconds") if name in MEASURES
        ],
    )


def page_data(runs: Runs) -> dict[str, Any]:
    """Runs as compact columns for the page's script; measures in display units.

    Returns
    -------
    dict
        columns, rows, measures (name, label, maximise), brushes (name to values), front (row
        numbers), tails (command endings) of all finished and infeasible runs.
    """
    frame = pd.concat([runs.frame, runs.infeasible], ignore_index=True)
    shown = [name for name in MEASURES_SHOWN if numeric(frame, name).notna().any()]
    columns: dict[str, list[Any]] = {
        "key": [str(key)[:12] for key in frame["run_key"]],
        **{name: _plain(frame[name]) for name in _BRUSHES},
        "seed": _plain(frame["seed"]),
        "status": _plain(frame["status"]),
    }
    for name in shown:
        scaled = numeric(frame, name) / MEASURES[name].display_scale
        columns[name] = [None if np.isnan(value) else float(f"{value:.5g}") for value in scaled]
    tails = [_command_tail(row) for row in records(frame)]
    distinct = list(dict.fromkeys(tails))
    numbers = {tail: number for number, tail in enumerate(distinct)}
    front = {
        key for item in pareto_fronts(runs.frame, (MEMORY, "ndcg_at_10"))
        for key in item.runs["run_key"]
    }  # fmt: skip
    return {
        "columns": columns,
        "measures": [
            {
                "name": name,
                "label": MEASURES[name].label,
                "maximise": MEASURES[name].maximise,
            }
            for name in shown
        ],
        "brushes": {name: _levels(columns[name]) for name in _BRUSHES},
        "front": [number for number, key in enumerate(frame["run_key"]) if key in front],
        "tails": distinct,
        "tail": [numbers[tail] for tail in tails],
    }


def _command_tail(row: dict[str, Any]) -> str:
    """The options of the run's `srsweep train` line that the page cannot tell from its columns."""
    values: dict[str, Any] = {"dataset": "DATASET", "loss": row["loss"]}
    for name, kind in field_types().items():
        value = row.get(name)
        if name in {"dataset", "loss"} or value is None or pd.isna(value):
            continue
        values[name] = _as_field(value, kind)
    try:
        spec = RunSpec.from_mapping(values)
    except SpecError:
        return ""
    words = spec.command().split(" --")[1:]
    known = ("dataset ", "model ", "loss ", *(f.replace("_", "-") + " " for f in FACTORS), "seed ")
    return "".join(f" --{word}" for word in words if not word.startswith(known))


def _as_field(value: Any, kind: Any) -> Any:
    """A frame's value as the type that RunSpec takes."""
    text = str(kind)
    if "bool" in text:
        return bool(value)
    if isinstance(value, str):
        return int(value) if value.isdigit() and "int" in text else value
    if "int" in text and float(value).is_integer():
        return int(value)
    return float(value) if "float" in text else value


def _plain(column: pd.Series) -> list[Any]:
    out: list[Any] = []
    for value in column.tolist():
        if value is None or pd.isna(value):
            out.append(None)
        elif isinstance(value, float) and value.is_integer():
            out.append(int(value))
        else:
            out.append(value)
    return out


def _levels(values: list[Any]) -> list[Any]:
    """Distinct values in order, missing last."""
    present = {value for value in values if value is not None}
    ordered: list[Any] = sorted(present, key=lambda value: (isinstance(value, str), value))
    return [*ordered, None] if None in values else ordered


def _embedded(path: Path) -> str:
    """A figure as a data address, reduced to the width of the page."""
    with Image.open(path) as image:
        height = round(image.height * _IMAGE_WIDTH / image.width)
        small = image.convert("RGB")
        if image.width > _IMAGE_WIDTH:
            small = small.resize((_IMAGE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _script_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _claims(verdicts: pd.DataFrame) -> list[dict[str, Any]]:
    """Verdicts grouped by claim."""
    if verdicts.empty:
        return []
    return [
        {
            "number": number,
            "text": rows["text"].iloc[0],
            "measure": rows["measure"].iloc[0],
            "rows": records(rows.replace({np.nan: None})),
            "counts": rows["verdict"].value_counts().to_dict(),
        }
        for number in dict.fromkeys(verdicts["claim"].tolist())
        for rows in [verdicts[verdicts["claim"] == number]]
    ]
