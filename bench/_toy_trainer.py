"""A trainer that learns nothing, keeps a journal of its own, and misbehaves on request.

The journal is fsynced line by line, so it tells what was really executed, whatever was killed.
`python -m bench._toy_trainer GRID --db URL --data-dir FOLDER` launches a grid with it. How it
behaves stands as JSON in the variable SRSWEEP_TOY (see `Behaviour`).
"""

import argparse
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.measures import EvaluationRecord, Recorder, RunResult, StepRecord
from db.spec import RunSpec, RunStatus

VARIABLE = "SRSWEEP_TOY"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the toy does; runs are told apart by their seed."""

    journal: str
    """Folder of the journals."""
    steps: int = 20
    step_seconds: float = 0.02
    evaluate_every: int = 5
    out_of_memory_from: int | None = None
    """Batch size from which a run does not fit."""
    errors: dict[str, str] = field(default_factory=dict)
    """Name of the exception that a seed always raises at its third step."""
    killed_once: tuple[int, ...] = ()
    """Seeds whose worker gets SIGKILL in the first execution."""
    killed_always: tuple[int, ...] = ()
    """Seeds whose worker gets SIGKILL in every execution."""
    extended_while: str | None = None
    """A run does not end while this file exists: it takes further steps."""
    stalled: tuple[int, ...] = ()
    """Seeds that report nothing after their third step, for an hour."""
    faults: dict[str, str] = field(default_factory=dict)
    """Fault point at which the worker of a seed gets SIGKILL once; see `bench._faults`."""

    @classmethod
    def from_environment(cls) -> "Behaviour":
        """Read the variable SRSWEEP_TOY."""
        values = json.loads(os.environ[VARIABLE])
        for name in ("killed_once", "killed_always", "stalled"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """The variable for a subprocess."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


class Journal:
    """One execution: its lines are on disk when `write` returns."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.number = len(list(folder.glob(f"{seed}-*")))
        self._path = folder / f"{seed}-{self.number}-{os.getpid()}"
        self._handle = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def write(self, line: str) -> None:
        """Append a line and wait for the disk."""
        os.write(self._handle, f"{line}\n".encode())
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def train(
    spec: RunSpec,
    dataset: Any,
    recorder: Recorder,
    device: str = "cpu",
    *,
    options: Any = None,
) -> RunResult:
    """Stand in for `trainer.loop.train`."""
    toy = Behaviour.from_environment()
    if toy.faults:
        from bench import _faults

        folder = Path(toy.journal).with_name("faults") / str(spec.seed)
        _faults.arm(toy.faults.get(str(spec.seed)), folder)
    journal = Journal(Path(toy.journal), spec.seed)
    try:
        return _train(spec, recorder, toy, journal)
    finally:
        journal.close()


def _train(spec: RunSpec, recorder: Recorder, toy: Behaviour, journal: Journal) -> RunResult:
    if toy.out_of_memory_from is not None and spec.batch_size >= toy.out_of_memory_from:
        journal.write("out_of_memory")
        return RunResult(
            status=RunStatus.OUT_OF_MEMORY,
            num_steps=0,
            num_epochs=0,
            best_step=None,
            num_parameters=1,
            stop_reason="out_of_memory",
            error="tried to allocate 2 GiB",
            requested_bytes=2**31,
            allocated_bytes=2**30,
            total_bytes=2**31,
        )
    for step in itertools.count():
        if step >= toy.steps and not (toy.extended_while and Path(toy.extended_while).exists()):
            break
        journal.write(f"step {step} {time.time():.3f}")
        recorder.step(
            StepRecord(step, 0, 1.0 / (step + 1), 1.0, 1e-3, toy.step_seconds, 10, 100, None, 100)
        )
        if (step + 1) % toy.evaluate_every == 0:
            value = min(1.0, (step + 1) / toy.steps) / (1 + spec.seed)
            epoch = (step + 1) // toy.evaluate_every
            recorder.evaluation(
                [EvaluationRecord(step + 1, epoch, "validation", "ndcg", 10, value, 0.01, 5)]
            )
        if step == 2:
            _misbehave(spec.seed, toy, journal)
        time.sleep(toy.step_seconds)
    journal.write("end")
    return RunResult(
        status=RunStatus.DONE,
        num_steps=step,
        num_epochs=1,
        best_step=step,
        num_parameters=1,
        test={"ndcg_at_10": 1.0 / (1 + spec.seed)},
        validation={"ndcg_at_10": 1.0 / (1 + spec.seed)},
        final_loss=1.0 / toy.steps,
        peak_train_memory_bytes=100 * spec.batch_size,
        stop_reason="max_epochs",
    )


def _misbehave(seed: int, toy: Behaviour, journal: Journal) -> None:
    name = toy.errors.get(str(seed))
    if name is not None:
        raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[name](f"toy {seed} failed")
    once = seed in toy.killed_once and journal.number == 0
    if once or seed in toy.killed_always:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed in toy.stalled:
        time.sleep(3600)


def main(words: list[str]) -> int:
    """Launch a grid with the toy trainer."""
    from sweeper.grid import load_grid
    from sweeper.launch import launch
    from sweeper.launch_options import LaunchOptions
    from sweeper.plan import RetryLimits
    from sweeper.progress import PlainDisplay

    parser = argparse.ArgumentParser()
    parser.add_argument("grid")
    parser.add_argument("--db", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--lease-seconds", type=float, default=5.0)
    parser.add_argument("--address")
    parser.add_argument("--cpus", type=float, default=2)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--spool-dir", type=Path)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--stall-seconds", type=float, default=1800.0)
    asked = parser.parse_args(words)
    options = LaunchOptions(
        database=asked.db,
        data_dir=asked.data_dir,
        address=asked.address,
        cpus=asked.cpus,
        gpus=asked.gpus,
        lease_seconds=asked.lease_seconds,
        poll_seconds=0.5,
        stall_seconds=asked.stall_seconds,
        retries=RetryLimits(lost=asked.retries),
        spool_dir=asked.spool_dir,
        reuse_workers=not asked.cold,
        trainer="bench._toy_trainer:train",
    )
    outcome = launch(load_grid(asked.grid), options, PlainDisplay())
    print(json.dumps({"counts": outcome.snapshot.counts, "exit_code": outcome.exit_code}))
    return outcome.exit_code


if __name__ == "__main__":
    from db.errors import SrsweepError

    try:
        sys.exit(main(sys.argv[1:]))
    except SrsweepError as error:
        print(f"srsweep: {error}", file=sys.stderr)
        sys.exit(2)
