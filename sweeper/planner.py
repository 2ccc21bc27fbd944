"""The planner of a sweep: the database says what is left, Ray Tune carries it out, repeat.

It keeps no state of its own. Killed at any moment and started again by the same line, it finds in
the database what is final, what is lost and what was never tried; a second one beside it shares
the work.
"""

import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from db.connect import sqlite_path
from db.errors import LaunchError, StoreError
from db.planning import SweepView, end_attempts
from db.spec import AttemptStatus, RunSpec, RunStatus
from db.store import PlannedRun, RunStore
from sweeper.agenda import Agenda, Candidate, Site
from sweeper.datasets import dataset_record
from sweeper.device import (
    kernel_memory_kills,
    process_is_alive,
    process_space,
)
from sweeper.feasibility import dominated
from sweeper.forecast import MemoryForecaster
from sweeper.grid import Grid, Resources
from sweeper.interrupt import Interruption, Signals
from sweeper.launch_options import LaunchOptions, Outcome, default_spool_dir
from sweeper.monitor import Monitor
from sweeper.parcels import Parcel
from sweeper.plan import (
    CUT_SHORT,
    History,
    predicted_cost,
    reason_to_give_up,
    summarise,
)
from sweeper.progress import Display, RateClock, Snapshot, describe
from sweeper.session import Session
from sweeper.site import measured_runs, shapes_of
from sweeper.worker import WorkerSettings

_KILLED_FOR_MEMORY = "its process is gone, and the kernel killed for want of host memory meanwhile"
_SHOWN_ERRORS = 3
_IDLE_ROUNDS = 3
"""Rounds in which no run could even be claimed before the launch gives up."""


