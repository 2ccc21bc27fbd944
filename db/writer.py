"""RunWriter: takes the rows of one attempt from training and brings them into the database.

Training never waits for the database. A background thread takes what has gathered about every
second and writes it in one transaction: fence, rows, heartbeat. While the database is away,
locked or full the rows go to a spool on local disk and are written when it is back.
"""

import logging
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from db import leases
from db.connect import DRIVER_ERRORS, explained, write_engine
from db.errors import LostLeaseError, StoreError
from db.leases import Claim
from db.measures import EvaluationRecord, HistogramRecord, RunResult, StepRecord
from db.rows import Batch, evaluation_row, histogram_row, insert_batch, step_row
from db.spec import AttemptStatus
from db.spool import Spool

log = logging.getLogger(__name__)

CHUNK_ROWS = 10_000
"""Most step rows of one transaction, so that writers of one SQLite file take turns."""
BUSY_SECONDS = 5.0
"""How long a flush waits for another writer of a SQLite file before it spools."""
IDLE_SECONDS = 10.0
"""After so long without rows a SQLite file is closed; a server's connection is given back after
every flush, so that more workers than it admits can take turns."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0

DATABASE_ERRORS: tuple[type[Exception], ...] = (*DRIVER_ERRORS, OSError)


class RunWriter:
    """Recorder of one attempt; a context manager, as which it ends what its body left open.

    Leaving the body by an exception ends the attempt as `error`, by KeyboardInterrupt or
    SystemExit as `cancelled`; a body that neither finishes nor raises leaves it running until
    its lease is lost.

    Parameters
    ----------
    url : str
        Run database.
    held : Claim
        The attempt to write for.
    spool_dir : pathlib.Path
        Folder on local disk for rows that cannot be written yet.
    flush_seconds : float
        Pause between flushes.
    patience_seconds : float
        How long the end of the attempt waits for a database that is away before it is spooled.
    """

    def __init__(
        self,
        url: str,
        held: Claim,
        *,
        spool_dir: Path,
        flush_seconds: float = 1.0,
        patience_seconds: float = 60.0,
    ) -> None:
        self.claim = held
        self._url = url
        self._engine = write_engine(url, busy_seconds=BUSY_SECONDS)
        self._connection: Connection | None = None
        self._spool = Spool(Path(spool_dir), held)
        self._flush_seconds = flush_seconds
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._buffer = Batch()
        self._pending = Batch()
        self._failure: Exception | None = None
        self._ended = False
        self._closing = False
        self._pause = 0.0
        self._retry_at = 0.0
        self._written_at = self._used_at = time.monotonic()
        self._wake = threading.Event()
        self._flushed = threading.Condition()
        self._num_cycles = 0
        self._thread = threading.Thread(target=self._run, name="srsweep-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            if error is not None and not self._ended and not isinstance(error, LostLeaseError):
                self._end_after(error)
        except StoreError as failure:
            log.warning("attempt %d: %s", self.claim.attempt_id, failure)
        finally:
            self.close()

    def step(self, record: StepRecord) -> None:
        """Take one step row; returns at once.

        Raises
        ------
        LostLeaseError
            The attempt is no longer this worker's; training must stop.
        StoreError
            The writer has ended.
        """
        self._check()
        row = step_row(record)
        with self._lock:
            self._buffer.steps.append(row)
            full = len(self._buffer.steps) >= CHUNK_ROWS
        if full:
            self._wake.set()

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Take all rows of one evaluation and have them written soon.

        Raises
        ------
        LostLeaseError, StoreError
            As in `step`.
        """
        self._check()
        rows = [evaluation_row(record) for record in records]
        with self._lock:
            self._buffer.evaluations += rows
        self._wake.set()

    def histogram(self, record: HistogramRecord) -> None:
        """Take one histogram.

        Raises
        ------
        LostLeaseError, StoreError
            As in `step`.
        """
        self._check()
        row = histogram_row(record)
        with self._lock:
            self._buffer.histograms.append(row)

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything taken so far is in the database or on the spool.

        Returns
        -------
        bool
            Whether all of it is in the database.

        Raises
        ------
        LostLeaseError, StoreError
            As in `step`.
        """
        self._check()
        with self._flushed:
            # the cycle under way may have begun before the last rows came
            target = self._num_cycles + 2
            while self._num_cycles < target and self._thread.is_alive():
                self._wake.set()
                if not self._flushed.wait(timeout):
                    break
        self._check()
        return not self._spool and not self._pending and not self._buffer

    def finish(self, result: RunResult) -> bool:
        """Write the last rows, the run's summary and the statuses in one transaction.

        Returns
        -------
        bool
            True when it is in the database, False when it waits in the spool for a replay.

        Raises
        ------
        LostLeaseError
            The attempt is no longer this worker's; nothing was written.
        StoreError
            The writer has ended, or the result names a metric that is no column.
        """
        leases.summary_values(result)
        return self._end(
            "finish",
            {"result": leases.result_to_dict(result)},
            AttemptStatus(result.status.value),
            lambda connection: leases.finish(connection, self.claim, result),
        )

    def fail(self, error_class: str, message: str) -> bool:
        """End the attempt as `error`; returns and raises as `finish`."""
        text = leases.clip(message)
        return self._end(
            "fail",
            {"error_class": error_class, "message": text},
            AttemptStatus.ERROR,
            lambda connection: leases.end(
                connection, self.claim, AttemptStatus.ERROR, error_class, text
            ),
        )

    def cancel(
        self, message: str = "stopped by the user", *, error_class: str = "cancelled"
    ) -> bool:
        """End the attempt as `cancelled`; returns and raises as `finish`."""
        return self._end(
            "cancel",
            {"message": message, "error_class": error_class},
            AttemptStatus.CANCELLED,
            lambda connection: leases.end(
                connection, self.claim, AttemptStatus.CANCELLED, error_class, message
            ),
        )

    def close(self) -> None:
        """Stop the thread after a last flush and give back connection and spool."""
        self._stop_thread()
        self._disconnect()
        self._spool.close()
        self._engine.dispose()

    def _end_after(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self.cancel(f"{type(error).__name__} in the worker")
        else:
            self.fail(type(error).__name__, str(error))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._ended or self._closing:
            raise StoreError(f"attempt {self.claim.attempt_id} has ended; nothing can be added")

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            try:
                self._cycle()
            except LostLeaseError as error:
                self._failure = error
                self._spool.fenced()
            except Exception as error:
                log.exception("attempt %d: the writer failed", self.claim.attempt_id)
                self._failure = error
            with self._flushed:
                self._num_cycles += 1
                self._flushed.notify_all()
            if self._failure is not None:
                return

    def _cycle(self) -> None:
        self._take()
        now = time.monotonic()
        heartbeat_due = now - self._written_at > self.claim.lease_seconds / 4
        if now < self._retry_at:
            self._to_spool()
        elif self._pending or self._spool or heartbeat_due:
            self._used_at = now if self._pending else self._used_at
            try:
                self._write_out()
            except DATABASE_ERRORS as error:
                self._away(error)
            if self._engine.dialect.name != "sqlite":
                self._disconnect()
        elif now - self._used_at > IDLE_SECONDS:
            self._disconnect()

    def _take(self) -> None:
        with self._lock:
            taken, self._buffer = self._buffer, Batch()
        self._pending.steps += taken.steps
        self._pending.evaluations += taken.evaluations
        self._pending.histograms += taken.histograms

    def _write_out(self) -> None:
        """Bring the spool, then the pending rows into the database; a heartbeat if none."""
        for batch in self._spool.batches():
            self._transact(batch, fresh=False)
        self._spool.discard()
        while True:
            steps = self._pending.steps
            batch = Batch(steps[:CHUNK_ROWS], self._pending.evaluations, self._pending.histograms)
            self._transact(batch, fresh=True)
            self._pending = Batch(steps[CHUNK_ROWS:])
            if not self._pending:
                break
        self._pause = self._retry_at = 0.0
        self._written_at = time.monotonic()

    def _transact(
        self, batch: Batch, *, fresh: bool, then: Callable[[Connection], None] | None = None
    ) -> None:
        """One transaction: fence with heartbeat, rows, and what ends the attempt."""
        try:
            connection = self._connect()
            with connection.begin():
                if then is not None:
                    leases.lock_run(connection, self.claim.run_key)
                leases.fence(connection, self.claim, batch.last_step())
                insert_batch(connection, self.claim.attempt_id, batch, fresh=fresh)
                if then is not None:
                    then(connection)
        except DATABASE_ERRORS as error:
            self._disconnect()
            if fresh and _is_repeat(error):
                # an earlier transaction was committed though its answer never came
                self._transact(batch, fresh=False, then=then)
                return
            raise

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                connection.invalidate()
                connection.close()
            except DATABASE_ERRORS:
                log.debug("closing a broken connection", exc_info=True)

    def _away(self, error: BaseException) -> None:
        if not self._retry_at:
            log.warning(
                "attempt %d: %s; its rows wait in %s until the database is back",
                self.claim.attempt_id,
                explained(self._url, error),
                self._spool.path.name,
            )
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._retry_at = time.monotonic() + self._pause
        self._to_spool()

    def _to_spool(self) -> None:
        if not self._pending:
            return
        try:
            self._spool.append(self._pending)
        except OSError as error:
            log.warning(
                "attempt %d: the spool %s cannot be written (%s); rows stay in memory",
                self.claim.attempt_id,
                self._spool.path.name,
                error.strerror,
            )
        else:
            self._pending = Batch()

    def _stop_thread(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._failure is None and not self._ended:
            self._retry_at = 0.0
            try:
                self._cycle()
            except LostLeaseError as error:
                self._failure = error
                self._spool.fenced()

    def _end(
        self,
        kind: str,
        content: Mapping[str, Any],
        status: AttemptStatus,
        then: Callable[[Connection], None],
    ) -> bool:
        self._check()
        self._ended = self._closing = True
        self._wake.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._take()
        try:
            return self._write_end(kind, content, status, then)
        except LostLeaseError as error:
            self._failure = error
            self._spool.fenced()
            raise

    def _write_end(
        self,
        kind: str,
        content: Mapping[str, Any],
        status: AttemptStatus,
        then: Callable[[Connection], None],
    ) -> bool:
        deadline = time.monotonic() + self._patience_seconds
        doubtful = False
        while True:
            try:
                self._commit_end(status, then, doubtful=doubtful)
            except DATABASE_ERRORS as error:
                self._away(error)
                doubtful = True
                if time.monotonic() >= deadline:
                    return self._spool_end(kind, content)
                time.sleep(min(self._pause, max(0.0, deadline - time.monotonic())))
            else:
                self._pending = Batch()
                self._spool.discard()
                return True

    def _commit_end(
        self, status: AttemptStatus, then: Callable[[Connection], None], *, doubtful: bool
    ) -> None:
        try:
            for batch in self._spool.batches():
                self._transact(batch, fresh=False)
            while len(self._pending.steps) > CHUNK_ROWS:
                self._transact(Batch(self._pending.steps[:CHUNK_ROWS]), fresh=True)
                del self._pending.steps[:CHUNK_ROWS]
            self._transact(self._pending, fresh=True, then=then)
        except LostLeaseError:
            # an earlier try may have been committed though its answer never came
            if not doubtful or not self._has_ended(status):
                raise

    def _has_ended(self, status: AttemptStatus) -> bool:
        connection = self._connect()
        with connection.begin():
            return leases.has_ended(connection, self.claim, status)

    def _spool_end(self, kind: str, content: Mapping[str, Any]) -> bool:
        try:
            if self._pending:
                self._spool.append(self._pending)
            self._spool.append_end(kind, content)
        except OSError as error:
            raise StoreError(
                f"attempt {self.claim.attempt_id} ended, but neither the database nor the spool "
                f"{self._spool.path.name} can be written ({error.strerror}); make room and repeat"
            ) from None
        return False


def _is_repeat(error: BaseException) -> bool:
    if isinstance(error, IntegrityError):
        return True
    return getattr(error, "sqlstate", None) == "23505"
