"""Starts a sweep: checks everything first, opens Ray where there is work, and hands over."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from db.connect import sqlite_path
from db.errors import LaunchError
from sweeper.agenda import Site
from sweeper.cluster import ask_nodes, refuse_differences
from sweeper.datasets import open_datasets
from sweeper.device import num_local_cpus, num_local_gpus
from sweeper.feasibility import CatalogSize, check_negatives, check_resources
from sweeper.grid import Grid, Resources
from sweeper.interrupt import Interruption, Signals, interruptible
from sweeper.launch_options import LaunchOptions, Outcome
from sweeper.parcels import Parcel, send
from sweeper.planner import Planner
from sweeper.progress import Display
from sweeper.session import Session, ray_session
from sweeper.site import cluster_site, local_site


def launch(grid: Grid, options: LaunchOptions, display: Display) -> Outcome:
    """Run every point of a grid that is not final yet.

    Parameters
    ----------
    grid : Grid
        What to run.
    options : LaunchOptions
        How.
    display : Display
        Where progress goes.

    Returns
    -------
    Outcome
        The state of the sweep at the end.

    Raises
    ------
    SrsweepError
        Something that must be mended first; nothing was started.
    """
    if options.address is not None and sqlite_path(options.database) is not None:
        raise LaunchError(
            "a sweep over several hosts needs PostgreSQL: SQLite is a file on one of them; "
            "give --db postgresql://..., or leave out --address"
        )
    with interruptible() as signals:
        resources = options.resources or grid.resources
        datasets = open_datasets(grid.points, options.data_dir)
        check_negatives(grid.points, {n: CatalogSize(n, d.num_items) for n, d in datasets.items()})
        if options.address is not None:
            with contextlib.ExitStack() as ray:
                session = ray.enter_context(ray_session(options.address))
                node = session.largest_node
                resources = _resolved(resources, node.cpus, node.gpus, "the cluster's largest node")
                site = _inspected(session, options, datasets)
                parcels = _sent(datasets) if options.send_datasets else {}
                planner = Planner(grid, options, resources, site, datasets, display, parcels)
                return _carried_out(planner, session, ray, signals)
        cpus, gpus = _local_size(options, resources)
        resources = _resolved(resources, cpus, gpus, "this machine")
        site = local_site(cpus, gpus if resources.gpus else 0.0)
        planner = Planner(grid, options, resources, site, datasets, display)
        if not planner.unfinished():
            return planner.outcome()
        with contextlib.ExitStack() as ray:
            session = ray.enter_context(ray_session(None, cpus=cpus, gpus=gpus))
            return _carried_out(planner, session, ray, signals)


def _carried_out(
    planner: Planner, session: Session, ray: contextlib.ExitStack, signals: Signals
) -> Outcome:
    """State of the sweep at its end, or after a signal has ended Ray and freed every run."""
    try:
        return planner.carry_out(session, signals)
    except Interruption as interruption:
        ray.close()
        planner.give_back(interruption)
        return planner.outcome(interrupted_by=interruption.number)


def _local_size(options: LaunchOptions, resources: Resources) -> tuple[float, float]:
    """CPU cores and GPUs of a local Ray."""
    cpus = options.cpus or float(num_local_cpus())
    if options.gpus is not None:
        return cpus, options.gpus
    return cpus, 0.0 if resources.gpus == 0 else float(num_local_gpus())


def _resolved(asked: Resources, cpus: float, gpus: float, where: str) -> Resources:
    """Resources of a run with the GPUs that null stands for, refused where no node has them."""
    found = dataclasses.replace(asked, gpus=float(gpus > 0) if asked.gpus is None else asked.gpus)
    check_resources(found, cpus=cpus, gpus=gpus, where=where)
    return found


def _inspected(session: Session, options: LaunchOptions, datasets: Mapping[str, Any]) -> Site:
    """A cluster whose nodes were all asked whether they can carry out the sweep."""
    folder = str(options.data_dir.resolve())
    reports = ask_nodes(session, options.database, folder)
    needed = () if options.send_datasets else datasets.keys()
    refuse_differences(list(reports.values()), folder, needed)
    return cluster_site(session.nodes, reports)


def _sent(datasets: Mapping[str, Any]) -> dict[str, Parcel]:
    """The datasets in the cluster's object store."""
    return {name: send(found.path, found.fingerprint) for name, found in datasets.items()}
