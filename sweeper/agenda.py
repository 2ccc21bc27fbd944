"""What is started next, and on which device: the packing of runs onto GPUs.

The planner offers the pending runs; whoever has room asks for the next one. Runs whose time is a
result have a GPU to themselves. Others share one by predicted memory. The longest come first; a
run that needs a whole GPU reserves one, so that short ones cannot keep it out for ever. A run that
probably does not fit waits until the smallest of its kind has been tried: if that one does not
fit, the others need no try.

Knows neither Ray nor the database, so a simulation runs the same code.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from db.spec import RunSpec
from sweeper.feasibility import dominates, shape_of_memory
from sweeper.forecast import Forecast, MemoryForecaster, gpu_share
from sweeper.grid import Resources
from sweeper.plan import CONTEXT_BYTES, Slot, Task

WINDOW = 400
"""Waiting runs that are looked at for one that fits; the rest wait their turn."""
_MAX_FAILED_STARTS = 2
_EPSILON = 1e-6


@dataclass(frozen=True)
class DeviceGroup:
    """The GPUs of one kind."""

    num_gpus: int
    device_class: str | None = None
    memory_bytes: int | None = None
    accelerator: str | None = None
    """Ray's name of the kind, where a cluster has several."""


@dataclass(frozen=True)
class Site:
    """What a launch may use."""

    cpus: float
    """Cores of all nodes."""
    cpus_of_node: float
    """Cores of the node that one run can have at most."""
    groups: tuple[DeviceGroup, ...] = ()
    """GPUs by kind, the smallest memory first."""
    host_memory_bytes: int | None = None

    @property
    def largest_memory_bytes(self) -> int | None:
        """Memory of the largest device that runs can get."""
        return self.groups[-1].memory_bytes if self.groups else self.host_memory_bytes


@dataclass(frozen=True)
class Candidate:
    """A pending run."""

    key: str
    spec: RunSpec
    cost: float
    """Predicted time, in any unit."""
    needs_whole: bool = False
    """It did not fit into a share, or on a smaller device: the largest whole one decides."""


@dataclass
class _Running:
    candidate: Candidate
    cpus: float
    gpus: list[tuple[int, int, float]] = field(default_factory=list)
    """Group, number of the GPU and share of it."""


