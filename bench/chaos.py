"""`python -m bench chaos --points N --kills K`: nothing lost, nothing run twice.

Launches a grid with the toy trainer, kills drivers and workers at random moments and workers at
named points of their attempts, freezes workers past their lease, takes the database away for a
while (a server crashed or frozen, a SQLite file locked), and goes on until the grid is done; then
holds the database against the invariants below, in SQL, and against the journals that the toy
wrote for itself. Prints no figure when one is broken.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import _faults, measure
from bench._toy_trainer import Behaviour
from db import query
from db.errors import StoreError
from db.planning import RunningAttempt, SweepView
from sweeper.device import process_is_alive
from sweeper.grid import FIRST_SEED

if TYPE_CHECKING:
    from bench.postgres import PostgresServer

INVARIANTS = {
    "a run of the sweep is not final": """
        select r.run_key from runs r where r.status in ('pending', 'running')""",
    "a done run has not exactly one done attempt": """
        select r.run_key from runs r where r.status = 'done' and 1 <> (
          select count(*) from attempts a where a.run_id = r.id and a.status = 'done')""",
    "a run was tried again after its result": """
        select r.run_key from runs r
        join attempts a on a.run_id = r.id and a.status in ('done', 'diverged', 'out_of_memory')
        join attempts later on later.run_id = r.id and later.number > a.number""",
    "steps of a done attempt are missing": """
        select r.run_key from runs r
        join attempts a on a.run_id = r.id and a.status = 'done'
        join run_summary m on m.run_id = r.id
        where m.num_steps <> (select count(*) from steps s where s.attempt_id = a.id)
           or m.num_steps - 1 <> (select max(s.step) from steps s where s.attempt_id = a.id)""",
    "a done run has not exactly one summary": """
        select r.run_key from runs r where r.status = 'done' and 1 <> (
          select count(*) from run_summary m where m.run_id = r.id)""",
    "an attempt still runs": "select run_id from attempts where status = 'running'",
    "an attempt that ended holds a lease": """
        select run_id from attempts where status <> 'running' and status <> 'lost'
        and lease_until is not null""",
}
"""What must never be found -> a query that finds it."""


LOSSES = {
    "lost": "select 1 from runs where status <> 'done'",
    "twice": """
        select run_id from attempts where status = 'done' group by run_id having count(*) > 1""",
    "missing steps": """
        select m.run_id from run_summary m join attempts a on a.id = m.attempt_id
        where m.num_steps <> (
          select count(distinct s.step) from steps s
          where s.attempt_id = a.id and s.step between 0 and m.num_steps - 1)""",
}
"""What the kills may have cost -> a query with one row for each."""
MUST_BE_ZERO = (*LOSSES, "fenced rows")
KINDS = ("driver kills", "worker kills", "freezes")
STEPS = 20
STEP_SECONDS = 0.05
_REFUSED = 2
"""Exit code of a launch that says what must be mended first."""
_MAX_REFUSED = 3
NAMED = 0.25
"""Share of the kills at named points; the others come at random moments."""


def violations(url: str, spool_dir: Path | None = None) -> list[str]:
    """Broken invariants of a finished sweep, one line each."""
    found = []
    for text, sql in INVARIANTS.items():
        rows = query.rows(url, sql)
        if rows:
            found.append(f"{text}: {len(rows)} times")
    if spool_dir is not None and (left := list(spool_dir.glob("*.spool"))):
        found.append(f"{len(left)} spools were never replayed")
    return found


def journal_violations(url: str, journal: Path) -> list[str]:
    """Differences between what the database holds and what was really executed."""
    ended: Counter[int] = Counter()
    for path in journal.iterdir():
        lines = path.read_text().splitlines()
        numbers = [int(line.split()[1]) for line in lines if line.startswith("step")]
        if numbers != list(range(len(numbers))):
            return [f"the journal {path.name} is not in order"]
        ended[int(path.name.partition("-")[0])] += bool(lines) and lines[-1] == "end"
    found = []
    for row in query.rows(url, "select seed from runs where status = 'done'"):
        if not ended[row["seed"]]:
            found.append(f"seed {row['seed']} is done but was never executed to its end")
    return found


class Chaos:
    """A sweep of toy runs and what is done to it.

    Parameters
    ----------
    url : str
        Empty run database.
    folder : Path
        For the grid, the dataset, the journals and the spool.
    points, kills : int
        Runs of the grid; SIGKILLs of workers and drivers and freezes of workers past their lease,
        evenly over the sweep.
    seed : int
        Of the moments and victims.
    """

    def __init__(self, url: str, folder: Path, points: int, kills: int, *, seed: int = 0) -> None:
        self.url, self.folder, self.points = url, folder, points
        num_named = min(points, round(NAMED * kills))
        self.kills = kills - num_named
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._frozen: dict[int, tuple[int, float]] = {}
        self._rows_when_lost: dict[int, int] = {}
        self._outage: tuple[float, float] | None = None
        make_dataset(folder / "data" / "toy")
        self._grid = folder / "chaos.yaml"
        self._grid.write_text(f"sweep: chaos\ndataset: toy\nseeds: {points}\n")
        victims = self._random.sample(range(FIRST_SEED, FIRST_SEED + points), num_named)
        named = zip(victims, itertools.cycle(_faults.POINTS), strict=False)
        self._toy = Behaviour(
            journal=str(folder / "journal"), steps=STEPS, step_seconds=STEP_SECONDS,
            extended_while=str(folder / "away"), faults={str(s): p for s, p in named},
        )  # fmt: skip

    def run(
        self, away: "contextlib.AbstractContextManager[object] | None", away_seconds: float,
        *, limit_seconds: float = 3600,
    ) -> dict[str, float]:  # fmt: skip
        """Launch, kill, launch again until the sweep is final; figures of what happened.

        Parameters
        ----------
        away : context manager, optional
            The database cannot be used inside it; entered once, in mid-sweep.
        away_seconds : float
            How long.
        limit_seconds : float
            Give up after so long.
        """
        began = time.monotonic()
        driver, refused = self._start(), 0
        try:
            while time.monotonic() - began < limit_seconds:
                time.sleep(self._random.uniform(0.2, 0.8))
                self._thaw()
                done = sum(self.counts[kind] for kind in KINDS)
                if driver.poll() is not None:
                    self.counts["launches"] += 1
                    if driver.returncode == 0:
                        break
                    refused = refused + 1 if driver.returncode == _REFUSED else 0
                    if refused == _MAX_REFUSED:
                        log = (self.folder / "driver.log").read_text()
                        raise RuntimeError(f"launches do not start: {log[-500:]}")
                    driver = self._start()
                progress = self._share_done()
                if driver.poll() is None and done < min(self.kills, 1 + self.kills * progress):
                    self._hurt_someone(driver)
                due = self._outage is None and progress >= 0.5
                if due and away is not None and len(self._victims()) > 1:
                    self._take_away(away, away_seconds)
        finally:
            self._thaw(now=True)
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        return {**self.counts, **self._figures(), "seconds": time.monotonic() - began}

    def _take_away(self, away: "contextlib.AbstractContextManager[object]", seconds: float) -> None:
        """Take the database away while the runs under way go on training."""
        file = Path(self._toy.extended_while or "")
        file.touch()
        with away:
            start = time.time()
            time.sleep(seconds)
            self._outage = (start, time.time())
        file.unlink()

    def _start(self) -> "subprocess.Popen[bytes]":
        words = ["--db", self.url, "--data-dir", str(self.folder / "data"), "--retries", "99"]
        command = [sys.executable, "-m", "bench._toy_trainer", str(self._grid), *words]
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--spool-dir", str(self.folder / "spool")],
                env={**os.environ, **self._toy.environment()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _share_done(self) -> float:
        """How far the sweep is, 0 to 1."""
        with contextlib.suppress(StoreError):
            rows = query.rows(self.url, "select count(*) as n from runs where status = 'done'")
            return float(rows[0]["n"]) / self.points
        return 0.0

    def _victims(self) -> list[RunningAttempt]:
        with contextlib.suppress(StoreError):
            running = SweepView(self.url, "chaos").running_attempts()
            return [
                a for a in running
                if a.pid is not None and a.pid not in self._frozen and process_is_alive(a.pid)
            ]  # fmt: skip
        return []

    def _hurt_someone(self, driver: "subprocess.Popen[bytes]") -> None:
        """SIGKILL the driver or a worker, or freeze a worker past its lease."""
        victims = self._victims()
        if not victims:
            return
        victim, chance = self._random.choice(victims), self._random.random()
        assert victim.pid is not None
        with contextlib.suppress(ProcessLookupError):
            if chance < 0.1:
                driver.kill()
                driver.wait()
                self._frozen.clear()  # the workers of a local Ray end with their driver
                self.counts["driver kills"] += 1
            elif chance < 0.3 and not self._frozen:
                os.kill(victim.pid, signal.SIGSTOP)
                self._frozen[victim.pid] = (victim.attempt_id, time.monotonic())
                self.counts["freezes"] += 1
            else:
                os.kill(victim.pid, signal.SIGKILL)
                self.counts["worker kills"] += 1

    def _thaw(self, *, now: bool = False) -> None:
        """Let frozen workers go on once their lease was lost; note what they had written."""
        for pid, (attempt, since) in list(self._frozen.items()):
            rows = query.rows(
                self.url,
                "select a.status, (select count(*) from steps s where s.attempt_id = a.id) as n "
                "from attempts a where a.id = :id",
                {"id": attempt},
            )
            lost = rows[0]["status"] != "running"
            if lost:
                self._rows_when_lost[attempt] = rows[0]["n"]
            if now or (lost and time.monotonic() - since > 1):
                del self._frozen[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _figures(self) -> dict[str, float]:
        """What must be zero, in SQL, and how long a training step was held up."""
        found: dict[str, float] = {name: _count(self.url, sql) for name, sql in LOSSES.items()}
        fenced = 0
        for attempt, rows in self._rows_when_lost.items():
            sql = f"select * from steps where attempt_id = {attempt:d}"
            fenced += _count(self.url, sql) - rows
        found["fenced rows"] = fenced
        found["named kills"] = len(list((self.folder / "faults").glob("*/*")))
        found["executions"] = len(list((self.folder / "journal").iterdir()))
        if self._outage is not None:
            found["away seconds"] = self._outage[1] - self._outage[0]
            found["steps while away"], found["longest step while away"] = self._held_up()
        return found

    def _held_up(self) -> tuple[int, float]:
        """Steps taken while the database was away, and the longest time between two of a run."""
        assert self._outage is not None
        steps, longest = 0, 0.0
        for path in (self.folder / "journal").iterdir():
            times = [float(x.split()[2]) for x in path.read_text().splitlines() if "step" in x]
            inside = [t for t in times if self._outage[0] <= t <= self._outage[1]]
            steps += len(inside)
            longest = max([longest, *(b - a for a, b in itertools.pairwise(inside))])
        return steps, longest


def _count(url: str, sql: str) -> int:
    return int(query.rows(url, f"select count(*) as n from ({sql}) t")[0]["n"])


def make_dataset(folder: Path) -> None:
    """Prepare a dataset that the toy never looks at."""
    from trainer.data.generate import GeneratedSource, GeneratorOptions
    from trainer.data.prepare import prepare

    if not folder.exists():
        options = GeneratorOptions(num_users=120, num_items=60)
        prepare(GeneratedSource(options), folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A SQLite file that another process holds for itself."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        connection.execute("begin exclusive")
        yield
        connection.execute("rollback")
    finally:
        connection.close()


@contextlib.contextmanager
def _crashed(server: "PostgresServer") -> Iterator[None]:
    """A server that crashed; connections to it are refused."""
    server.stop(immediate=True)
    yield
    server.start()


@contextlib.contextmanager
def _frozen(server: "PostgresServer") -> Iterator[None]:
    """A server that takes connections and never answers."""
    assert server.pid is not None
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    os.kill(server.pid, signal.SIGSTOP)  # first, so that it starts no more children
    processes = [server.pid, *map(int, children.read_text().split())]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def main(words: list[str]) -> int:
    """Run the chaos on SQLite and on PostgreSQL."""
    parser = argparse.ArgumentParser(prog="python -m bench chaos", description=__doc__)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--away", type=float, default=60.0, help="seconds without the database")
    parser.add_argument(
        "--frozen", action="store_true", help="PostgreSQL freezes for that time, it does not crash"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--save", action="store_true", help="append to bench/results/chaos.csv")
    asked = parser.parse_args(words)
    rows = []
    for name in ("sqlite", "postgres") if asked.database == "both" else (asked.database,):
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        with _database(name, folder, frozen=asked.frozen) as (url, away):
            chaos = Chaos(url, folder, asked.points, asked.kills, seed=asked.seed)
            figures = chaos.run(away if asked.away else None, asked.away)
            found = violations(url, folder / "spool")
            found += journal_violations(url, folder / "journal")
        found += [f"{name}: {figures[name]:g}" for name in MUST_BE_ZERO if figures.get(name)]
        if found:
            print(f"{name}: BROKEN, see {folder}", *found, sep="\n  ")
            return 1
        rows.append({"database": name, "points": asked.points, **figures})
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v
                          for k, v in rows[-1].items()}), flush=True)  # fmt: skip
        shutil.rmtree(folder)
    print(measure.table(rows))
    if asked.save:
        measure.save("chaos", rows)
    return 0


@contextlib.contextmanager
def _database(
    name: str, folder: Path, *, frozen: bool = False
) -> "Iterator[tuple[str, contextlib.AbstractContextManager[object]]]":
    """An empty database, and a context in which it is away."""
    if name == "sqlite":
        yield f"sqlite:///{folder}/chaos.db", _locked(folder / "chaos.db")
        return
    from bench.postgres import temporary_server

    with temporary_server() as server:
        yield server.url(), (_frozen if frozen else _crashed)(server)
