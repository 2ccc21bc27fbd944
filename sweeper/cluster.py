"""What every node of a cluster says about itself, and what in it would spoil a sweep."""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.connect import shown, sqlite_path
from db.errors import LaunchError, SrsweepError
from sweeper.device import (
    cpu_device_class,
    git_commit,
    gpu_classes,
    host_name,
    num_local_cpus,
    num_local_gpus,
    nvidia_driver,
    package_versions,
)
from sweeper.session import Node, Session, ray_session

MAX_CLOCK_SKEW_SECONDS = 5.0
"""Clocks that differ more make logs unreadable; leases go by the database's clock alone."""
_COMPARED = ("python", "srsweep", "commit", "torch", "triton", "ray")
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class NodeReport:
    """One node, as a task on it saw it."""

    host: str
    cpus: float
    gpus: float
    device: str
    versions: dict[str, str]
    clock_seconds: float
    """How far its clock is ahead of the driver's, half the round trip taken off."""
    datasets: dict[str, str]
    """Fingerprint of each prepared dataset by name."""
    problems: tuple[str, ...] = field(default_factory=tuple)
    gpu_memory_bytes: int | None = None
    """Of its smallest GPU."""
    gpu_driver: str | None = None
    """Version of the NVIDIA driver."""

    def row(self) -> dict[str, Any]:
        """Values for a table."""
        return {
            "host": self.host,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "device": self.device,
            "driver": self.gpu_driver,
            "python": self.versions.get("python"),
            "torch": self.versions.get("torch"),
            "ray": self.versions.get("ray"),
            "clock_seconds": round(self.clock_seconds, 3),
            "datasets": " ".join(f"{n}:{f[:8]}" for n, f in self.datasets.items()) or None,
        }


def check_cluster(
    address: str | None, database: str, data_dir: Path
) -> tuple[list[NodeReport], list[str]]:
    """Ask every node, and compare.

    Parameters
    ----------
    address : str or None
        Ray cluster; None checks this machine alone.
    database : str
        Run database that the workers would write to.
    data_dir : Path
        Folder of prepared datasets, the same path on every node.

    Returns
    -------
    list of NodeReport
        One per node.
    list of str
        What would spoil a sweep, one line each; empty when nothing would.

    Raises
    ------
    LaunchError
        The cluster cannot be reached.
    """
    folder = str(data_dir.resolve())
    if address is None:
        report = inspect_node(_absolute(database), folder)
        return [report], compare([report], spread=False)
    with ray_session(address) as session:
        reports = list(ask_nodes(session, database, folder).values())
    problems = compare([_this_driver(folder), *reports], spread=True)
    if sqlite_path(database) is not None:
        problems.append(
            f"{shown(database)} is a file on one host; a sweep over several needs PostgreSQL"
        )
    return reports, problems


def inspect_node(
    database: str, data_dir: str, cpus: float | None = None, gpus: float | None = None
) -> NodeReport:
    """Look at the node that this runs on.

    Parameters
    ----------
    database : str
        Run database to reach.
    data_dir : str
        Folder of prepared datasets.
    cpus, gpus : float, optional
        What Ray counts here; all there is by default.
    """
    problems = []
    cpus = float(num_local_cpus()) if cpus is None else cpus
    gpus = float(num_local_gpus()) if gpus is None else gpus
    device, memory = cpu_device_class(), None
    if gpus:
        try:
            device, memory = min(gpu_classes(), key=lambda item: item[1])
        except (LaunchError, ValueError) as error:
            problems.append(f"{host_name()}: Ray counts {gpus:g} GPUs, but: {error}")
    try:
        from db.store import RunStore

        RunStore.open(database).sweeps()
    except SrsweepError as error:
        problems.append(f"{host_name()} cannot use the run database: {error}")
    return NodeReport(
        host=host_name(),
        cpus=cpus,
        gpus=gpus,
        device=device,
        versions=_versions(),
        clock_seconds=0.0,
        datasets=_fingerprints(Path(data_dir)),
        problems=tuple(problems),
        gpu_memory_bytes=memory,
        gpu_driver=nvidia_driver() if gpus else None,
    )


