"""Which machine, device and code a worker is: what is stored with every attempt."""

import functools
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from db.errors import LaunchError

_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = ("srsweep", "torch", "triton", "ray", "numpy")


def num_local_gpus() -> int:
    """NVIDIA GPUs that this process may use, found without importing torch."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as manager

    visible = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def num_local_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def host_name() -> str:
    """Name of this host."""
    return socket.gethostname()


@functools.cache
def process_space() -> str:
    """Identity of the space in which process ids of this host mean something.

    The boot and the pid namespace take part: two containers of one name differ, and so does a
    host before and after a restart.
    """
    parts = [host_name()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = os.path.islink(path)
            parts.append(os.readlink(path) if link else Path(path).read_text().strip())
        except OSError:
            parts.append("unknown")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def process_is_alive(pid: int) -> bool:
    """Whether a process of this host runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


@functools.cache
def cpu_device_class() -> str:
    """Name of the CPU: `cpu` and its model."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    model = found.group(1).strip() if found else platform.machine()
    return f"cpu {model}"


def host_memory_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_class(device: str) -> tuple[str, int]:
    """Class of a device and its memory; memory and time are compared within one class only.

    Parameters
    ----------
    device : str
        `cpu` or a CUDA device as torch names it.
    """
    if device == "cpu":
        return cpu_device_class(), host_memory_bytes()
    import torch

    properties = torch.cuda.get_device_properties(device)
    total = int(properties.total_memory)
    return f"{properties.name} {total / 2**30:.0f} GiB", total


def gpu_classes() -> list[tuple[str, int]]:
    """Class and memory of each GPU that this process may use.

    Found by another process, so that this one never holds memory on a GPU.

    Raises
    ------
    LaunchError
        torch cannot use them.
    """
    code = (
        "import json, torch; from sweeper.device import device_class; "
        "print(json.dumps([device_class(f'cuda:{n}') for n in range(torch.cuda.device_count())]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise LaunchError(f"torch cannot use the GPUs of {host_name()}: {reason[:300]}")
    return [(str(name), int(memory)) for name, memory in json.loads(done.stdout)]


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver of this host."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def kernel_memory_kills() -> int | None:
    """Processes of this host that the kernel has killed for want of memory; None if unknown."""
    try:
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return None


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of what computes a run."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of this checkout, with `+` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
