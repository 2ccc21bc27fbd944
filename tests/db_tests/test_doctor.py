"""The doctor: finds each trouble that is made here, says what to do, and changes nothing."""

import datetime
import sqlite3

import psycopg

from db import connect, doctor
from db.doctor import examine, worst
from db.rows import Batch, step_row
from db.spool import Spool


def _troubles(found):
    return {f.check: f for f in found if f.level != "ok"}


def _quiet(found):
    """Findings without those on the machine that runs the tests."""
    return [f for f in found if f.check not in {"disk", "fsync", "connections"}]


def test_a_healthy_database(bench, tmp_path):
    found = _quiet(examine(bench.url, tmp_path / "none", integrity=True))
    assert _troubles(found) == {}
    assert worst(found) == "ok"
    checks = {"schema", "indices", "leases", "spools"}
    assert checks <= {f.check for f in found}


def test_a_missing_index_is_named_with_the_sql_that_makes_it(bench):
    bench.execute("DROP INDEX ix_runs_status")
    bench.execute("DROP INDEX uq_attempts_running")
    found = [f for f in examine(bench.url) if f.check == "indices"]
    assert [(f.level, f.text.split()[0]) for f in found] == [
        ("warning", "ix_runs_status"),
        ("error", "uq_attempts_running"),
    ]
    for finding in found:
        bench.execute(finding.remedy.removeprefix("run this SQL: "))
    assert [f.level for f in examine(bench.url) if f.check == "indices"] == ["ok"]


def test_a_missing_view(bench):
    bench.execute("DROP VIEW run_steps")
    found = _troubles(examine(bench.url))["tables"]
    assert (found.level, found.text) == ("error", "missing: run_steps")


def test_stale_leases(bench):
    bench.claim(0)
    held = bench.claim(1)
    assert "leases" not in _troubles(examine(bench.url))
    bench.run_out(held)
    found = _troubles(examine(bench.url))["leases"]
    assert f"1 of 2 running attempts no longer report: {held.run_key[:12]} on node-1" in found.text
    assert "srsweep launch" in found.remedy
    assert bench.store.run(held.run_key).status == "running"


def test_statuses_that_contradict_each_other(bench):
    bench.claim(0)
    bench.execute("UPDATE runs SET status = 'pending'")
    bench.execute("UPDATE runs SET status = 'running' WHERE run_key = :key", key=bench.keys[1])
    assert "2 runs say they run" in _troubles(examine(bench.url))["statuses"].text


def test_results_that_are_not_packed(bench, result):
    with bench.writer(bench.claim(0)) as writer:
        writer.finish(result())
    assert "packed results" not in _troubles(examine(bench.url))
    bench.execute("UPDATE run_summary SET ndcg_at_10 = 0.5")
    found = _troubles(examine(bench.url))["packed results"]
    assert (found.level, found.text.split(";")[0]) == ("warning", "0 of 1 results are packed")
    assert "srsweep db upgrade" in found.remedy


def test_spools_that_wait(bench, step, tmp_path):
    held = bench.claim(0)
    made = Spool(tmp_path, held)
    made.append(Batch([step_row(step(0))]))
    assert "spools" not in _troubles(examine(bench.url, tmp_path))
    made.close()
    (tmp_path / "7-x.fenced").touch()
    texts = [f.text for f in examine(bench.url, tmp_path) if f.check == "spools"]
    assert texts[0].startswith("1 spools (0.0 MiB) of workers that are gone wait in ")
    assert texts[1].startswith("1 spools of lost attempts are set aside")
    assert made.path.exists()


def test_an_older_schema_names_the_upgrade(bench):
    bench.execute("UPDATE alembic_version SET version_num = '9999'")
    found = examine(bench.url)
    assert (found[0].check, found[0].level) == ("schema", "error")
    assert "schema 9999, newer than" in found[0].text
    assert "indices" not in {f.check for f in found}


def test_clocks_that_differ(bench, monkeypatch):
    class Late(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(seconds=90)

    monkeypatch.setattr(doctor.datetime, "datetime", Late)
    assert "differ by 90 s" in _troubles(examine(bench.url))["clock"].text


def test_a_rollback_journal_network_file_system_and_full_disk(databases, make_bench, monkeypatch):
    bench = make_bench(databases.sqlite())
    connection = sqlite3.connect(bench.url.removeprefix("sqlite:///"))
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(doctor, "_FREE_BYTES", 2**70)
    found = _troubles(examine(bench.url))
    assert "journal_mode is delete" in found["journal"].text
    assert found["file system"].text.startswith("nfs4 is a network file system")
    assert "prune --steps" in found["disk"].remedy
    assert worst(list(found.values())) == "error"


def test_damage_is_found(databases, make_bench):
    bench = make_bench(databases.sqlite())
    path = bench.url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_events_run_id'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with open(path, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * 64)
    found = _troubles(examine(bench.url, integrity=True))["integrity"]
    assert found.level == "error"
    assert "backup" in found.remedy


def test_a_server_that_fills_up_and_does_not_sync(databases, make_bench):
    bench = make_bench(databases.postgres())
    found = {f.check: f for f in examine(bench.url)}
    assert "connections of PostgreSQL" in found["connections"].text
    with psycopg.connect(bench.url) as connection:
        (fsync,) = connection.execute("SHOW fsync").fetchone()
    assert ("fsync" in _troubles(found.values())) == (fsync == "off")


def test_known_network_file_systems_are_those_that_are_refused():
    assert {"nfs", "nfs4", "lustre"} < set(connect.NETWORK_FILE_SYSTEMS)
    assert doctor.NETWORK_FILE_SYSTEMS is connect.NETWORK_FILE_SYSTEMS
