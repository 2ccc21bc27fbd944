"""The five import packages are ours, wherever Python starts, and the layers hold."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sweeper", "trainer", "kernels", "analysis", "db")


def _run(*words: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_packages_are_ours_from_anywhere() -> None:
    code = f"import json; print(json.dumps({{n: __import__(n).__file__ for n in {PACKAGES}}}))"
    answer = _run(sys.executable, "-P", "-c", code)
    assert answer.returncode == 0, answer.stderr
    recorded = {str(file.locate()) for file in distribution("srsweep").files or []}
    for name, file in json.loads(answer.stdout).items():
        assert Path(file).is_relative_to(ROOT / name) or file in recorded, (
            f"{name} is imported from {file}: another distribution shadows ours"
        )


def test_wheel_holds_all_of_the_five_packages_and_nothing_else(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    answer = _run(sys.executable, "-c", code, cwd=str(ROOT))
    assert answer.returncode == 0, answer.stderr
    with zipfile.ZipFile(tmp_path / answer.stdout.split()[-1]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    listed = _run("git", "ls-files", *PACKAGES, cwd=str(ROOT))
    if listed.returncode != 0:
        pytest.skip("not a git checkout: no list of the files that belong to the packages")
    assert packed >= set(listed.stdout.split())
    assert {name.split("/")[0] for name in packed} == set(PACKAGES)


def test_distribution_is_never_uploaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_constraints_refuse_foreign_packages_and_pin_the_proven_pair() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for name in PACKAGES:
        assert f"{name}<0" in lines
    assert "torch==2.13.0" in lines
    assert "triton==3.7.1" in lines
    assert not [line for line in lines if "+cpu" in line and not line.startswith("#")]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=;, ]", line)[0].lower() for line in wanted} - {"srsweep"}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split("\n")
    }
    assert names <= {name.replace("_", "-") for name in pinned} | pinned


def test_no_test_folder_carries_a_package_name() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert not folders & set(PACKAGES)
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_inits_hold_a_docstring_only(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        if "migrations" in path.parts:
            continue
        assert re.fullmatch(r'""".*?"""\n', path.read_text(), re.S), path
