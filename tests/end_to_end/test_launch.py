"""Real processes, real Ray: drivers and workers are killed, and every run is there once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bench._toy_trainer import Behaviour
from bench.chaos import journal_violations, make_dataset, violations
from db import query
from db.errors import StoreError
from db.planning import SweepView

pytestmark = pytest.mark.timeout(240)


class Sweep:
    """A grid of toy runs and the drivers that launch it."""

    def __init__(self, folder, url, **behaviour):
        self.folder, self.url = folder, url
        self.toy = Behaviour(journal=str(folder / "journal"), **behaviour)
        self.grid = folder / "toy.yaml"
        make_dataset(folder / "data" / "toy")
        self.drivers = []

    def start(self, text):
        self.grid.write_text(f"sweep: toy\ndataset: toy\n{text}\n")
        log = (self.folder / f"driver{len(self.drivers)}.log").open("w")
        driver = subprocess.Popen(
            [sys.executable, "-m", "bench._toy_trainer", str(self.grid), "--db", self.url,
             "--data-dir", str(self.folder / "data")],
            env={**os.environ, **self.toy.environment(), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        self.drivers.append(driver)
        return driver

    def wait_for(self, number_done, *, running=0):
        """Wait until so many runs are done and so many under way."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(StoreError):
                statuses = list(SweepView(self.url, "toy").statuses().values())
                if statuses.count("done") >= number_done and statuses.count("running") >= running:
                    return
            assert self.drivers[-1].poll() is None, self.log()
            time.sleep(0.05)
        pytest.fail(f"no progress: {self.log()}")

    def log(self):
        return (self.folder / f"driver{len(self.drivers) - 1}.log").read_text()

    def counts(self):
        return json.loads(self.log().splitlines()[-1])["counts"]

    def close(self):
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()


@pytest.fixture
def sweep(tmp_path, databases):
    made = []

    def make(url=None, **behaviour):
        made.append(Sweep(tmp_path, url or databases.sqlite(), **behaviour))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_driver_killed_in_the_middle_of_24_runs(sweep, store_url):
    toy = sweep(store_url, steps=20, step_seconds=0.02)
    toy.start("seeds: 24")
    toy.wait_for(6, running=1)
    toy.drivers[0].kill()
    toy.drivers[0].wait()
    before = query.rows(store_url, "select id from attempts where status = 'done'")
    assert 6 <= len(before) < 24
    assert toy.start("seeds: 24").wait(timeout=150) == 0, toy.log()
    assert toy.counts() == {"done": 24}
    assert violations(store_url) == []
    assert journal_violations(store_url, toy.folder / "journal") == []
    done_twice = query.rows(
        store_url,
        "select run_id from attempts where status = 'done' group by run_id having count(*) > 1",
    )
    assert done_twice == []
    steps = query.rows(
        store_url,
        "select count(*) as n, max(step) as last from steps s "
        "join attempts a on a.id = s.attempt_id where a.status = 'done' group by a.id",
    )
    assert steps == [{"n": 20, "last": 19}] * 24


def test_killed_workers_and_failing_runs(sweep):
    toy = sweep(
        steps=5,
        step_seconds=0.01,
        killed_once=(43,),
        killed_always=(44,),
        errors={"45": "ValueError"},
    )
    driver = toy.start("seeds: 5")
    assert driver.wait(timeout=200) == 1, toy.log()
    assert toy.counts() == {"done": 3, "failed": 2}
    rows = query.rows(
        toy.url,
        "select seed, r.status, count(*) as n from runs r join attempts a on a.run_id = r.id "
        "group by seed, r.status order by seed",
    )
    assert [(r["seed"], r["status"], r["n"]) for r in rows] == [
        (42, "done", 1),
        (43, "done", 2),
        (44, "failed", 3),
        (45, "failed", 1),
        (46, "done", 1),
    ]
    assert violations(toy.url) == []
    assert journal_violations(toy.url, toy.folder / "journal") == []


