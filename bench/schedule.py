"""`python -m bench schedule`: what scheduling costs, and what packing saves.

Overhead: short toy runs through the real planner, Ray Tune, workers and SQLite; what is left of
the wall time per run is not training. Simulation: 2,000 points drawn from the published runs on 64
GPUs, handed out by the agenda that launches use, against first-in-first-out on whole GPUs. A
shared GPU's runs slow each other down once their compute adds up to more than one GPU.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench import measure
from bench._toy_trainer import Behaviour
from bench.chaos import make_dataset
from bench.search import SHAPES
from db import query
from db.spec import RunSpec
from sweeper.agenda import Agenda, Candidate, DeviceGroup, Site
from sweeper.feasibility import dominated
from sweeper.forecast import Measured, MemoryForecaster
from sweeper.grid import Resources
from sweeper.plan import CONTEXT_BYTES, Slot, predicted_cost

GIB = 2**30
NUM_GPUS = 64
EPOCHS = 10
"""Of each simulated run; the published figure is one epoch."""
START_SECONDS = 3.0
"""A cold worker's start, in which its GPU does nothing."""
OUT_OF_MEMORY_SECONDS = 15.0
"""Until a run that does not fit has found out: start, data, first steps."""
RESERVED = 1.1
"""Reserved over allocated bytes of a simulated run."""


@dataclass(frozen=True)
class Point:
    """A run to simulate, with what only its execution reveals."""

    key: str
    spec: RunSpec
    seconds: float
    peak_bytes: float

    def fits(self, device_bytes: float, share: float = 1.0) -> bool:
        """Whether it can train with this share of a device."""
        return RESERVED * self.peak_bytes + CONTEXT_BYTES <= share * device_bytes