class Planner:
    """One launch of a sweep: everything that it looks up, and nothing that it must remember."""

    def __init__(
        self,
        grid: Grid,
        options: LaunchOptions,
        resources: Resources,
        site: Site,
        datasets: Mapping[str, Any],
        display: Display,
        parcels: Mapping[str, Parcel] | None = None,
    ) -> None:
        self._grid, self._options, self._display = grid, options, display
        self._parcels = dict(parcels or {})
        self._resources, self._site = resources, site
        self._candidates = _planned(grid.points, datasets, "cuda" if resources.gpus else "cpu")
        self._planned = self._candidates if grid.search is None else {}
        self._costs = {
            key: predicted_cost(run.spec, datasets[run.spec.dataset].num_items)
            for key, run in self._candidates.items()
        }
        self._clock = RateClock(self._costs)
        self._varying = _varying_fields(grid.points)
        self._drain = False
        self._interrupted = False
        self._store = RunStore.open(options.database)
        self._view = SweepView(options.database, grid.name)
        self._record(datasets)
        self._settings = self._worker_settings(datasets)
        self._agenda = Agenda(site, resources, max_concurrent=options.max_concurrent)
        self._shapes = shapes_of(datasets) if site.groups else {}
        self._fingerprints = {name: dataset.fingerprint for name, dataset in datasets.items()}
        self._num_learnt = -1
        self._refilled_at = 0.0
        self._refreshing = threading.Lock()

    def _worker_settings(self, datasets: Mapping[str, Any]) -> WorkerSettings:
        options = self._options
        spool_dir = options.spool_dir or default_spool_dir(options.database)
        return WorkerSettings(
            database=_absolute(options.database),
            sweep=self._grid.name,
            datasets={n: (str(d.path.resolve()), d.fingerprint) for n, d in datasets.items()},
            parcels=self._parcels,
            launch_id=secrets.token_hex(8),
            spool_dir=str(spool_dir.resolve()),
            last_event=self._view.last_event(),
            lease_seconds=options.lease_seconds,
            time_limit_seconds=self._resources.time_limit_seconds,
            stall_seconds=options.stall_seconds,
            step_rows_every=options.step_rows_every,
            early_stopping=self._grid.early_stopping if options.early_stopping else None,
            longest_epochs=max(spec.max_epochs for spec in self._grid.points),
            trainer=options.trainer,
        )

    def _record(self, datasets: Mapping[str, Any]) -> None:
        for dataset in datasets.values():
            self._store.put_dataset(dataset_record(dataset))
        self._store.put_sweep(self._grid.name, self._grid.text, list(self._planned.values()))
        if self._grid.search is not None:
            asked = self._view.statuses()
            self._planned = {k: run for k, run in self._candidates.items() if k in asked}
        again = [RunStatus.FAILED] if self._options.retry_failed else []
        if self._options.retry_out_of_memory:
            again += [RunStatus.OUT_OF_MEMORY, RunStatus.SKIPPED]
        for key, status in self._statuses().items():
            if status in again:
                self._store.reset(key)

    def unfinished(self) -> bool:
        """Whether any run is not final."""
        open_runs = {key for key, status in self._statuses().items() if not status.is_final}
        return bool(open_runs - self._cut_short()) or self._ask()

    def outcome(self, **how: Any) -> Outcome:
        """State of the sweep now."""
        return Outcome(self._snapshot(), **how)

    def carry_out(self, session: Session, signals: Signals) -> Outcome:
        """Plan and run rounds until nothing is pending and nothing lives.

        Raises
        ------
        Interruption
            A signal has come; `give_back` is due again when Ray has ended.
        """
        watch = Monitor(self._look_after, self._options.poll_seconds, self._display.note)
        with self._giving_back(), watch:
            self._rounds(session, signals)
        return self.outcome(drained=self._drain)

    def give_back(self, interruption: Interruption) -> None:
        """Give the runs of this launch free and say how to go on.

        Called as soon as the signal is seen, for Ray takes its time and a second Ctrl-C may end
        this process; and again once Ray has ended, for a worker may claim a run until then.
        """
        if not self._interrupted:
            self._display.note(f"stopping on {interruption}; the same line resumes the sweep")
        self._interrupted = True
        own = [
            attempt.attempt_id
            for attempt in self._view.running_attempts()
            if attempt.versions.get("launch") == self._settings.launch_id
        ]
        end_attempts(self._options.database, own, AttemptStatus.CANCELLED, f"{interruption}")

    @contextlib.contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Give the runs back where a signal is seen."""
        try:
            yield
        except Interruption as interruption:
            with contextlib.suppress(StoreError):  # it is tried again once Ray has ended
                self.give_back(interruption)
            raise

    def _rounds(self, session: Session, signals: Signals) -> None:
        idle, away_since = 0, None
        while True:
            signals.check()
            try:
                before = self._num_attempts()
                self._agenda.reopen()
                self._refresh()
                if not self._agenda.waiting or self._drain:
                    if self._drain or not self._more_may_come():
                        return
                    signals.sleep(self._options.poll_seconds)
                    continue
                errors = self._round(session, signals)
                idle = 0 if self._num_attempts() > before else idle + 1
                away_since = None
                for error in dict.fromkeys(errors[:_SHOWN_ERRORS]):
                    self._display.note(f"a worker ended without an answer: {error}")
            except StoreError:
                # the monitor has told the user; workers write to their spools meanwhile
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > self._options.away_seconds:
                    raise
                signals.sleep(self._options.poll_seconds)
                continue
            if errors and idle >= _IDLE_ROUNDS:
                raise LaunchError(f"no worker can start a run: {errors[0]}")

    def _more_may_come(self) -> bool:
        """Whether a sweep with nothing waiting goes on: another launch's run may come free."""
        if self._running() or self._ask():
            return True
        self._refresh()  # it may have come free since the statuses were read
        return bool(self._agenda.waiting)

    def _round(self, session: Session, signals: Signals) -> list[str]:
        """Let Ray Tune carry out what there is; what its trials raised."""
        from sweeper.tuning import Round, run_round

        def check() -> None:
            with self._giving_back():
                signals.check()

        now = Round(self._agenda, self._take, check, self._refill)
        # leftovers in GPU memory would falsify the next run's figures
        reuse = self._options.reuse_workers and not self._resources.gpus
        try:
            return run_round(now, self._settings, session.folder, reuse=reuse)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._display.note(f"Ray Tune ended its round early: {' '.join(text.split())}")
            return [text]

    def _refill(self) -> bool:
        """Look for more to start; False when the database is away, or it is too soon."""
        if time.monotonic() - self._refilled_at < min(0.5, self._options.poll_seconds):
            return False
        self._refilled_at = time.monotonic()
        try:
            self._refresh()
        except StoreError:
            return False
        return True

    def _refresh(self) -> None:
        """Bring the agenda up to date: what is pending now, and what is known of its memory."""
        with self._refreshing:
            self._free_orphans()
            mark = self._agenda.mark()
            if self._options.prune:
                self._prune()
            statuses = self._statuses()
            self._learn(statuses)
            self._agenda.offer(self._pending(statuses), mark)

    def _learn(self, statuses: Mapping[str, RunStatus]) -> None:
        """Predict memory from all finished runs again, once there are a tenth more of them."""
        done = sum(status is RunStatus.DONE for status in statuses.values())
        enough = max(1.1 * self._num_learnt, self._num_learnt + 3)
        if not self._site.groups or (self._num_learnt >= 0 and done < enough):
            return
        self._num_learnt = done
        measured = measured_runs(self._options.database, self._fingerprints)
        self._agenda.learn(MemoryForecaster(self._shapes, measured))

    def _ask(self) -> bool:
        """Let a search choose its next runs; whether it did."""
        if self._grid.search is None:
            return False
        from sweeper.search.rounds import next_round

        candidates = {key: run.spec for key, run in self._candidates.items()}
        fingerprint = next(iter(self._candidates.values())).fingerprint
        keys = next_round(
            self._options.database, self._grid.name, self._grid.search, candidates, fingerprint
        )
        chosen = {key: self._candidates[key] for key in keys}
        self._store.put_sweep(self._grid.name, self._grid.text, list(chosen.values()))
        self._planned = self._planned | chosen
        return bool(chosen)

    def _pending(self, statuses: Mapping[str, RunStatus]) -> list[Candidate]:
        """Runs to try; those beyond their retries are closed."""
        failures = summarise(self._view.failures(self._settings.launch_id))
        cut = self._cut_short()
        candidates = []
        for key, status in statuses.items():
            if status is not RunStatus.PENDING or key in cut:
                continue
            history = failures.get(key, History())
            reason = reason_to_give_up(history, self._options.retries)
            if reason is not None:
                self._close(key, reason)
                continue
            spec, whole = self._planned[key].spec, history.shared_out_of_memory > 0
            candidates.append(Candidate(key, spec, self._costs[key], whole))
        return candidates

    def _cut_short(self) -> set[str]:
        """Pending runs of this grid that a scheduler cut, which a launch without one tries."""
        if self._settings.early_stopping is None:
            return set()
        return self._view.cancelled_as(CUT_SHORT) & self._planned.keys()

    def _close(self, key: str, reason: str) -> None:
        with contextlib.suppress(StoreError):  # another launch may have been faster
            self._store.give_up(key, RunStatus.FAILED, reason)
        self._display.finished(self._name(key), {"outcome": "failed", "error": reason})

    def _free_orphans(self) -> None:
        """End attempts whose worker is gone, after their last rows were brought in."""
        if self._interrupted:
            return  # Ray ends the workers: they are not lost
        self._store.replay_spools(self._settings.spool_dir)
        here, kills = process_space(), str(kernel_memory_kills())
        dead: dict[str, list[int]] = {}
        for attempt in self._view.running_attempts():
            ours = attempt.versions.get("process_space") == here and attempt.pid is not None
            if not ours or process_is_alive(attempt.pid or 0):
                continue
            before = attempt.versions.get("kernel_memory_kills", kills)
            reason = "its process is gone" if before == kills else _KILLED_FOR_MEMORY
            dead.setdefault(reason, []).append(attempt.attempt_id)
        for reason, attempts in dead.items():
            end_attempts(self._options.database, attempts, AttemptStatus.LOST, reason)
        self._store.expire_leases()

    def _look_after(self) -> None:
        """Called every few seconds beside Ray Tune."""
        if not self._drain and self._view.stop_requested(self._settings.last_event):
            self._drain = True
            self._agenda.close()
            self._display.note("asked to stop: running runs finish, no more are started")
        self._refresh()
        self._display.update(self._snapshot())

    def _prune(self) -> None:
        by_status: dict[RunStatus, list[tuple[str, RunSpec]]] = {}
        for key, status in self._statuses().items():
            by_status.setdefault(status, []).append((key, self._planned[key].spec))
        proofs = by_status.get(RunStatus.OUT_OF_MEMORY, [])
        if proofs:
            devices = self._view.out_of_memory_devices()
            proofs = [proof for proof in proofs if self._holds_here(devices.get(proof[0]))]
        for key, proof in dominated(by_status.get(RunStatus.PENDING, []), proofs).items():
            reason = f"needs at least the memory of {self._name(proof)}, which did not fit"
            with contextlib.suppress(StoreError):  # a worker may have claimed it meanwhile
                self._store.give_up(key, RunStatus.SKIPPED, reason, proven_by=proof)
                self._display.finished(self._name(key), {"outcome": "skipped", "error": reason})

    def _holds_here(self, device: tuple[str, int | None] | None) -> bool:
        """Whether out of memory on a device says something about the devices of this launch."""
        largest = self._site.largest_memory_bytes
        return largest is None or device is None or (device[1] or largest) >= largest

    def _take(self, result: dict[str, Any]) -> None:
        key, outcome = str(result.get("key")), result.get("outcome")
        self._clock.finished(key)
        if outcome not in ("elsewhere", None):
            self._display.finished(self._name(key), result)

    def _statuses(self) -> dict[str, RunStatus]:
        """Status of each point of this grid; the sweep may hold others from earlier grids."""
        planned = self._planned  # before the statuses: a search adds to both in another thread
        statuses = self._view.statuses()
        return {key: statuses[key] for key in planned}

    def _running(self) -> bool:
        return RunStatus.RUNNING in self._statuses().values()

    def _snapshot(self) -> Snapshot:
        counts = Counter(status.value for status in self._statuses().values())
        remaining = self._clock.remaining_seconds(self._agenda.unfinished)
        best = self._view.best("ndcg_at_10")
        return Snapshot(counts, best, remaining, len(self._cut_short()))

    def _num_attempts(self) -> int:
        return self._view.num_attempts(self._settings.launch_id)

    def _name(self, key: str) -> str:
        return describe(self._planned[key].spec, self._varying)


def _planned(
    points: Sequence[RunSpec], datasets: Mapping[str, Any], device_type: str
) -> dict[str, PlannedRun]:
    runs = (
        PlannedRun(
            spec=point.resolved(device_type), fingerprint=datasets[point.dataset].fingerprint
        )
        for point in points
    )
    return {run.key: run for run in runs}


def _varying_fields(points: Sequence[RunSpec]) -> tuple[str, ...]:
    """Fields that differ between points, the loss first."""
    first = points[0].to_dict()
    names = [n for n in first if any(getattr(p, n) != first[n] for p in points)]
    return tuple(sorted(names, key=lambda name: name != "loss"))


def _absolute(database: str) -> str:
    """The URL as a worker in any folder understands it."""
    path = sqlite_path(database)
    return database if path is None else f"sqlite:///{path.resolve()}"
