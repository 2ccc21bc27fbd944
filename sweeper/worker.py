"""One run in a worker process: claim it, train, write every row, say how it ended.

Knows no Ray. The database decides who may run what; a worker that lost its claim stops by itself.
"""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.errors import DataError, LostLeaseError, SchemaVersionError, StoreError
from db.measures import EvaluationRecord, HistogramRecord, RunResult, StepRecord
from db.planning import SweepView
from db.spec import RunStatus
from db.store import Claim, RunStore, WorkerInfo
from db.writer import RunWriter
from sweeper.device import (
    device_class,
    git_commit,
    host_name,
    kernel_memory_kills,
    package_versions,
    process_space,
)
from sweeper.early_stopping import CutShort, EarlyStopping, Report
from sweeper.parcels import Parcel, is_here, receive
from sweeper.plan import CONTEXT_BYTES, CUT_SHORT, SHARED_OUT_OF_MEMORY, Slot
from sweeper.watchdog import Watchdog


class TimeLimitExceeded(Exception):
    """A run took longer than the limit of its sweep."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every worker of a launch needs to know; never stored, it holds the database URL."""

    database: str = field(repr=False)
    sweep: str
    datasets: dict[str, tuple[str, str]]
    """Folder and fingerprint of each dataset by name."""
    parcels: dict[str, Parcel] = field(default_factory=dict)
    """Datasets that the driver sends to nodes without that folder, by name."""
    launch_id: str
    """Tells the attempts of one launch from those of others."""
    spool_dir: str
    last_event: int = 0
    """Requests to stop count when they are newer than this event."""
    lease_seconds: float = 60.0
    time_limit_seconds: float | None = None
    stall_seconds: float | None = None
    """A run that reports nothing for so long is ended."""
    patience_seconds: float = 600.0
    """How long a worker waits for a database that is away before it gives its run back."""
    step_rows_every: int = 1
    checkpoint_minutes: float = 10.0
    """Time between checkpoints, from which a later attempt on the same host goes on."""
    early_stopping: EarlyStopping | None = None
    """What may cut runs short."""
    longest_epochs: int = 1
    """Epochs of the longest run of the sweep."""
    trainer: str = "trainer.loop:train"
    """`module:function` with the signature of `trainer.loop.train`."""


def execute(
    key: str, settings: WorkerSettings, slot: Slot, report: Report | None = None
) -> dict[str, Any]:
    """Claim a run, train it and write how it ended.

    Parameters
    ----------
    key : str
        Key of the run.
    settings : WorkerSettings
        Where things are.
    slot : Slot
        What this worker may use.
    report : callable, optional
        Told of evaluations before the last epoch; what it raises ends the run.

    Returns
    -------
    dict
        `outcome` (a run status, or `elsewhere`, `lost`, `error`, `cut`) and figures for the
        display.
    """
    began = time.monotonic()
    _limit_resources(slot)
    found = _claim(key, settings, slot)
    if found is None:
        return {"key": key, "outcome": "elsewhere"}
    store, claim = found
    try:
        with store.writer(claim, spool_dir=Path(settings.spool_dir)) as writer:
            outcome = _Execution(store, claim, writer, settings, slot, report).run()
    except LostLeaseError:
        outcome = {"outcome": "lost"}
    return {"key": key, **outcome, "seconds": time.monotonic() - began}


def _claim(key: str, settings: WorkerSettings, slot: Slot) -> tuple[RunStore, Claim] | None:
    """Claim a run, waiting for a database that is away; None when it is not to be run here."""
    worker = describe_worker(settings, slot)
    deadline = time.monotonic() + settings.patience_seconds
    pause = 0.25
    while True:
        try:
            store = _open_store(settings.database)
            view = SweepView(settings.database, settings.sweep)
            if view.stop_requested(settings.last_event):
                return None
            claim = store.claim(key, worker, lease_seconds=settings.lease_seconds)
        except SchemaVersionError:
            raise
        except StoreError:
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
        else:
            return None if claim is None else (store, claim)


def describe_worker(settings: WorkerSettings, slot: Slot) -> WorkerInfo:
    """Describe this process for the attempt's row."""
    name, memory = device_class(slot.device)
    return WorkerInfo(
        host=host_name(),
        pid=os.getpid(),
        device_class=name,
        device_memory_bytes=memory,
        timing=slot.timing,
        versions=package_versions()
        | {
            "launch": settings.launch_id,
            "process_space": process_space(),
            "kernel_memory_kills": str(kernel_memory_kills()),
        },
        git_commit=git_commit(),
    )


class _StaleCheckpoint(Exception):
    """Training resumed at a step whose earlier rows the database does not have."""


