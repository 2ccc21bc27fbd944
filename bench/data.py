"""How long `prepare` takes beside reading the file, in how much memory, and opening after it.

Each measurement runs in a process of its own, whose peak resident memory is that of the step alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench import measure

_STEPS = {
    "generate": """
from trainer.data.generate import GeneratorOptions, generate_blocks
from trainer.data.write import write_interactions
options = GeneratorOptions(num_users={users}, num_items={items}, interactions_per_user={mean})
result = write_interactions(generate_blocks(options), {file!r})
""",
    "read": """
import pyarrow.parquet
file = pyarrow.parquet.ParquetFile({file!r})
result = sum(len(batch) for batch in file.iter_batches(1 << 20))
""",
    "prepare": """
from pathlib import Path
from trainer.data.prepare import prepare
from trainer.data.sources import open_source
dataset = prepare(
    open_source("parquet", {file!r}), {out!r}, memory_rows={memory_rows}, overwrite=True
)
result = {{"fingerprint": dataset.fingerprint, **dataset.meta["counts"]}}
""",
    "check": """
from trainer.data.dataset import check_dataset, load_dataset
check_dataset(load_dataset({out!r}))
result = None
""",
    "open": """
from trainer.data.dataset import load_dataset
begin = time.perf_counter()
load_dataset({out!r})
result = time.perf_counter() - begin
""",
}
"""Name -> Python that leaves its answer in `result`."""


def main(arguments: Sequence[str] = ()) -> int:
    """Generate, read, prepare and open; print the medians and save them."""
    parser = argparse.ArgumentParser(prog="python -m bench data", description=__doc__)
    parser.add_argument("--rows", type=float, default=30e6, help="interactions to generate")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=750_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[1 << 25, 1 << 22])
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder")
    parser.add_argument("--save", action="store_true", help="append to bench/results/data.csv")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = _measure(options, Path(folder))
    print(measure.table(rows))
    if options.save:
        print(f"saved to {measure.save('data', rows)}")
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    file, out = str(folder / "events.parquet"), str(folder / "dataset")
    generated = _run(
        "generate",
        users=options.users,
        items=options.items,
        mean=options.rows / options.users,
        file=file,
    )
    size = os.path.getsize(file)
    variants = {"read": {"file": file}} | {
        f"prepare {rows:,} rows in memory": {"file": file, "out": out, "memory_rows": rows}
        for rows in options.memory_rows
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    prints = set()
    for _ in range(options.rounds):
        for name, values in variants.items():
            answer = _run(name.split()[0], **values)
            if name != "read":
                prints.add(answer["result"]["fingerprint"])
                counts = answer["result"]
            found[name].append(answer)
    # No figure on a wrong result: every variant gave the same dataset, and its arrays are whole.
    if len(prints) != 1:
        raise SystemExit(f"the variants gave different datasets: {sorted(prints)}")
    _run("check", out=out)
    opens = [_run("open", out=out)["result"] for _ in range(7)]
    rows: list[dict[str, object]] = [_row("generate", [generated], options.rows)]
    for name, answers in found.items():
        row = _row(name, answers, options.rows)
        for measured in ("seconds", "cpu_seconds"):
            pairs = zip(answers, found["read"], strict=True)
            row[f"{measured}_over_read"] = median(a[measured] / b[measured] for a, b in pairs)
        rows.append(row)
    rows.append({"step": "open", "seconds": median(opens), "rounds": len(opens)})
    for row in rows:
        row |= {
            "interactions": counts["raw_rows"],
            "users": options.users,
            "catalog": counts["num_items"],
            "file_bytes": size,
        }
    shutil.rmtree(out)
    return rows


def _row(name: str, answers: list[dict[str, float]], rows: float) -> dict[str, object]:
    seconds = median(answer["seconds"] for answer in answers)
    return {
        "step": name,
        "seconds": seconds,
        "cpu_seconds": median(answer["cpu_seconds"] for answer in answers),
        "peak_resident_bytes": max(answer["peak_resident_bytes"] for answer in answers),
        "million_rows_per_second": rows / seconds / 1e6,
        "rounds": len(answers),
    }


def _run(step: str, **values: object) -> dict[str, object] | dict[str, float]:
    """Run a step in a process of its own; what it answered, its seconds and its peak memory."""
    code = (
        "import json, resource, time\n"
        "begin = time.perf_counter()\n"
        + _STEPS[step].format(**values)
        + "\nseconds = time.perf_counter() - begin\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps({'result': result, 'seconds': seconds,"
        " 'cpu_seconds': usage.ru_utime + usage.ru_stime,"
        " 'peak_resident_bytes': usage.ru_maxrss * 1024}))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer
