"""URLs, passwords that never show, and files where they may not lie."""

import pytest
from sqlalchemy.engine import make_url

from db import connect, query
from db.connect import check_local, file_system, parse_url, redact, shown
from db.errors import StoreError
from db.store import RunStore


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("runs.db", "'runs.db' is not a database URL; use sqlite:///FILE or postgresql://"),
        ("mysql://me:secret@host/db", r"'mysql' is no supported database"),
        ("sqlite://", "give SQLite a file"),
        ("sqlite:///:memory:", "give SQLite a file"),
        ("sqlite:///file:x.db?mode=rwc&uri=true", "only the plain form sqlite:///FILE"),
        ("postgresql+asyncpg://me:secret@host/db", "the driver is psycopg"),
        ("://me:secret@x", "is not a database URL"),
        ("postgresql://me:secret@host:port/db", "is not a database URL"),
    ],
)
def test_other_urls_are_refused_without_their_password(url, message):
    with pytest.raises(StoreError, match=message) as caught:
        RunStore.open(url)
    assert "secret" not in str(caught.value)


def test_the_driver_is_filled_in():
    assert parse_url("postgresql://me@host/db").drivername == "postgresql+psycopg"
    assert parse_url("sqlite:///runs.db").drivername == "sqlite+pysqlite"


def test_passwords_are_hidden_wherever_they_stand():
    assert shown("postgresql://me:se%40cret@host/db") == "postgresql://me:***@host/db"
    assert "secret" not in shown("postgresql://me@host/db?password=secret")
    assert redact("at postgresql://me:secret@host/db now") == "at postgresql://me:***@host/db now"
    assert redact("host=x password=secret user=y") == "host=x password=*** user=y"
    assert redact("PASSWORD = 'se cret' x") == "PASSWORD = *** x"
    store = RunStore("postgresql://me:secret@host/db")
    assert repr(store) == "RunStore('postgresql://me:***@host/db')"


def test_a_wrong_password_is_one_clear_line(databases):
    url = make_url(databases.postgres()).set(password="se-cret")
    text = url.render_as_string(hide_password=False)
    for call in (lambda: RunStore.open(text), lambda: query.rows(text, "SELECT 1")):
        with pytest.raises(StoreError, match="wrong user or password") as caught:
            call()
        assert "se-cret" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_missing_database_is_one_clear_line(databases):
    url = make_url(databases.postgres()).set(database="nowhere")
    with pytest.raises(StoreError, match="no such database; create it with createdb"):
        RunStore.open(url.render_as_string(hide_password=False))


def test_a_server_that_is_not_there_is_one_clear_line():
    with pytest.raises(StoreError, match="the server cannot be reached") as caught:
        RunStore.open("postgresql://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


def test_too_many_connections_are_one_clear_line(databases):
    import psycopg

    url = databases.postgres()
    name = make_url(url).database
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE guest_{name} LOGIN PASSWORD 'x' CONNECTION LIMIT 0")
    guest = make_url(url).set(username=f"guest_{name}", password="x")
    with pytest.raises(StoreError, match="too many connections for role"):
        RunStore.open(guest.render_as_string(hide_password=False))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="check that its folder exists"):
        RunStore.open(f"sqlite:///{tmp_path}/none/runs.db")


def test_a_read_only_database_is_one_clear_line(databases, make_bench):
    import psycopg

    url = databases.postgres()
    bench = make_bench(url)
    name = make_url(url).database
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    with pytest.raises(StoreError, match="the database is read-only; "):
        bench.store.put_sweep("other", "", bench.planned)


def test_a_user_without_rights_is_told_so(databases, make_bench):
    import psycopg

    url = databases.postgres()
    bench = make_bench(url)
    name = make_url(url).database
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE reader_{name} LOGIN PASSWORD 'x'")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_{name}")
    text = (
        make_url(url)
        .set(username=f"reader_{name}", password="x")
        .render_as_string(hide_password=False)
    )
    store = RunStore.open(text)
    assert len(store.sweep_runs("demo")) == 3
    assert len(query.runs(text)) == 3
    with pytest.raises(StoreError, match="this user may not do that; ask for the writer role"):
        store.claim(bench.keys[0], _worker())


def _worker():
    from db.store import WorkerInfo

    return WorkerInfo(host="h", pid=1, device_class="cpu")


def test_network_file_systems_are_refused(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/runs.db"
    check_local(url)
    check_local("postgresql://me:secret@host/db")
    monkeypatch.setattr(connect, "file_system", lambda path: "nfs4")
    with pytest.raises(StoreError, match="lies on nfs4, a network file system"):
        check_local(url)


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path, monkeypatch):
    mounts = f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path}/a\\040b nfs4 rw 0 0\n"
    monkeypatch.setattr(connect.Path, "read_text", lambda path: mounts)
    assert file_system(tmp_path / "a b" / "deep" / "runs.db") == "nfs4"
    assert file_system(tmp_path / "a bc" / "runs.db") == "ext4"
