"""The one protocol of measurement: variants interleaved in one process, medians, ratios."""

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

RESULTS = Path(__file__).parent / "results"


def interleave(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, the variants in turn A B C A B C, so that drift hits all alike.

    Parameters
    ----------
    variants : mapping of str to callable
        What to time; a callable on a CUDA device must synchronise before it returns.
    rounds, warmup : int
        Counted and uncounted calls of each variant.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            elapsed = time.perf_counter() - begin
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], over: str) -> dict[str, float]:
    """Median over the rounds of each variant's time over that of `over` in the same round."""
    return {
        name: median(a / b for a, b in zip(values, seconds[over], strict=True))
        for name, values in seconds.items()
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20 % quantile, median, 80 % quantile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = quantiles(values, n=5, method="inclusive")
    return cuts[0], median(values), cuts[-1]


def machine() -> dict[str, str]:
    """Where and with what a figure was taken: device, versions, commit, day."""
    row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else ""),
        "python": platform.python_version(),
        "device": f"cpu {platform.machine()}",
    }
    try:
        import torch
    except ImportError:
        return row
    row["torch"] = torch.__version__
    row["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
        row["cuda"] = str(torch.version.cuda)
    try:
        import triton
    except ImportError:
        return row
    row["triton"] = triton.__version__
    return row


def save(name: str, rows: Sequence[Mapping[str, object]], folder: Path = RESULTS) -> Path:
    """Append rows, each with the machine's, to `<folder>/<name>.csv`; columns may grow."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    where = machine()
    new = [{**row, **where} for row in rows]
    old: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = [dict(row) for row in csv.DictReader(file)]
    columns = list(dict.fromkeys(key for row in [*old, *new] for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
    return path


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as an aligned text table; floats at four significant digits."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