def test_ctrl_c_ends_with_130_and_the_same_line_resumes(sweep):
    toy = sweep(steps=100, step_seconds=0.05)
    driver = toy.start("seeds: 3")
    toy.wait_for(0, running=1)  # just begun, so that it cannot end before the signal is seen
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=30) == 130, toy.log()
    assert "the same line resumes" in toy.log()
    ended = query.rows(toy.url, "select status, lease_until from attempts where status <> 'done'")
    assert ended, "nothing was under way"
    assert all(r["status"] == "cancelled" and r["lease_until"] is None for r in ended), ended
    assert toy.start("seeds: 3").wait(timeout=120) == 0, toy.log()
    assert violations(toy.url) == []


def test_asha_cuts_runs_that_are_behind(sweep):
    """Ray Tune's own scheduler; the lower the seed, the better is a toy run."""
    toy = sweep(steps=20, step_seconds=0.01)
    assert toy.start("seeds: 6\nearly_stopping: asha").wait(timeout=150) == 0, toy.log()
    rows = query.rows(
        toy.url,
        "select r.seed, r.status, r.reason, a.status as attempt, a.error_class, "
        "(select max(step) from evaluations e where e.attempt_id = a.id) as last "
        "from runs r join attempts a on a.run_id = r.id order by r.seed",
    )
    assert len(rows) == 6
    assert rows[0]["status"] == "done"
    cut = rows[2:]
    assert [row["status"] for row in cut] == ["pending"] * 4
    assert {(row["attempt"], row["error_class"]) for row in cut} == {("cancelled", "CutShort")}
    assert {row["last"] for row in cut} == {5}, "they were to end after their first epoch"
    assert all(row["reason"].startswith("cut short by asha after epoch 1 (5 s") for row in cut)
    assert query.rows(toy.url, "select * from attempts where status = 'running'") == []


def test_two_drivers_share_the_work(sweep):
    toy = sweep(steps=20, step_seconds=0.03)
    toy.start("seeds: 12")
    toy.start("seeds: 12")
    assert [driver.wait(timeout=180) for driver in toy.drivers] == [0, 0], toy.log()
    assert violations(toy.url) == []
    rows = query.rows(toy.url, "select versions from attempts where status = 'done'")
    assert len(rows) == 12
    assert len(list((toy.folder / "journal").iterdir())) == 12, "a run was executed twice"


def test_grid_from_the_command_line_to_sql(tmp_path, databases):
    """The real trainer: launch, launch again with nothing to do, list, ask."""
    make_dataset(tmp_path / "data" / "toy")
    grid = tmp_path / "small.yaml"
    grid.write_text(
        "dataset: toy\nembedding_dim: 8\nnum_blocks: 1\nnum_heads: 1\nmax_epochs: 2\n"
        "max_seq_len: 8\nbatch_size: [16, 64]\nloss: [ce, ce_minus]\nnum_negatives: [4, null]\n"
    )
    environment = {
        **os.environ,
        "SRSWEEP_DB": databases.sqlite(),
        "SRSWEEP_DATA_DIR": str(tmp_path / "data"),
        "OMP_NUM_THREADS": "1",
    }

    def srsweep(*words):
        done = subprocess.run(
            [sys.executable, "-m", "sweeper.cli.main", *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == "", "Ray was to keep quiet"
        return done.stdout

    assert "small: 4 points" in srsweep("launch", "small.yaml", "--dry-run")
    first = srsweep("launch", "small.yaml")
    assert first.splitlines()[-1].startswith("small: 4 done, 0 running, best NDCG@10 0.")
    assert srsweep("launch", "small.yaml").splitlines() == [first.splitlines()[-1]]
    listed = json.loads(srsweep("runs", "--sweep", "small", "--sort", "ndcg_at_10", "--json"))
    values = [row["ndcg_at_10"] for row in listed]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)
    assert all(row["num_attempts"] == 1 for row in listed)
    told = srsweep(
        "query", "select loss, count(*) as n from runs group by loss order by loss", "--csv"
    )
    assert told == "loss,n\nce,2\nce_minus,2\n"
    steps = json.loads(
        srsweep(
            "query",
            "select count(*) as n, min(step_seconds) as fastest, min(peak_bytes) as lowest "
            "from run_steps where run_key = '" + listed[0]["run_key"] + "'",
            "--json",
        )
    )[0]
    assert steps["n"] == listed[0]["num_steps"]
    assert steps["fastest"] > 0
    assert steps["lowest"] is not None
