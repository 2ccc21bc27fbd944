"""Memory and time of every loss against catalog size, drawn from the bench's rows."""

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "ce": "#000000", "ce_minus": "#9e6b00", "cce": "#0072b2", "cce_minus": "#d55e00",
    "cce_minus_share128": "#cc79a7", "sce": "#009e73", "bce": "#999999", "bce_plus": "#56b4e9",
    "gbce": "#e0c000",
}  # fmt: skip


def draw_catalog(path: Path, folder: Path, part: str = "sizes") -> list[Path]:
    """Figure of the latest rows of each point, as SVG and PNG.

    Parameters
    ----------
    path : Path
        CSV with `variant`, `num_items`, `width`, `peak_bytes`, `gradient_bytes`, seconds.
    folder : Path
        Where `kernels-catalog.svg` and `.png` go.
    part : str
        `sizes` (CPU) or `gpu-sizes`.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part]
    gpu = part == "gpu-sizes"
    points: dict[tuple[int, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        if row.get("error"):
            continue
        memory = row["extra_bytes"] if gpu else row["peak_bytes"]
        extra = float(memory) - (0.0 if gpu else float(row["gradient_bytes"]))
        seconds = float(row["ms"]) / 1e3 if gpu else float(row["cpu_seconds"])
        point = max(extra, 1e5) / 2**20, seconds
        points[int(row["width"]), row["variant"]][int(row["num_items"])] = point
    widths = sorted({width for width, _ in points})
    figure = Figure(figsize=(9, 3.6 * len(widths)), layout="constrained")
    axes = figure.subplots(len(widths), 2, squeeze=False)
    for line, width in enumerate(widths):
        for place, what in enumerate(("MiB beyond inputs and gradients", "seconds")):
            axis: Axes = axes[line][place]
            for name, color in COLORS.items():
                made = sorted(points.get((width, name), {}).items())
                if made:
                    sizes, values = zip(*made, strict=True)
                    axis.plot(sizes, [v[place] for v in values], "o-", ms=3, label=name, c=color)
            axis.set(xscale="log", yscale="log", xlabel="items in the catalog", ylabel=what)
            axis.set_title(f"D = {width}", fontsize=10)
            axis.grid(alpha=0.3)
    tokens, device = rows[-1]["num_tokens"], rows[-1]["device"]
    figure.suptitle(
        f"Forward and backward of {tokens} tokens, 256 negatives, {device}", fontsize=11
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    made_paths = [folder / f"kernels-catalog{suffix}" for suffix in (".svg", ".png")]
    for target in made_paths:
        figure.savefig(target, dpi=120, metadata={"Date": None} if target.suffix == ".svg" else {})
    return made_paths