def draw(path: Path, count: int, seed: int) -> list[Point]:
    """Points drawn from the published runs with replacement, told apart by their seeds.

    Parameters
    ----------
    path : Path
        The paper's `experiments.csv`.
    count : int
        How many.
    seed : int
        Of the draw.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    generator = random.Random(seed)
    points = []
    for number in range(count):
        row = generator.choice(rows)
        negatives = float(row["loss_sample_count"] or "inf")
        sampled = math.isfinite(negatives)
        spec = RunSpec(
            dataset=row["dataset"], loss="ce_minus" if sampled else "ce", precision="fp16",
            batch_size=int(float(row["batch_size"])), max_seq_len=int(float(row["max_seq_len"])),
            num_negatives=int(negatives) if sampled else None, seed=number,
        )  # fmt: skip
        seconds = EPOCHS * float(row["run_training_epoch"])
        points.append(
            Point(f"{number:05d}", spec, seconds, float(row["max_allocated_memory"]) * GIB)
        )
    return points


@dataclass
class _Execution:
    point: Point
    slot: Slot
    gpu: int
    left: float
    """Seconds of training alone on the device that are still to do."""
    outcome: str
    starts_at: float = 0.0


class Simulation:
    """Simulated GPUs of one kind.

    Parameters
    ----------
    points : sequence of Point
        In the order of the grid.
    device_bytes : float
        Memory of each GPU.
    compute : float
        Share of a GPU's compute that one run can use; what it has beyond that is idle.
    """

    def __init__(self, points: Sequence[Point], device_bytes: float, compute: float) -> None:
        self.points = {point.key: point for point in points}
        self.device_bytes, self.compute = device_bytes, compute
        self.now = self.busy = 0.0
        self.counts: Counter[str] = Counter()
        self.idle_until_last: float | None = None
        self._left = len(points)
        self._asked: list[tuple[Point, Slot]] = []
        self._gpus: list[list[_Execution]] = [[] for _ in range(NUM_GPUS)]

    def place(self, key: str, slot: Slot) -> None:
        """Ask for room for a run."""
        self._asked.append((self.points[key], slot))
        self._start()

    def _start(self) -> None:
        """Start what has room, each on the fullest GPU that has it, as Ray does."""
        waiting = []
        for point, slot in self._asked:
            used = [sum(e.slot.gpus for e in gpu) for gpu in self._gpus]
            room = [n for n, u in enumerate(used) if u + slot.gpus <= 1 + 1e-6]
            if not room:
                waiting.append((point, slot))
                continue
            gpu = max(room, key=used.__getitem__)
            fits = point.fits(self.device_bytes, 1.0 if slot.whole else slot.gpus)
            seconds = point.seconds if fits else OUT_OF_MEMORY_SECONDS
            outcome = "done" if fits else "out of memory" if slot.decides else "share too small"
            start = self.now + START_SECONDS
            self._gpus[gpu].append(_Execution(point, slot, gpu, seconds, outcome, start))
        self._asked = waiting

    def advance(self) -> list[_Execution]:
        """Let time pass until a run ends; those that ended."""
        running = [e for gpu in self._gpus for e in gpu]
        rates = [self._rate(gpu) for gpu in self._gpus]
        end = min(
            (max(e.starts_at, self.now) + e.left / rates[e.gpu] for e in running), default=math.inf
        )
        begin = min((e.starts_at for e in running if e.starts_at > self.now), default=math.inf)
        until = min(end, begin)
        for gpu, rate in zip(self._gpus, rates, strict=True):
            training = [e for e in gpu if e.starts_at <= self.now]
            self.busy += (until - self.now) * bool(training)
            for e in training:
                e.left -= (until - self.now) * rate
        self.now = until
        ended = [e for e in running if e.starts_at <= self.now and e.left <= 1e-6]
        for e in ended:
            self._gpus[e.gpu].remove(e)
            self.counts[e.outcome] += 1
            self.settle(int(e.outcome != "share too small"))
        self._start()
        return ended

    def settle(self, number: int) -> None:
        """So many points are final."""
        self._left -= number
        if self._left <= NUM_GPUS and self.idle_until_last is None and self.now:
            self.idle_until_last = 1 - self.busy / (NUM_GPUS * self.now)

    def _rate(self, gpu: Sequence[_Execution]) -> float:
        training = sum(e.starts_at <= self.now for e in gpu)
        return 1 / max(1.0, self.compute * training)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return not any(self._gpus)

    @property
    def num_free(self) -> int:
        """GPUs on which nothing runs."""
        return sum(not gpu for gpu in self._gpus)

    def row(self, policy: str) -> dict[str, object]:
        """Figures for the table."""
        infeasible = [p for p in self.points.values() if not p.fits(self.device_bytes)]
        tried = self.counts["out of memory"]
        return {
            "policy": policy, "gpu_gib": round(self.device_bytes / GIB), "compute": self.compute,
            "hours": self.now / 3600, "idle_until_last_64": self.idle_until_last or 0.0,
            "infeasible": len(infeasible), "out_of_memory": tried,
            "avoided": 1 - tried / len(infeasible) if infeasible else math.nan,
            "wrongly_skipped": self.counts["wrongly skipped"],
            "share_too_small": self.counts["share too small"], "done": self.counts["done"],
        }  # fmt: skip


def first_in_first_out(points: Sequence[Point], device_bytes: float, compute: float) -> Simulation:
    """Whole GPUs in the order of the grid; nothing is predicted or skipped."""
    simulation = Simulation(points, device_bytes, compute)
    queue = iter(points)
    while True:
        for point in itertools.islice(queue, simulation.num_free):
            simulation.place(point.key, Slot(1.0, 1.0, whole=True))
        if simulation.is_idle:
            return simulation
        simulation.advance()


def by_agenda(
    points: Sequence[Point], device_bytes: float, compute: float, timing: str
) -> Simulation:
    """What a launch does: the agenda hands out, finished runs teach, dominated ones are skipped."""
    simulation = Simulation(points, device_bytes, compute)
    group = DeviceGroup(NUM_GPUS, "simulated", int(device_bytes))
    site = Site(cpus=1e6, cpus_of_node=1e6, groups=(group,))
    agenda = Agenda(site, Resources(gpus=1.0, timing=timing))  # type: ignore[arg-type]
    pending = {
        p.key: Candidate(p.key, p.spec, predicted_cost(p.spec, SHAPES[p.spec.dataset].num_items))
        for p in points
    }
    measured: list[Measured] = []
    proofs: list[tuple[str, RunSpec]] = []
    learnt = -1
    while True:
        if len(measured) >= max(1.1 * learnt, learnt + 3) or learnt < 0:
            learnt = len(measured)
            agenda.learn(MemoryForecaster(SHAPES, measured, padded=True))
        agenda.offer(list(pending.values()), agenda.mark())
        while (task := agenda.next()) is not None:
            simulation.place(task.key, task.slot)
        if simulation.is_idle:
            return simulation
        for e in simulation.advance():
            key = e.point.key
            agenda.ended(key)
            if e.outcome == "share too small":
                pending[key] = dataclasses.replace(pending[key], needs_whole=True)
                continue
            del pending[key]
            if e.outcome == "done":
                measured.append(Measured(e.point.spec, e.point.peak_bytes))
                continue
            proofs.append((key, e.point.spec))
            waiting = [(k, pending[k].spec) for k in agenda.waiting if k in pending]
            for skipped in dominated(waiting, proofs[-1:]):
                del pending[skipped]
                wrongly = simulation.points[skipped].fits(device_bytes)
                simulation.counts["wrongly skipped" if wrongly else "skipped"] += 1
                simulation.settle(1)


def simulate(path: Path, count: int, seed: int) -> list[dict[str, object]]:
    """All policies on large and on small GPUs."""
    points = draw(path, count, seed)
    rows = []
    for gib, compute in ((80, 1.0), (80, 0.5), (24, 1.0), (24, 0.5)):
        size = gib * GIB
        rows.append(first_in_first_out(points, size, compute).row("fifo, whole GPUs"))
        rows.append(by_agenda(points, size, compute, "exclusive").row("srsweep, exclusive"))
        rows.append(by_agenda(points, size, compute, "shared").row("srsweep, shared"))
        print(measure.table(rows[-3:]), flush=True)
    return rows


def overhead(runs: int, *, cold: bool, slots: int = 2) -> dict[str, object]:
    """Seconds per run that are not training, over short runs on this machine.

    Parameters
    ----------
    runs : int
        How many.
    cold : bool
        A new worker process for each run, as on GPUs.
    slots : int
        Runs at a time.
    """
    folder = Path(tempfile.mkdtemp(prefix="schedule-"))
    toy = Behaviour(journal=str(folder / "journal"), steps=2, step_seconds=0.0)
    make_dataset(folder / "data" / "toy")
    (folder / "short.yaml").write_text(f"dataset: toy\nseeds: {runs}\n")
    url = f"sqlite:///{folder}/runs.db"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "bench._toy_trainer", str(folder / "short.yaml"), "--db", url,
         "--data-dir", str(folder / "data"), "--cpus", str(slots), *(["--cold"] if cold else [])],
        env={**os.environ, **toy.environment()},
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wall = time.monotonic() - began
    ended = query.rows(url, "select started_at, ended_at from attempts where status = 'done'")
    first = min(_moment(row["started_at"]) for row in ended)
    busy = (max(_moment(row["ended_at"]) for row in ended) - first).total_seconds()
    shutil.rmtree(folder)
    # from the first start on; each run waits for its turn in one of the slots
    return {
        "workers": "cold" if cold else "reused", "runs": runs, "slots": slots,
        "seconds_per_run": busy * slots / runs, "wall_seconds": wall, "start_seconds": wall - busy,
    }  # fmt: skip


def _moment(value: object) -> datetime:
    """A time as the database gives it: SQLite keeps it as text."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(str(value))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench schedule", description=__doc__)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=200, help="short runs; 0 leaves them out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to bench/results/schedule*.csv")
    asked = parser.parse_args(words)
    if asked.runs:
        rows = [overhead(asked.runs, cold=cold) for cold in (False, True)]
        print(measure.table(rows))
        if asked.save:
            measure.save("schedule_overhead", rows)
    if os.environ.get("SRSWEEP_SHARED") and asked.points:
        path = Path(os.environ["SRSWEEP_SHARED"]) / "paper" / "experiments.csv"
        found = simulate(path, asked.points, asked.seed)
        if any(row["wrongly_skipped"] for row in found):
            print("feasible points were skipped", file=sys.stderr)
            return 1
        if asked.save:
            measure.save("schedule", found)
    return 0
