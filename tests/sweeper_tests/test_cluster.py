import dataclasses
import json

import pytest
from typer.testing import CliRunner

from sweeper.cli.cluster import app
from sweeper.cluster import NodeReport, compare, inspect_node

NODE = NodeReport(
    host="a",
    cpus=8.0,
    gpus=1.0,
    device="H100 80 GiB",
    versions={"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
    clock_seconds=0.0,
    datasets={"ml": "f" * 64},
)


def other(**changes):
    return dataclasses.replace(NODE, host="b", **changes)


def test_equal_nodes_have_no_problem():
    assert compare([NODE, other()], spread=True) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"versions": {**NODE.versions, "torch": "2.12.0"}},
            "torch is 2.12.0 on b but 2.13.0 on a; install the same versions",
        ),
        ({"clock_seconds": -42.0}, "the clock of b is -42 s off"),
        ({"datasets": {}}, "dataset 'ml' is missing on b but ffffffff on a"),
        ({"datasets": {"ml": "0" * 64}}, "dataset 'ml' is 00000000 on b but ffffffff on a"),
        ({"problems": ("b cannot use the run database: refused",)}, "b cannot use the run"),
    ],
)
def test_differences_are_named(changes, problem):
    found = compare([NODE, other(**changes)], spread=True)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_cluster_without_nodes_is_a_problem():
    assert compare([], spread=True) == ["the cluster has no living node"]


def test_this_machine(databases, toy_data):
    report = inspect_node(databases.sqlite(), str(toy_data))
    assert list(report.datasets) == ["toy"]
    assert report.problems == ()
    assert report.cpus >= 1


def test_unreachable_database_is_told_without_its_password(toy_data):
    report = inspect_node("postgresql://me:secret@127.0.0.1:9/runs", str(toy_data))
    assert len(report.problems) == 1
    assert "cannot use the run database" in report.problems[0]
    assert "secret" not in report.problems[0]


def test_command_prints_nodes_and_fails_on_problems(databases, toy_data):
    good = CliRunner().invoke(
        app, ["check", "--db", databases.sqlite(), "--data-dir", str(toy_data), "--json"]
    )
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)[0]["datasets"].startswith("toy:")
    bad = CliRunner().invoke(app, ["check", "--db", "postgresql://me:secret@127.0.0.1:9/runs"])
    assert bad.exit_code == 1
    assert "problem:" in bad.output
