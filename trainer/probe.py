"""Memory and time of training, measured the same way whichever device and process it runs in.

On CUDA the figures are torch's own: bytes allocated, reserved and their peak. On a CPU they are
resident anonymous bytes above what the process held before the model was built: the interpreter,
the libraries, mapped datasets and whatever an earlier run left behind are not counted. They hold
parameters, optimizer, activations, batches and the work space of the math libraries.
"""

import ctypes
import gc
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from db.measures import MemorySource

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FIELD = re.compile(rb"(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB")
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BLOCK = 2**20
_LARGEST_HOLE = 2**33
_MOST_HOLES = 1024
_IS_MMAPPED = 2  # bit of the size in front of a block, malloc.c
_SAMPLING_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes in use now, held by the allocator, and at most since the last reset."""

    allocated: int
    reserved: int | None
    peak: int


class MemoryProbe:
    """Reads the memory of one device.

    Parameters
    ----------
    device : torch.device
        CUDA, or anything else for the memory of this process.
    """

    source: MemorySource

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._excluded = 0
        self._holes: list[int] = []
        self.source = "cuda_allocated" if device.type == "cuda" else "resident"
        gc.collect()
        release_memory(device)
        if device.type != "cuda":
            self._holes = _keep_large_blocks_out_of_the_heap()
            self._resident = _Resident()
            self._baseline = self._resident.read()[0]
        self.reset_peak()

    def exclude(self, num_bytes: int) -> None:
        """Leave out bytes that the run keeps for its own bookkeeping on the measured device."""
        self._excluded = num_bytes

    def reset_peak(self) -> None:
        """Begin a new period for the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._resident.reset_peak()

    def read(self) -> MemoryReading:
        """Bytes now and since the last reset."""
        if self._device.type == "cuda":
            return MemoryReading(
                torch.cuda.memory_allocated(self._device),
                torch.cuda.memory_reserved(self._device),
                torch.cuda.max_memory_allocated(self._device),
            )
        now, peak = self._resident.read()
        taken = self._baseline + self._excluded
        return MemoryReading(max(now - taken, 0), None, max(peak - taken, 0))

    def close(self) -> None:
        """End what the probe runs."""
        if self._device.type != "cuda":
            self._resident.close()
            _give_back(self._holes)

    def total_bytes(self) -> int:
        """Bytes that the device has."""
        if self._device.type == "cuda":
            return int(torch.cuda.get_device_properties(self._device).total_memory)
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemTotal:") + 1]) * 1024


class _Resident:
    """Anonymous resident bytes of this process and their peak.

    The kernel keeps a high-water mark of all resident bytes and resets it on request. Where that
    is not allowed, a thread looks once a millisecond.
    """

    def __init__(self) -> None:
        self._sampler = None if _reset_high_water_mark() else _Sampler()

    def reset_peak(self) -> None:
        if self._sampler is None:
            _reset_high_water_mark()
        else:
            self._sampler.reset()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def read(self) -> tuple[int, int]:
        status = _status()
        now = status[b"RssAnon"]
        if self._sampler is not None:
            return now, max(now, self._sampler.peak)
        others = status[b"RssFile"] + status[b"RssShmem"]
        return now, max(now, status[b"VmHWM"] - others)


class _Sampler:
    """Highest anonymous resident bytes seen by a thread of its own."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="srsweep-memory")
        self._thread.start()

    def reset(self) -> None:
        self.peak = 0

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLING_SECONDS):
            self.peak = max(self.peak, _status()[b"RssAnon"])


def release_memory(device: torch.device) -> None:
    """Give freed memory back to the system.

    Without it the heap of a process would keep what evaluation or an earlier run freed, and
    later figures would rest on it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif _libc is not None:
        _libc.malloc_trim(0)


def _keep_large_blocks_out_of_the_heap() -> list[int]:
    """Have tensors mapped and unmapped one by one, so that resident bytes end with their use.

    glibc raises its threshold with every large block that is freed, up to 32 MiB, and the heap
    then fragments: resident peaks of equal runs differ by tens of percent. A fixed threshold
    makes them repeat within a few percent; mapping anew costs some time in every step. Holes that
    the heap has by then would still be filled first, whatever the threshold, and stay resident
    after: they are taken, empty, for as long as the probe is in use.

    Returns
    -------
    list of int
        Addresses of the holes, to be freed at the end.
    """
    holes: list[int] = []
    if _libc is None:
        return holes
    _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    size = _LARGEST_HOLE
    while size >= _LARGE_BLOCK and len(holes) < _MOST_HOLES:
        block = _libc.malloc(size)
        if block and not _size_word(block) & _IS_MMAPPED:
            holes.append(block)
            continue
        _libc.free(block)
        size //= 2
    return holes


def _size_word(block: int) -> int:
    return ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value


def _give_back(holes: list[int]) -> None:
    while holes and _libc is not None:
        _libc.free(holes.pop())


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status() -> dict[bytes, int]:
    return {name: int(kib) * 1024 for name, kib in _FIELD.findall(_STATUS.read_bytes())}


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_bytes(b"5")
    except OSError:
        return False
    return True


def _load_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    if not (hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt")):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


_libc = _load_libc()
