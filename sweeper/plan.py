"""What the planner decides about a run: try it, on what, in which order, or give it up."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from db.spec import SAMPLED_LOSSES, RunSpec

CONTEXT_BYTES = 700 * 2**20
"""What a process holds on a GPU beside its tensors: CUDA context, kernels, library work spaces."""
SHARED_OUT_OF_MEMORY = "SharedDeviceOutOfMemory"
"""Error class of an attempt that ran out of memory where more could be had: on a share of a
device, or on one that is not the largest."""
TIME_LIMIT = "TimeLimitExceeded"
"""Error class of an attempt that took longer than a run may."""
STALLED = "Stalled"
"""Error class of an attempt whose training reported nothing for too long."""
CUT_SHORT = "CutShort"
"""Error class of an attempt that an early-stopping scheduler ended; its run has no result."""

DETERMINISTIC_ERRORS = frozenset(
    {
        "SpecError",
        "DataError",
        "TypeError",
        "ValueError",
        "KeyError",
        "IndexError",
        "AttributeError",
        "AssertionError",
        "NotImplementedError",
        "ImportError",
        "ModuleNotFoundError",
        TIME_LIMIT,
    }
)
"""Error classes that a second try would only repeat."""


@dataclass(frozen=True)
class Slot:
    """What a worker may use for one run."""

    cpus: float
    gpus: float
    whole: bool = False
    """Whether the run has its device (a GPU, or all cores of a host) to itself."""
    largest: bool = True
    """Whether no device that the launch can use has more memory."""
    accelerator: str | None = None
    """Ray's name of the kind of GPU, where a cluster has several."""

    @property
    def device(self) -> str:
        """Name of the device for torch."""
        return "cuda" if self.gpus else "cpu"

    @property
    def decides(self) -> bool:
        """Whether out of memory here is the run's result, not a reason to try more room."""
        return self.whole and self.largest

    @property
    def timing(self) -> Literal["exclusive", "shared"]:
        """Whether times are measured alone on the device."""
        return "exclusive" if self.whole else "shared"


@dataclass(frozen=True)
class Task:
    """A run to carry out and what it may use."""

    key: str
    slot: Slot


@dataclass(frozen=True)
class RetryLimits:
    """How often a launch tries a run again."""

    lost: int = 3
    """Attempts whose worker vanished (killed, node gone) before the run is given up."""
    errors: int = 2
    """Attempts that ended in an exception before the run is given up."""


@dataclass(frozen=True)
class History:
    """How the attempts of one launch at a run ended."""

    lost: int = 0
    errors: int = 0
    shared_out_of_memory: int = 0
    last_error_class: str | None = None
    last_error_message: str | None = None
    last_loss: str | None = None
    """What was seen when the last worker vanished."""


def reason_to_give_up(history: History, limits: RetryLimits) -> str | None:
    """Why a run is not tried again; None while it is.

    Parameters
    ----------
    history : History
        Attempts of this launch.
    limits : RetryLimits
        How many are allowed.
    """
    error = f"{history.last_error_class}: {history.last_error_message}"
    if history.errors and history.last_error_class in DETERMINISTIC_ERRORS:
        return error
    if history.errors >= limits.errors:
        return f"{error} ({history.errors} attempts)"
    if history.lost >= limits.lost:
        return (
            f"killed: {history.lost} workers vanished at it, the last: "
            f"{history.last_loss or 'not heard of any more'}"
        )
    return None


def summarise(attempts: Iterable[Mapping[str, object]]) -> dict[str, History]:
    """History per run key from rows with run_key, status, error_class, error_message, by number."""
    found: dict[str, History] = {}
    for row in attempts:
        key, status = str(row["run_key"]), row["status"]
        old = found.get(key, History())
        shared = row["error_class"] == SHARED_OUT_OF_MEMORY
        is_error = status == "error" and not shared
        found[key] = History(
            lost=old.lost + (status == "lost"),
            errors=old.errors + is_error,
            shared_out_of_memory=old.shared_out_of_memory + shared,
            last_error_class=str(row["error_class"]) if is_error else old.last_error_class,
            last_error_message=str(row["error_message"]) if is_error else old.last_error_message,
            last_loss=_text(row["error_message"]) if status == "lost" else old.last_loss,
        )
    return found


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def predicted_cost(spec: RunSpec, num_items: int) -> float:
    """Relative time of a run, for putting long runs first; no unit.

    Multiply-adds per token of the transformer blocks and the loss, times the tokens kept per
    user; a fixed part per optimizer step makes small batches dearer.
    """
    width = spec.embedding_dim
    if spec.loss in SAMPLED_LOSSES:
        scored = 1 + (spec.num_negatives or 0)
    elif spec.loss == "sce":
        scored = spec.sce_bucket_size_y
    else:
        scored = num_items
    blocks = spec.num_blocks * (12 * width**2 + 2 * width * spec.max_seq_len)
    per_user = spec.max_seq_len * (blocks + 2 * width * scored)
    overhead = 20_000_000 / spec.batch_size
    return spec.max_epochs * (per_user + overhead)
