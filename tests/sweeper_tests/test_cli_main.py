import json
import subprocess
import sys

import pytest
import typer

from db.errors import SrsweepError
from sweeper.cli import main as cli
from sweeper.cli.options import OutputFormat, format_value, output_format, print_rows

HEAVY = ("torch", "ray", "pandas", "sklearn", "matplotlib", "optuna", "polars")


def imported_by(arguments: list[str]) -> set[str]:
    """Top-level modules in the process after one command."""
    code = (
        "import sys, json\n"
        "from sweeper.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments):
    found = imported_by(arguments)
    assert "typer" in found
    assert not found & {*HEAVY, "sqlalchemy"}


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in shown
    assert "    srsweep launch grids/demo.yaml\n" in shown


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["lauch"])
    assert left.value.code == 2
    assert "No such command 'lauch'. Did you mean 'launch'?" in capsys.readouterr().err


def test_error_is_one_line_and_exit_2(monkeypatch, capsys):
    def fail() -> None:
        raise SrsweepError("num_items=7 is too few;\n give 8")

    monkeypatch.setattr(cli, "load_command", lambda name: typer.main.get_command(cli._single(fail)))
    assert cli.main(["runs"]) == 2
    assert capsys.readouterr().err == "srsweep: num_items=7 is too few; give 8\n"


def test_missing_module_does_not_break_the_others(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "runs", ("sweeper.cli.not_written:runs", "List runs."))
    assert cli.main(["runs"]) == 2
    assert "'runs' is not part of this installation (sweeper.cli.not_written" in (
        capsys.readouterr().err
    )


def test_bug_in_a_command_module_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "broken_command.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "runs", ("broken_command:runs", "List runs."))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        cli.main(["runs"])


def test_help_leaves_out_numpydoc_sections(monkeypatch, capsys):
    def command() -> None:
        """Do it.

        Examples
        --------
            srsweep do --it
            srsweep do --more

        Raises
        ------
        SrsweepError
            Never.
        """

    monkeypatch.setattr(
        cli, "load_command", lambda name: _kept(typer.main.get_command(cli._single(command)))
    )
    with pytest.raises(SystemExit):
        cli.main(["runs", "--help"])
    shown = capsys.readouterr().out
    assert "      srsweep do --it\n      srsweep do --more\n" in shown
    assert "Raises" not in shown
    assert "---" not in shown


def _kept(command):
    cli._keep_examples(command)
    return command


def test_rows_as_json_and_csv(capsys):
    rows = [{"a": 1, "b": None}, {"a": float("nan"), "b": "x,y"}]
    print_rows(rows, OutputFormat.JSON)
    assert json.loads(capsys.readouterr().out) == [{"a": 1, "b": None}, {"a": None, "b": "x,y"}]
    print_rows(rows, OutputFormat.CSV)
    assert capsys.readouterr().out == 'a,b\n1,\n,"x,y"\n'


def test_rows_as_plain_table(capsys):
    print_rows([{"name": "demo", "peak_train_memory_bytes": 3 * 2**29}], title="runs")
    assert capsys.readouterr().out.splitlines() == [
        "runs",
        "name  peak_train_memory_bytes",
        "demo  1.50 GiB",
    ]


def test_table_without_rows(capsys):
    print_rows([], columns=["a", "b"])
    assert capsys.readouterr().out == "a  b\n"


def test_values_keep_their_meaning():
    assert format_value("ndcg_at_10", 0.123456) == "0.1235"
    assert format_value("run_key", "a" * 64) == "a" * 12
    assert format_value("peak_bytes", 2**20) == "1.0 MiB"
    assert format_value("mask_seen", True) == "yes"


def test_json_and_csv_exclude_each_other():
    with pytest.raises(SrsweepError, match="--json and --csv exclude"):
        output_format(True, True)
