import dataclasses
import json

import pytest
from typer.testing import CliRunner

from db.errors import LaunchError
from sweeper import cluster
from sweeper.cli.cluster import app
from sweeper.cluster import NodeReport, compare, inspect_node
from sweeper.session import Node
from sweeper.site import cluster_site

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


def test_a_launch_refuses_what_would_spoil_it(monkeypatch, toy_data):
    me = cluster._this_driver(str(toy_data))
    same = dataclasses.replace(me, host="a", problems=())
    cluster.refuse_differences([same], str(toy_data), {"toy"})
    changed = dataclasses.replace(same, versions={**me.versions, "torch": "1.0", "ray": "1.0"})
    with pytest.raises(LaunchError, match=r"torch is 1\.0 on a but .* \(and 1 more\); 'srsweep"):
        cluster.refuse_differences([changed], str(toy_data), {"toy"})
    without = dataclasses.replace(same, datasets={})
    with pytest.raises(LaunchError, match="dataset 'toy' is missing on a"):
        cluster.refuse_differences([without], str(toy_data), {"toy"})
    cluster.refuse_differences([without], str(toy_data), set())


def test_commits_are_compared_where_both_are_checkouts():
    one = dataclasses.replace(NODE, versions={**NODE.versions, "commit": "abc"})
    assert compare([one, other()], spread=True) == []
    two = other(versions={**NODE.versions, "commit": "def"})
    assert compare([one, two], spread=True)[0].startswith("commit is def on b but abc on a")


def test_gpus_of_a_cluster_are_grouped_by_kind():
    reports = {
        "1": other(device="A", gpu_memory_bytes=24),
        "2": other(device="B", gpu_memory_bytes=80),
        "3": other(device="B", gpu_memory_bytes=79),
    }
    nodes = (
        Node(8.0, 1.0, "A", "1"), Node(8.0, 4.0, "B", "2"), Node(8.0, 4.0, "B", "3"),
        Node(2.0, 0.0, None, "4"),
    )  # fmt: skip
    site = cluster_site(nodes, reports)
    assert [(g.accelerator, g.num_gpus, g.memory_bytes) for g in site.groups] == [
        ("A", 1, 24),
        ("B", 8, 79),
    ]
    assert (site.cpus, site.largest_memory_bytes) == (26.0, 79)
    one_kind = cluster_site(nodes[1:], reports)
    assert one_kind.groups[0].accelerator is None, "no need to name it"


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
