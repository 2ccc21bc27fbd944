"""`python -m bench resume --kills N`: training that is killed again and again ends the same.

Trains a run to its end, then trains it anew in processes that are killed with SIGKILL at random
moments, each going on from the checkpoint of the one before. Prints its table only when the final
weights, the test metrics and the loss of every step equal those of the uninterrupted run bit for
bit.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import save, table
from db.measures import EvaluationRecord, HistogramRecord, RunResult, StepRecord
from db.spec import RunSpec
from trainer.data.dataset import load_dataset
from trainer.data.generate import GeneratedSource, GeneratorOptions
from trainer.data.prepare import prepare
from trainer.loop import TrainOptions, train

_SETTINGS: dict[str, dict[str, Any]] = {
    "sasrec ce": {},
    "sasrec cce_minus, rowwise_adam": {
        "loss": "cce_minus", "num_negatives": 16, "optimizer": "rowwise_adam",
        "evaluate_every_steps": 7,
    },
    "bert4rec ce_minus": {"model": "bert4rec", "loss": "ce_minus", "num_negatives": 16},
    "sasrec sce, fp16": {"loss": "sce", "sce_bucket_size_y": 32, "precision": "fp16"},
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the bench and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench resume", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="per setting")
    parser.add_argument("--settings", nargs="+", choices=_SETTINGS, default=[*_SETTINGS][:1])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.settings:
        with tempfile.TemporaryDirectory(prefix="srsweep-resume-") as folder:
            rows.append({"setting": name, **kill_and_compare(name, options, Path(folder))})
    print(table(rows))
    if options.save:
        print(f"appended to {save('resume', rows)}")
    return 0


def kill_and_compare(name: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Figures of a setting whose killed run equals the uninterrupted one.

    Raises
    ------
    SystemExit
        It does not, or a process failed.
    """
    data = folder / "data"
    made = GeneratorOptions(num_users=options.users, num_items=options.users // 2, seed=1)
    dataset = prepare(GeneratedSource(made), data)
    num_steps = options.epochs * -(-len(dataset.train) // 32)
    rng = random.Random(options.seed)
    moments = sorted(rng.sample(range(1, num_steps), options.kills))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.resume"])
    for path in ("whole", "killed"):
        (folder / path).mkdir()
    _run(context, (name, options.epochs, data, folder / "whole", None, 0.0))
    kills = 0
    for moment in [*moments, None]:
        delay = rng.uniform(0.0, 0.02)
        code = _run(context, (name, options.epochs, data, folder / "killed", moment, delay))
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    whole, killed = (_read(folder / path) for path in ("whole", "killed"))
    for what, found in whole.items():
        if killed[what] != found:
            raise SystemExit(f"{name}: {what} differ after {kills} kills: no figures")
    taken = len((folder / "killed" / "steps").read_text().splitlines())
    return {
        "kills": kills,
        "steps": num_steps,
        "steps_taken_again": taken - num_steps,
        "weights": whole["weights"][:16],
        "equal": "bit for bit",
    }


def _run(context: Any, job: tuple[Any, ...]) -> int:
    process = context.Process(target=_train, args=job)
    process.start()
    process.join()
    code = process.exitcode
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a training process failed with {code}")
    return int(code)


def _train(
    name: str, epochs: int, data: Path, folder: Path, kill_at: int | None, delay: float
) -> None:
    """Train in this process, which is killed some seconds after a step if one is given."""
    spec = RunSpec(
        dataset="data", batch_size=32, max_seq_len=16, embedding_dim=16, num_blocks=1,
        max_epochs=epochs, patience=epochs, **{"precision": "fp32", **_SETTINGS[name]},
    )  # fmt: skip
    options = TrainOptions(
        checkpoint_dir=folder / "checkpoints",
        checkpoint_minutes=0.05 / 60,
        on_trained=partial(_write_digest, folder),
    )
    train(spec, load_dataset(data), _Recorder(folder, kill_at, delay), options=options)


def _write_digest(folder: Path, model: Any, result: RunResult) -> None:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    content = {"weights": digest.hexdigest(), "metrics": dict(result.test)}
    (folder / "result.json").write_text(json.dumps(content))


class _Recorder:
    """Writes the loss of every step to a file at once, and dies when it is time."""

    def __init__(self, folder: Path, kill_at: int | None, delay: float) -> None:
        self._file = (folder / "steps").open("a", buffering=1)
        self._kill_at, self._delay = kill_at, delay

    def step(self, record: StepRecord) -> None:
        self._file.write(f"{record.step} {record.loss!r} {record.gradient_norm!r}\n")
        if record.step == self._kill_at:
            threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Keep nothing."""

    def histogram(self, record: HistogramRecord) -> None:
        """Keep nothing."""


def _read(folder: Path) -> dict[str, Any]:
    """Weights, metrics, and each step's loss with all that was ever reported for it."""
    losses: dict[str, set[str]] = {}
    for line in (folder / "steps").read_text().splitlines():
        step, _, values = line.partition(" ")
        losses.setdefault(step, set()).add(values)
    return {**json.loads((folder / "result.json").read_text()), "losses": losses}