class Agenda:
    """The pending runs of a launch and what its devices have room for; thread-safe.

    Parameters
    ----------
    site : Site
        Devices.
    resources : Resources
        What one run asks for.
    max_concurrent : int, optional
        Most runs at a time.
    lookahead : int
        Runs handed out beyond what fits, so that a reused CPU worker finds one waiting.
    """

    def __init__(
        self,
        site: Site,
        resources: Resources,
        *,
        max_concurrent: int | None = None,
        lookahead: int | None = None,
    ) -> None:
        self._site = site
        self._resources = resources
        self._max_concurrent = max_concurrent
        self._on_gpus = bool(resources.gpus) and bool(site.groups)
        slots = max(1, int(site.cpus / resources.cpus))
        self._lookahead = max(2, slots // 8) if lookahead is None else lookahead
        if self._on_gpus:
            self._lookahead = 0
        self._lock = threading.RLock()
        self._waiting: list[Candidate] = []
        self._running: dict[str, _Running] = {}
        self._used = [[0.0] * group.num_gpus for group in site.groups]
        self._used_cpus = 0.0
        self._reserved: tuple[str, int, int] | None = None
        self._forecaster: MemoryForecaster | None = None
        self._forecasts: dict[str, Forecast] = {}
        self._undecided: dict[object, list[Candidate]] = {}
        self._ended: list[Candidate] = []
        self._failed_starts: dict[str, int] = {}
        self._closed = False

    def mark(self) -> int:
        """A moment, to give to `offer` with what was read from the database after it."""
        with self._lock:
            return len(self._ended)

    def offer(self, candidates: Sequence[Candidate], mark: int = 0) -> None:
        """Replace the waiting runs.

        Parameters
        ----------
        candidates : sequence of Candidate
            Pending runs; those that were handed out and have not ended are left out here.
        mark : int
            Runs that ended after this moment are left out too: their status was read before.
        """
        with self._lock:
            lately = self._ended[mark:]
            out = {*self._running, *(candidate.key for candidate in lately)}
            out |= {k for k, n in self._failed_starts.items() if n >= _MAX_FAILED_STARTS}
            kept = [candidate for candidate in candidates if candidate.key not in out]
            self._waiting = sorted(kept, key=lambda candidate: -candidate.cost)
            running = [one.candidate for one in self._running.values()]
            self._find_undecided([*kept, *running, *lately])

    def learn(self, forecaster: MemoryForecaster) -> None:
        """Use other predictions from now on."""
        with self._lock:
            self._forecaster = forecaster
            self._forecasts.clear()
            running = [one.candidate for one in self._running.values()]
            self._find_undecided([*self._waiting, *running])

    def close(self) -> None:
        """Hand out nothing more; running runs go on."""
        with self._lock:
            self._closed = True

    def reopen(self) -> None:
        """Begin another round: runs whose worker could not start are tried again."""
        with self._lock:
            self._failed_starts.clear()
            for key in list(self._running):
                self._release(key)

    @property
    def is_idle(self) -> bool:
        """Whether nothing that was handed out still runs."""
        with self._lock:
            return not self._running

    @property
    def waiting(self) -> list[str]:
        """Keys of the runs that were not handed out, in their order."""
        with self._lock:
            return [candidate.key for candidate in self._waiting]

    @property
    def unfinished(self) -> list[str]:
        """Keys of the runs that wait or run."""
        with self._lock:
            return [*self._running, *(candidate.key for candidate in self._waiting)]

    def ended(self, key: str, *, started: bool = True) -> None:
        """Take back the room of a run.

        Parameters
        ----------
        key : str
            Run that was handed out.
        started : bool
            Whether its worker came as far as returning something.
        """
        with self._lock:
            running = self._release(key)
            if running is not None:
                self._ended.append(running.candidate)
            if not started:
                self._failed_starts[key] = self._failed_starts.get(key, 0) + 1

    def next(self) -> Task | None:
        """The run to start now and what it may use; None when there is none or no room."""
        with self._lock:
            if self._closed or len(self._running) == self._max_concurrent:
                return None
            if self._on_gpus and min(min(used) for used in self._used) > 1 - 0.01 + _EPSILON:
                return None
            return self._first(lenient=False) or self._first(lenient=True)

    def _first(self, *, lenient: bool) -> Task | None:
        """Start the first run that has room; `lenient` where a GPU would be idle otherwise."""
        if lenient and not self._undecided:
            return None
        for number, candidate in enumerate(self._waiting[:WINDOW]):
            if self._is_held(candidate, lenient=lenient):
                continue
            task = self._start(candidate)
            if task is not None:
                del self._waiting[number]
                return task
            if not self._on_gpus:
                return None
        return None

    def _start(self, candidate: Candidate) -> Task | None:
        resources = self._resources
        if not self._on_gpus:
            whole = candidate.needs_whole
            cpus = self._site.cpus_of_node if whole else resources.cpus
            room = self._site.cpus + self._lookahead * resources.cpus
            if self._running and self._used_cpus + cpus > room + _EPSILON:
                return None
            slot = Slot(cpus, 0.0, whole=whole or cpus >= self._site.cpus_of_node)
            return self._hand_out(candidate, slot, _Running(candidate, cpus))
        if self._running and self._used_cpus + resources.cpus > self._site.cpus + _EPSILON:
            return None
        for number in self._groups_for(candidate):
            gpus = self._gpus_on(candidate, self._site.groups[number])
            places = self._places(candidate.key, number, gpus)
            if places is not None:
                slot = Slot(
                    resources.cpus,
                    gpus,
                    whole=gpus >= 1,
                    largest=number == len(self._site.groups) - 1,
                    accelerator=self._site.groups[number].accelerator,
                )
                return self._hand_out(candidate, slot, _Running(candidate, resources.cpus, places))
        return None

    def _hand_out(self, candidate: Candidate, slot: Slot, running: _Running) -> Task:
        self._running[candidate.key] = running
        self._used_cpus += running.cpus
        for group, gpu, share in running.gpus:
            self._used[group][gpu] += share
        if self._reserved is not None and self._reserved[0] == candidate.key:
            self._reserved = None
        return Task(candidate.key, slot)

    def _release(self, key: str) -> _Running | None:
        running = self._running.pop(key, None)
        if running is None:
            return None
        self._used_cpus -= running.cpus
        for group, gpu, share in running.gpus:
            left = self._used[group][gpu] - share
            self._used[group][gpu] = left if left > _EPSILON else 0.0
        return running

    def _groups_for(self, candidate: Candidate) -> Iterator[int]:
        """Groups that a run may go to, the smallest on which it fits first."""
        last = len(self._site.groups) - 1
        forecast = self._forecast(candidate)
        for number, group in enumerate(self._site.groups):
            fits = (
                forecast is not None
                and group.memory_bytes is not None
                and not candidate.needs_whole
                and forecast.upper + CONTEXT_BYTES <= group.memory_bytes
            )
            if fits or number == last:
                yield number

    def _gpus_on(self, candidate: Candidate, group: DeviceGroup) -> float:
        """GPUs, or the share of one, that a run gets in a group."""
        asked = self._resources.gpus or 1.0
        if candidate.needs_whole:
            return max(1.0, asked)
        if self._resources.timing == "exclusive" or asked != 1.0:
            return asked
        forecast = self._forecast(candidate)
        if forecast is None or group.memory_bytes is None:
            return 1.0
        return gpu_share(forecast.upper, group.memory_bytes)

    def _places(self, key: str, group: int, gpus: float) -> list[tuple[int, int, float]] | None:
        """Where a run goes: the fullest GPU that has room, as Ray does; None when none has."""
        used = self._used[group]
        if gpus >= 1:
            free = [n for n, share in enumerate(used) if not share]
            if len(free) >= gpus:
                return [(group, n, 1.0) for n in free[: round(gpus)]]
            if self._reserved is None and gpus == 1:
                self._reserved = (key, group, min(range(len(used)), key=used.__getitem__))
            return None
        held = self._reserved[1:] if self._reserved is not None else None
        room = [
            n for n, share in enumerate(used) if share + gpus <= 1 + _EPSILON and (group, n) != held
        ]
        return [(group, max(room, key=used.__getitem__), gpus)] if room else None

    def _forecast(self, candidate: Candidate) -> Forecast | None:
        if self._forecaster is None:
            return None
        if candidate.key not in self._forecasts:
            self._forecasts[candidate.key] = self._forecaster.predict(candidate.spec)
        return self._forecasts[candidate.key]

    def _is_doubtful(self, candidate: Candidate, *, lenient: bool = False) -> bool:
        """Whether a run may not fit on any device; `lenient`: whether it probably does not."""
        largest = self._site.largest_memory_bytes
        forecast = self._forecast(candidate) if self._on_gpus and largest else None
        if forecast is None:
            return False
        needed = forecast.expected if lenient else forecast.upper
        return needed + CONTEXT_BYTES > (largest or 0)

    def _is_held(self, candidate: Candidate, *, lenient: bool) -> bool:
        """Whether a smaller run of its kind decides first whether this one can fit at all."""
        if not self._undecided or not self._is_doubtful(candidate, lenient=lenient):
            return False
        rivals = self._undecided.get(shape_of_memory(candidate.spec), [])
        return any(_precedes(rival, candidate) for rival in rivals)

    def _find_undecided(self, candidates: Iterable[Candidate]) -> None:
        self._undecided = {}
        for candidate in candidates:
            if self._is_doubtful(candidate):
                kind = shape_of_memory(candidate.spec)
                self._undecided.setdefault(kind, []).append(candidate)


def _precedes(one: Candidate, other: Candidate) -> bool:
    """Whether the first is no larger than the second; of two equal ones, one precedes."""
    if not dominates(other.spec, one.spec):
        return False
    return not dominates(one.spec, other.spec) or one.key < other.key
