"""`python -m bench chaos --points N --kills K`: nothing lost, nothing run twice.

Launches a grid with the toy trainer and kills drivers and workers at random moments until it is
done; then holds the database against the invariants below, in SQL, and against the journals that
the toy wrote for itself. Prints no figure when one is broken.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench._toy_trainer import Behaviour
from db import query
from db.connect import sqlite_path
from db.planning import SweepView
from sweeper.device import process_is_alive

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


def journal_violations(url: str, journal: Path, steps: int) -> list[str]:
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


def run_chaos(
    url: str, folder: Path, points: int, kills: int, *, seed: int = 0, limit_seconds: float = 3600
) -> dict[str, float]:
    """Launch, kill, launch again until the sweep is final; figures of what happened.

    Parameters
    ----------
    url : str
        Empty run database.
    folder : Path
        For the grid, the dataset and the journals.
    points, kills : int
        Runs of the grid, and SIGKILLs sent to workers and drivers.
    seed : int
        Of the moments and victims.
    limit_seconds : float
        Give up after so long.
    """
    make_dataset(folder / "data" / "toy")
    grid = folder / "chaos.yaml"
    grid.write_text(f"sweep: chaos\ndataset: toy\nseeds: {points}\n")
    toy = Behaviour(journal=str(folder / "journal"), steps=40, step_seconds=0.02)
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    driver = _start(grid, url, folder, toy)
    try:
        while time.monotonic() - began < limit_seconds:
            time.sleep(rng.uniform(0.3, 1.5))
            if driver.poll() is not None:
                counts["launches"] += 1
                if driver.returncode == 0:
                    break
                driver = _start(grid, url, folder, toy)
            elif sum(counts[k] for k in ("driver kills", "worker kills")) < kills:
                _kill_someone(url, driver, rng, counts)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    executions = len(list((folder / "journal").iterdir()))
    return {**counts, "executions": executions, "seconds": time.monotonic() - began}


def make_dataset(folder: Path) -> None:
    """Prepare a dataset that the toy never looks at."""
    from trainer.data.generate import GeneratedSource, GeneratorOptions
    from trainer.data.prepare import prepare

    if not folder.exists():
        options = GeneratorOptions(num_users=120, num_items=60)
        prepare(GeneratedSource(options), folder)


def _start(grid: Path, url: str, folder: Path, toy: Behaviour) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "bench._toy_trainer", str(grid), "--db", url]
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--data-dir", str(folder / "data")],
            env={**os.environ, **toy.environment()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _kill_someone(
    url: str, driver: "subprocess.Popen[bytes]", rng: random.Random, counts: Counter[str]
) -> None:
    """SIGKILL the driver or one of its workers, once runs are under way."""
    from db.errors import StoreError

    with contextlib.suppress(StoreError, ProcessLookupError):
        running = SweepView(url, "chaos").running_attempts()
        victims = [a.pid for a in running if a.pid is not None and process_is_alive(a.pid)]
        if not victims:
            return
        if rng.random() < 0.2:
            driver.kill()
            driver.wait()
            counts["driver kills"] += 1
        else:
            os.kill(rng.choice(victims), signal.SIGKILL)
            counts["worker kills"] += 1


def main(words: list[str]) -> int:
    """Run the chaos on SQLite and on PostgreSQL."""
    parser = argparse.ArgumentParser(prog="bench chaos")
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    asked = parser.parse_args(words)
    broken = 0
    for name in ("sqlite", "postgres") if asked.database == "both" else (asked.database,):
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        with _database(name, folder) as url:
            figures = run_chaos(url, folder, asked.points, asked.kills, seed=asked.seed)
            spool = sqlite_path(url)
            found = violations(url, Path(f"{spool}.spool") if spool else None)
            found += journal_violations(url, folder / "journal", 40)
        if found:
            broken = 1
            print(f"{name}: BROKEN, see {folder}", *found, sep="\n  ")
            continue
        print(name, json.dumps({k: round(v, 1) for k, v in figures.items()}), "0 violations")
        shutil.rmtree(folder)
    return broken


@contextlib.contextmanager
def _database(name: str, folder: Path):  # type: ignore[no-untyped-def]
    if name == "sqlite":
        yield f"sqlite:///{folder}/chaos.db"
        return
    from bench.postgres import temporary_server

    with temporary_server() as server:
        yield server.url()
