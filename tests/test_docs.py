"""The README's commands run, and what users can type or read is documented."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from db.measures import METRICS
from db.spec import field_docs, field_types

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```console\n(.*?)```", re.S)
YAML_BLOCK = re.compile(r"```yaml\n(.*?)```", re.S)


def _readme_commands() -> list[str]:
    """Lines after `$ ` in console blocks, continuation lines joined; the make lines apart."""
    text = "\n".join(BLOCK.findall(README)).replace("\\\n", " ")
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in lines if not line.startswith("make ")]


def test_readme_names_its_two_lines() -> None:
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.timeout(600)
def test_readme_commands_run_in_order(tmp_path: Path) -> None:
    commands = _readme_commands()
    assert len(commands) >= 6
    (tmp_path / "grids").symlink_to(ROOT / "grids")
    environment = {key: value for key, value in os.environ.items() if key != "SRSWEEP_DB"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for command in commands:
        answer = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"


def test_readme_shows_the_grid_that_it_launches() -> None:
    (shown,) = YAML_BLOCK.findall(README)
    written = (ROOT / "grids" / "quickstart.yaml").read_text()
    assert yaml.safe_load(shown) == yaml.safe_load(written)


@pytest.mark.parametrize("page", ["docs/grids.md", "docs/search.md"])
def test_grids_in_the_docs_are_grids(page: str) -> None:
    from sweeper.grid import parse_grid

    blocks = YAML_BLOCK.findall((ROOT / page).read_text())
    assert blocks
    for block in blocks:
        assert parse_grid(block, page).points


def test_readme_explains_every_metric_and_loss() -> None:
    for metric in METRICS:
        assert re.search(rf"`{metric}`", README), metric
    for loss in field_types()["loss"].__args__:
        assert re.search(rf"`{loss}`", README), loss


def test_every_command_is_in_the_readme() -> None:
    from sweeper.cli.main import COMMANDS

    for name in COMMANDS:
        assert f"srsweep {name}" in README, name


def test_every_spec_field_has_a_doc_string() -> None:
    assert set(field_docs()) == set(field_types())


def test_no_machine_specific_path_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    path = re.compile(r"(?<![\w.])/(wo" + r"rk|ro" + r"ot)/")
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".toml", ".yaml", ".yml", ".csv", ".txt", ".html")):
            found = path.search((ROOT / name).read_text(errors="ignore"))
            assert found is None, f"{name} holds a path of one machine: {found}"
