"""`srsweep db`: what a user types and reads."""

import json

import pytest

from db import migrate, query
from db.schema import SCHEMA_VERSION
from db.spec import RunStatus
from sweeper.cli import main as cli


def run(capsys, *words):
    """Exit code, output and errors of a command."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code or 0, out, err


@pytest.fixture
def filled(bench, step, result):
    """Run 0 done with 25 steps, run 1 given up, run 2 pending."""
    with bench.writer(bench.claim(0)) as writer:
        for number in range(25):
            writer.step(step(number))
        writer.finish(result())
    bench.store.give_up(bench.keys[1], RunStatus.FAILED, "no")
    return bench


def test_upgrade_makes_tables_and_check_tells_of_them(empty_url, capsys):
    code, _, err = run(capsys, "db", "check", "--db", empty_url)
    assert (code, "is empty; `srsweep launch`" in err or "does not exist" in err) == (2, True)
    code, out, _ = run(capsys, "db", "upgrade", "--db", empty_url)
    assert (code, out.endswith("the schema is up to date\n")) == (0, True)
    code, out, _ = run(capsys, "db", "check", "--db", empty_url)
    assert (code, out.endswith(f": schema {SCHEMA_VERSION}, 0 sweeps, 0 runs\n")) == (0, True)
    assert "secret" not in out


def test_copy_prints_counts(filled, tmp_path, capsys):
    target = f"sqlite:///{tmp_path}/copy.db"
    code, out, _ = run(capsys, "db", "copy", filled.url, target)
    assert code == 0
    assert "steps" in out
    assert out.splitlines()[-1].startswith(f"{target} has every row of ")
    assert len(query.runs(target)) == 3
    code, _, err = run(capsys, "db", "copy", filled.url, target)
    assert (code, err.count("\n")) == (2, 1)
    assert "copy.db exists; name a file that does not" in err


def test_prune_says_first_what_would_go(filled, capsys):
    words = ["db", "prune", "--steps", "--keep-every", "10", "--db", filled.url]
    code, out, _ = run(capsys, *words, "--dry-run")
    assert (code, out.splitlines()[-1]) == (
        0, "21 step rows of 1 attempts would go, 4 of them stay")  # fmt: skip
    code, out, _ = run(capsys, *words, "--json")
    assert [(p["rows"], p["kept"]) for p in json.loads(out)] == [(21, 4)]
    assert query.rows(filled.url, "SELECT count(*) AS n FROM steps") == [{"n": 4}]
    code, out, _ = run(capsys, "db", "prune", "--steps", "--vacuum", "--db", filled.url)
    assert out.splitlines()[-1] == "4 step rows of 1 attempts are gone, 0 of them stay"
    code, _, err = run(capsys, "db", "prune", "--db", filled.url)
    assert (code, "say what to prune: --steps" in err) == (2, True)


def test_the_doctor_ends_with_1_on_an_error(filled, tmp_path, capsys):
    words = ["db", "doctor", "--db", filled.url, "--spool-dir", tmp_path]
    code, out, _ = run(capsys, *words)
    assert (code, "ok       indices      all there" in out) == (0, True)
    filled.execute("DROP INDEX uq_attempts_running")
    code, out, _ = run(capsys, *words)
    assert code == 1
    assert "error    indices      uq_attempts_running is missing" in out
    assert "-> run this SQL: CREATE UNIQUE INDEX uq_attempts_running" in out
    code, out, _ = run(capsys, *words, "--json")
    assert code == 1
    assert {"check", "level", "text", "remedy"} == set(json.loads(out)[0])


def test_grant_takes_the_password_from_the_environment(databases, make_bench, capsys, monkeypatch):
    bench = make_bench(databases.postgres())
    name = "cli_" + bench.url.rpartition("/")[2]
    monkeypatch.setenv("SRSWEEP_GRANT_PASSWORD", "se-cret")
    words = ["db", "grant", "reader", name, "--db", bench.url]
    code, out, err = run(capsys, *words, "--set-password")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{name} made"
    assert "se-cret" not in out
    assert run(capsys, *words)[0] == 0
    monkeypatch.setenv("SRSWEEP_GRANT_PASSWORD", "")
    code, _, err = run(capsys, *words, "--set-password")
    assert (code, f"the new password of {name} is empty" in err) == (2, True)
    code, _, err = run(capsys, "db", "grant", "reader", "x", "--db", databases.sqlite())
    assert (code, "SQLite has no users" in err) == (2, True)


def test_an_older_file_is_kept_beside_the_upgraded_one(databases, make_bench, monkeypatch):
    bench = make_bench(databases.sqlite())
    assert migrate.back_up_older(bench.url) is None
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", "9999")
    backup = migrate.back_up_older(bench.url)
    assert backup.name.endswith(f".db.schema-{SCHEMA_VERSION}")
    monkeypatch.undo()
    assert len(query.runs(f"sqlite:///{backup}")) == 3
    assert migrate.back_up_older(databases.sqlite(empty=True)) is None
