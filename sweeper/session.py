"""A Ray that keeps quiet, listens on the loopback only and cleans up after itself."""

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import LaunchError
from sweeper.device import process_is_alive, process_space

_FOLDER_PREFIX = f"srs-{process_space()[:8]}-"
_MIN_OBJECT_STORE = 80 * 2**20
_ANSWER_SECONDS = 5.0

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with 1, verbose=0 still prints a box
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "3",  # seconds until a wrong token is believed; 20 by default
    "RAY_memory_monitor_refresh_ms": "0",  # its kills end the whole of Tuner.fit
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's swallows Ctrl-C and ends with exit code 0
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its snapshots are not the record
    "TUNE_WARN_THRESHOLD_S": "600",
    "TUNE_MAX_PENDING_TRIALS_PG": "256",  # the agenda says how many; with a searcher it is 1
}
_LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes every port of a local Ray loopback
    "RAY_AUTH_MODE": "disabled",
}


@dataclass(frozen=True)
class Node:
    """A living node as Ray counts it."""

    cpus: float
    gpus: float
    accelerator: str | None = None
    """Ray's name of its kind of GPU."""
    node_id: str = ""


@dataclass(frozen=True)
class Session:
    """A connected Ray and the folder for its files."""

    folder: Path
    nodes: tuple[Node, ...]

    @property
    def largest_node(self) -> Node:
        """The node with most GPUs, then CPU cores: what one run can have at most."""
        return max(self.nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0.0, 0.0))


@contextlib.contextmanager
def ray_session(
    address: str | None, *, cpus: float | None = None, gpus: float | None = None
) -> Iterator[Session]:
    """Start a Ray of one's own, or connect to a cluster, and leave nothing behind.

    Parameters
    ----------
    address : str or None
        None starts a local Ray on the loopback; else the `host:port` of a cluster's head. The
        token of the cluster is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    cpus, gpus : float, optional
        What a local Ray may use; all there is by default.

    Raises
    ------
    LaunchError
        No Ray can be started, or none answers at the address, or no token is set for it.
    """
    os.environ.update(_QUIET)
    if address is None:
        os.environ.update(_LOCAL)
    else:
        _require_token(address)
    import ray as ray_module

    ray: Any = ray_module

    remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=_short_temp()))
    try:
        _connect(ray, address, folder, cpus, gpus)
        yield Session(folder, tuple(_node(node) for node in ray.nodes() if node["Alive"]))
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _node(found: dict[str, Any]) -> Node:
    resources = found["Resources"]
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return Node(
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        max(kinds, key=len, default=None),  # of A100 and A100-80G the one that says more
        str(found["NodeID"]),
    )


def _connect(
    ray: Any, address: str | None, folder: Path, cpus: float | None, gpus: float | None
) -> None:
    common = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=_MIN_OBJECT_STORE,
                _temp_dir=str(folder),
                **common,
            )
        else:
            _require_answer(address)
            with _silent_stderr():
                ray.init(address=address, **common)
    except LaunchError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if "ersion mismatch" in reason:
            raise LaunchError(
                f"the Ray cluster at {address!r} runs other versions than this driver: {reason}"
            ) from error
        if address is None:
            raise LaunchError(f"Ray cannot start on this machine: {reason}") from error
        raise LaunchError(
            f"what listens at {address!r} does not let this driver in: {reason}; check that it is "
            "the head of a Ray cluster, and that RAY_AUTH_TOKEN is the token of its nodes"
        ) from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what Ray's C++ parts say about each failed try off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise LaunchError(f"--address {address!r} must be the HOST:PORT of a cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"no Ray cluster can be reached at {address!r}: {error}; check the address, that "
            "'ray start --head' runs there, and the firewall between"
        ) from error
    if not _has_local_node():
        raise LaunchError(
            "no Ray node runs on this machine, and a driver needs one beside it; start it with "
            f"'ray start --address={address} --num-cpus=0', or launch on the head"
        )


def _has_local_node() -> bool:
    """Whether a raylet runs where this process can see it."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == "raylet":
                return True
    return False


def _require_token(address: str) -> None:
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    tokens = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if mode == "token" and not any(os.environ.get(name) for name in tokens):
        raise LaunchError(
            f"no token for the Ray cluster at {address!r}: set RAY_AUTH_TOKEN to the token its "
            "nodes were started with (docs/cluster.md), or RAY_AUTH_MODE=disabled for a cluster "
            "without one"
        )


def _short_temp() -> str:
    """Folder for sockets, whose paths may have 107 bytes at most."""
    folder = tempfile.gettempdir()
    short = Path("/tmp")
    return str(short) if len(folder) > 30 and os.access(short, os.W_OK) else folder


def remove_stale_folders() -> None:
    """Remove the folders of drivers that were killed before they could clean up."""
    for folder in Path(_short_temp()).glob(f"{_FOLDER_PREFIX}*-*"):
        owner = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            ours = folder.stat().st_uid == os.getuid()
            if owner.isdecimal() and ours and not process_is_alive(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
