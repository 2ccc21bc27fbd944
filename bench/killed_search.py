"""Whether a search whose driver is killed three times ends with the runs of one left alone.

Toy training, real everything else: Ray, workers, run database. Each driver gets SIGKILL in the
middle of a batch and the same line is launched again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import measure
from bench._toy_trainer import Behaviour
from bench.chaos import make_dataset
from db import query
from db.errors import StoreError

GRID = """
sweep: toy
dataset: toy
loss: ce_minus
batch_size: [8, 16, 32, 64, 128, 256]
max_seq_len: [4, 8, 16]
num_negatives: [2, 4]
search:
  objectives: [ndcg_at_10, peak_train_memory_bytes]
  runs: 12
  batch: 2
"""


class Searching:
    """One search in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.url = f"sqlite:///{folder / 'runs.db'}"
        self._toy = Behaviour(journal=str(folder / "journal"), step_seconds=0.05)
        (folder / "toy.yaml").write_text(GRID)
        make_dataset(folder / "data" / "toy")

    def start(self) -> subprocess.Popen[bytes]:
        """Launch the driver in a session of its own."""
        words = [str(self._folder / "toy.yaml"), "--db", self.url]
        words += ["--data-dir", str(self._folder / "data")]
        with (self._folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bench._toy_trainer", *words],
                env={**os.environ, **self._toy.environment(), "OMP_NUM_THREADS": "1"},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def kill_after(self, num_done: int) -> None:
        """Run until so many runs are done and another is under way, then SIGKILL the driver."""
        driver = self.start()
        while driver.poll() is None:
            statuses = [row["status"] for row in self.runs()]
            if statuses.count("done") >= num_done and "running" in statuses:
                os.kill(driver.pid, signal.SIGKILL)
            time.sleep(0.1)

    def runs(self) -> list[dict[str, object]]:
        """Settings and status of all runs."""
        try:
            return query.rows(
                self.url, "select batch_size, max_seq_len, num_negatives, status from runs"
            )
        except StoreError:
            return []

    def keys(self) -> list[str]:
        """The set of runs, in an order that does not depend on when they were asked for."""
        return sorted(json.dumps(row) for row in self.runs())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench killed_search", description=__doc__)
    parser.add_argument("--kills", default="1,5,8", help="finished runs at which to kill")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Searching(Path(folder) / "alone"), Searching(Path(folder) / "killed")
        alone.start().wait()
        kills = [int(number) for number in options.kills.split(",")]
        for number in kills:
            killed.kill_after(number)
        killed.start().wait()
        same = alone.keys() == killed.keys()
        rows: list[dict[str, object]] = [
            {"kills": len(kills), "runs": len(killed.keys()), "same_runs": int(same)}
        ]
    print(measure.table(rows))
    if options.save:
        measure.save("killed_search", rows)
    return 0 if same else 1