class _Execution:
    """One attempt: training between its claim and its end."""

    def __init__(
        self,
        store: RunStore,
        claim: Claim,
        writer: RunWriter,
        settings: WorkerSettings,
        slot: Slot,
        report: Report | None = None,
    ) -> None:
        self._store, self._claim, self._writer = store, claim, writer
        self._settings, self._slot, self._report = settings, slot, report
        self._checkpoints = Path(settings.spool_dir) / "checkpoints" / claim.run_key[:32]

    def run(self) -> dict[str, Any]:
        """Train and end the attempt; what it amounts to, for the display."""
        try:
            result = self._train()
        except LostLeaseError:
            raise
        except CutShort as cut:
            self._writer.cancel(str(cut), error_class=CUT_SHORT)
            return {"outcome": "cut", "error": str(cut)}
        except (KeyboardInterrupt, SystemExit):
            with suppress(LostLeaseError):
                self._writer.cancel()
            raise
        except Exception as error:
            return self._fail(type(error).__name__, " ".join(str(error).split())[:2000])
        if result.status is RunStatus.OUT_OF_MEMORY and not self._slot.decides:
            return self._fail(SHARED_OUT_OF_MEMORY, result.error or "out of memory")
        self._writer.finish(result)
        return {"outcome": result.status.value, "ndcg_at_10": result.test.get("ndcg_at_10")}

    def _fail(self, error_class: str, message: str) -> dict[str, Any]:
        self._writer.fail(error_class, message)
        return {"outcome": "error", "error": f"{error_class}: {message}"}

    def _train(self) -> RunResult:
        from trainer.loop import TrainOptions

        settings = self._settings
        dataset = _open_dataset(self._claim.spec.dataset, settings)
        options = TrainOptions(
            step_rows_every=settings.step_rows_every,
            checkpoint_dir=self._checkpoints,
            checkpoint_minutes=settings.checkpoint_minutes,
        )
        train = _load_trainer(settings.trainer)
        watchdog = Watchdog(
            self._writer.fail,
            stall_seconds=settings.stall_seconds,
            limit_seconds=settings.time_limit_seconds,
        )
        spec, device = self._claim.spec, self._slot.device
        with watchdog:
            recorder = _Watched(
                self._writer, settings.time_limit_seconds, self._resumed, watchdog, self._reported
            )
            try:
                return train(spec, dataset, recorder, device, options=options)
            except _StaleCheckpoint:
                shutil.rmtree(self._checkpoints)
                return train(spec, dataset, recorder, device, options=options)

    def _reported(self, records: Sequence[EvaluationRecord]) -> None:
        """Have the scheduler judge a run; one in its last epoch is as good as done."""
        last = records and records[0].epoch >= self._claim.spec.max_epochs
        if self._report is not None and not last:
            self._report(records)

    def _resumed(self, step: int) -> None:
        """Take over the rows of the attempt before, below the step at which training goes on."""
        rows = self._store.inherit_steps(self._claim, step)
        if rows < -(-step // self._settings.step_rows_every):
            raise _StaleCheckpoint


class _Watched:
    """A recorder that notices where training resumed, and ends a run that takes too long."""

    def __init__(
        self,
        writer: RunWriter,
        limit_seconds: float | None,
        resumed: Callable[[int], None],
        watchdog: Watchdog,
        report: Report,
    ) -> None:
        self._writer = writer
        self._report = report
        self._limit = limit_seconds
        self._resumed = resumed
        self._watchdog = watchdog
        self._is_first = True
        self._began = time.monotonic()

    def step(self, record: StepRecord) -> None:
        if self._is_first and record.step >= 1:
            self._resumed(record.step)
        self._is_first = False
        self._watchdog.progress()
        self._writer.step(record)
        self._report(())
        if self._limit is not None and time.monotonic() - self._began > self._limit:
            raise TimeLimitExceeded(
                f"stopped after step {record.step}: the run took longer than "
                f"time_limit_seconds={self._limit:g}"
            )

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        self._watchdog.progress()
        self._writer.evaluation(records)
        self._report(records)

    def histogram(self, record: HistogramRecord) -> None:
        self._writer.histogram(record)


_stores: dict[str, RunStore] = {}


def _open_store(url: str) -> RunStore:
    """Store of this process; a reused worker keeps its connection pool."""
    if url not in _stores:
        _stores[url] = RunStore.open(url)
    return _stores[url]


def _open_dataset(name: str, settings: WorkerSettings) -> Any:
    from trainer.data.dataset import load_dataset

    path, fingerprint = settings.datasets[name]
    parcel = settings.parcels.get(name)
    if parcel is not None and not is_here(path, fingerprint):
        path = str(receive(parcel))
    dataset = load_dataset(path)
    if dataset.fingerprint != fingerprint:
        raise DataError(
            f"dataset {name!r} at {path} on {host_name()} has fingerprint "
            f"{dataset.fingerprint[:12]}, the sweep was planned for {fingerprint[:12]}; "
            "copy the same prepared folder to every node, or launch with --send-datasets"
        )
    return dataset


def _load_trainer(name: str) -> Callable[..., RunResult]:
    module, _, function = name.partition(":")
    found: Callable[..., RunResult] = getattr(importlib.import_module(module), function)
    return found


def _limit_resources(slot: Slot) -> None:
    """Keep to the slot: threads of the CPU, and the share of a GPU's memory.

    Ray only counts shares. With a limit, a run that needs more than was predicted runs out of its
    own share and is tried on a whole GPU, in place of pushing its neighbors out of theirs.
    """
    import torch

    torch.set_num_threads(max(1, int(slot.cpus)))
    if 0 < slot.gpus < 1 and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.01, slot.gpus - CONTEXT_BYTES / total))
