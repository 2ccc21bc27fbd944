"""Roles on PostgreSQL: a writer can run a sweep, a reader can look, and neither can do more."""

import psycopg
import pytest
from sqlalchemy.engine import make_url

from db import query
from db.errors import StoreError
from db.grants import grant
from db.spec import RunStatus
from db.store import DatasetRecord, RunStore

FORBIDDEN_TO_BOTH = [
    "DELETE FROM steps",
    "DELETE FROM runs",
    "TRUNCATE steps",
    "DROP TABLE steps",
    "CREATE TABLE x (a integer)",
    "CREATE SCHEMA x",
    "ALTER TABLE runs ADD COLUMN x integer",
    "CREATE INDEX x ON runs (seed)",
    "UPDATE steps SET loss = 0",
    "UPDATE evaluations SET value = 1",
    "UPDATE runs SET run_key = 'x'",
    "UPDATE attempts SET run_id = 1",
    "UPDATE alembic_version SET version_num = '9999'",
    "CREATE ROLE x",
    "COPY runs TO PROGRAM 'true'",
]
FORBIDDEN_TO_READERS = [
    "UPDATE runs SET status = 'done'",
    "INSERT INTO events (at, kind) VALUES (now(), 'x')",
    "SELECT * FROM runs FOR UPDATE",
    "DELETE FROM run_summary",
    "SELECT nextval('runs_id_seq')",
]


@pytest.fixture(scope="module")
def owned(databases, make_bench):
    """A database, and URLs of its reader and writer."""
    bench = make_bench(databases.postgres())
    urls = {}
    for role in ("reader", "writer"):
        name = f"{role}_{make_url(bench.url).database}"
        lines = grant(bench.url, role, name, password="pass:w@rd")
        assert lines[0] == f"{name} made"
        url = make_url(bench.url).set(username=name, password="pass:w@rd")
        urls[role] = url.render_as_string(hide_password=False)
    return bench, urls


def _execute(url, sql):
    """Run a statement as a client that asks for a writable transaction."""
    with psycopg.connect(url) as connection:
        connection.read_only = False
        connection.execute(sql)
        connection.rollback()


@pytest.mark.parametrize("sql", FORBIDDEN_TO_BOTH)
def test_neither_role_can(owned, sql):
    _, urls = owned
    for url in urls.values():
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            _execute(url, sql)


@pytest.mark.parametrize("sql", FORBIDDEN_TO_READERS)
def test_a_reader_cannot(owned, sql):
    _, urls = owned
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        _execute(urls["reader"], sql)


def test_a_reader_reads_everything(owned):
    bench, urls = owned
    assert len(query.runs(urls["reader"])) == 3
    assert query.rows(urls["reader"], "SELECT count(*) AS n FROM run_steps") == [{"n": 0}]
    assert len(query.summary_frame(urls["reader"])) == len(query.summary_frame(bench.url))
    with pytest.raises(StoreError, match="read-only"):
        RunStore.open(urls["reader"]).put_sweep("x", "", bench.planned)


def test_a_writer_carries_a_sweep(owned, step, evaluation, result, worker, tmp_path):
    bench, urls = owned
    store = RunStore.open(urls["writer"])
    store.put_dataset(DatasetRecord(name="other", fingerprint="e" * 64))
    store.put_sweep("more", "", bench.planned)
    held = store.claim(bench.keys[0], worker)
    with store.writer(held, spool_dir=tmp_path, flush_seconds=0.02) as writer:
        writer.step(step(0))
        writer.evaluation(evaluation(1))
        assert writer.flush()
        assert writer.finish(result(RunStatus.OUT_OF_MEMORY, total_bytes=1))
    store.give_up(bench.keys[1], RunStatus.SKIPPED, "no", proven_by=bench.keys[0])
    store.reset(bench.keys[0])
    again = store.claim(bench.keys[0], worker)
    assert store.inherit_steps(again, 1) == 1
    bench.run_out(again)
    assert store.expire_leases() == [bench.keys[0]]
    held = store.claim(bench.keys[0], worker)
    with store.writer(held, spool_dir=tmp_path, flush_seconds=0.02) as writer:
        assert writer.finish(result())
    assert len(query.summary_frame(urls["reader"])) == 2
    _execute(urls["writer"], "UPDATE run_summary SET ndcg_at_10 = 0.5")


def test_a_grant_can_be_narrowed_and_a_password_changed(owned):
    bench, urls = owned
    name = make_url(urls["writer"]).username
    grant(bench.url, "reader", name, password="other")
    with pytest.raises(StoreError, match="wrong user or password"):
        query.runs(urls["writer"])
    url = make_url(urls["writer"]).set(password="other").render_as_string(hide_password=False)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        _execute(url, "UPDATE runs SET status = 'done'")
    assert len(query.runs(url)) == 3
    assert len(grant(bench.url, "writer", name, password="pass:w@rd")) == 2
    _execute(urls["writer"], "UPDATE runs SET status = 'done'")


def test_what_cannot_be_granted_is_refused(owned, databases):
    bench, urls = owned
    with pytest.raises(StoreError, match="there is no user 'nobody-knows'; give a password"):
        grant(bench.url, "reader", "nobody-knows")
    with pytest.raises(StoreError, match="name another user than the one of --db"):
        grant(bench.url, "reader", make_url(bench.url).username)
    with pytest.raises(StoreError, match="this user may not do that"):
        grant(urls["writer"], "reader", "guest", password="x")
    with pytest.raises(StoreError, match="SQLite has no users"):
        grant(databases.sqlite(), "reader", "guest", password="x")
    with pytest.raises(StoreError, match="role 'owner' is unknown"):
        grant(bench.url, "owner", "guest", password="x")


def test_the_password_is_never_sent_in_clear(owned, monkeypatch):
    bench, _ = owned
    sent = []
    true_execute = psycopg.Connection.execute

    def watched(self, statement, *arguments, **options):
        sent.append(statement if isinstance(statement, str) else statement.as_string(self))
        return true_execute(self, statement, *arguments, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", watched)
    name = f"quiet_{make_url(bench.url).database}"
    grant(bench.url, "reader", name, password="very-secret")
    assert any("SCRAM-SHA-256" in text for text in sent)
    assert not any("very-secret" in text for text in sent)
