"""What every node of a cluster says about itself, and what in it would spoil a sweep."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.connect import shown, sqlite_path
from db.errors import SrsweepError
from sweeper.device import device_class, host_name, package_versions

MAX_CLOCK_SKEW_SECONDS = 5.0
"""Clocks that differ more make logs unreadable; leases go by the database's clock alone."""
_COMPARED = ("python", "srsweep", "torch", "triton", "ray")


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

    def row(self) -> dict[str, Any]:
        """Values for a table."""
        return {
            "host": self.host,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "device": self.device,
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
    from sweeper.session import ray_session

    with ray_session(address):
        reports = _ask_nodes(database, folder)
    problems = compare(reports, spread=len(reports) > 1)
    if sqlite_path(database) is not None:
        problems.append(
            f"{shown(database)} is a file on one host; a sweep over several needs PostgreSQL"
        )
    return reports, problems


def inspect_node(database: str, data_dir: str, cpus: float = 0.0, gpus: float = 0.0) -> NodeReport:
    """Look at the node that this runs on.

    Parameters
    ----------
    database : str
        Run database to reach.
    data_dir : str
        Folder of prepared datasets.
    cpus, gpus : float
        What Ray counts here.
    """
    from sweeper.device import num_local_cpus, num_local_gpus

    problems = []
    cpus, gpus = cpus or float(num_local_cpus()), gpus or float(num_local_gpus())
    try:
        device = device_class("cuda" if gpus else "cpu")[0]
    except Exception as error:
        device = "unknown"
        problems.append(f"{host_name()}: torch cannot use its GPU: {error}")
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
        versions=package_versions(),
        clock_seconds=0.0,
        datasets=_fingerprints(Path(data_dir)),
        problems=tuple(problems),
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
            if mine != theirs:
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


def _ask_nodes(database: str, data_dir: str) -> list[NodeReport]:
    import ray as ray_module
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray: Any = ray_module
    inspect = ray.remote(num_cpus=0)(_inspect_timed)
    reports = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        pinned = inspect.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        )
        sent = time.time()
        report, theirs = ray.get(
            pinned.remote(database, data_dir, resources.get("CPU", 0.0), resources.get("GPU", 0.0)),
            timeout=120,
        )
        skew = theirs - (sent + time.time()) / 2
        half_trip = (time.time() - sent) / 2
        reports.append(
            dataclasses.replace(report, clock_seconds=0.0 if abs(skew) < half_trip else skew)
        )
    return reports


def _inspect_timed(
    database: str, data_dir: str, cpus: float, gpus: float
) -> tuple[NodeReport, float]:
    now = time.time()
    return inspect_node(database, data_dir, cpus, gpus), now


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