def compare(reports: Sequence[NodeReport], *, spread: bool) -> list[str]:
    """What would spoil a sweep over these nodes.

    Parameters
    ----------
    reports : sequence of NodeReport
        The first is the one that the others are held against.
    spread : bool
        Whether there is more than one host.
    """
    problems = [problem for report in reports for problem in report.problems]
    if not reports:
        return ["the cluster has no living node"]
    first = reports[0]
    for other in reports[1:]:
        for name in _COMPARED:
            mine, theirs = first.versions.get(name), other.versions.get(name)
            # a checkout's commit says something only where both are checkouts
            if mine != theirs and (name != "commit" or (mine and theirs)):
                problems.append(
                    f"{name} is {theirs} on {other.host} but {mine} on {first.host}; "
                    "install the same versions (constraints.txt)"
                )
        if abs(other.clock_seconds) > MAX_CLOCK_SKEW_SECONDS:
            problems.append(
                f"the clock of {other.host} is {other.clock_seconds:.0f} s off; run an NTP client"
            )
        for name in sorted({*first.datasets, *other.datasets}):
            mine, theirs = first.datasets.get(name), other.datasets.get(name)
            if spread and mine != theirs:
                problems.append(
                    f"dataset {name!r} is {_short(theirs)} on {other.host} but {_short(mine)} on "
                    f"{first.host}; copy the same prepared folder to both"
                )
    return problems


def _short(fingerprint: str | None) -> str:
    return "missing" if fingerprint is None else fingerprint[:8]


def ask_nodes(session: Session, database: str, data_dir: str) -> dict[str, NodeReport]:
    """What each node of a cluster says about itself, by Ray's id of it.

    Parameters
    ----------
    session : Session
        A connected cluster.
    database : str
        Run database to reach from there.
    data_dir : str
        Folder of prepared datasets there.

    Raises
    ------
    LaunchError
        A node does not answer.
    """
    import ray as ray_module
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray: Any = ray_module

    def on(node: Node, function: Callable[..., Any]) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0)(function)
        return remote.options(scheduling_strategy=pinned)

    asked = {
        node: on(node, inspect_node).remote(database, data_dir, node.cpus, node.gpus)
        for node in session.nodes
    }
    reports = {}
    for node, answer in asked.items():
        try:
            report = ray.get(answer, timeout=_ANSWER_SECONDS)
            sent = time.time()
            theirs = ray.get(on(node, _clock).remote(), timeout=_ANSWER_SECONDS)
        except Exception as error:
            reason = " ".join(str(error).split())[-300:]
            raise LaunchError(
                f"node {node.node_id[:12]} of the cluster cannot run srsweep: {reason}; install "
                "the same srsweep there (docs/cluster.md)"
            ) from error
        half_trip = (time.time() - sent) / 2
        skew = theirs - sent - half_trip
        reports[node.node_id] = dataclasses.replace(
            report, clock_seconds=0.0 if abs(skew) < half_trip else skew
        )
    return reports


def _clock() -> float:
    return time.time()


def _this_driver(data_dir: str) -> NodeReport:
    return NodeReport(
        host=f"this driver ({host_name()})",
        cpus=0.0,
        gpus=0.0,
        device="",
        versions=_versions(),
        clock_seconds=0.0,
        datasets=_fingerprints(Path(data_dir)),
    )


def refuse_differences(
    reports: Sequence[NodeReport], data_dir: str, needed: Collection[str]
) -> None:
    """Refuse a cluster on which a sweep would be spoilt, before anything is started.

    Parameters
    ----------
    reports : sequence of NodeReport
        All nodes.
    data_dir : str
        Folder of the driver's prepared datasets.
    needed : collection of str
        Datasets of the sweep; others may differ.

    Raises
    ------
    LaunchError
        Versions or datasets differ, or a node cannot reach the run database.
    """
    seen = [
        dataclasses.replace(
            report, datasets={n: f for n, f in report.datasets.items() if n in needed}
        )
        for report in (_this_driver(data_dir), *reports)
    ]
    problems = compare(seen, spread=True)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LaunchError(f"{problems[0]}{more}; 'srsweep cluster check' lists what differs")


def _versions() -> dict[str, str]:
    commit = git_commit()
    return package_versions() | ({"commit": commit} if commit else {})


def _fingerprints(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*/dataset.json")):
        try:
            found[path.parent.name] = str(json.loads(path.read_text())["fingerprint"])
        except (OSError, ValueError, KeyError):
            found[path.parent.name] = "damaged"
    return found


def _absolute(database: str) -> str:
    path = sqlite_path(database)
    return database if path is None else f"sqlite:///{path.resolve()}"
