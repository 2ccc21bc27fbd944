"""What a device can do, what it says when its memory ends, and getting it ready."""

import functools
import re
from dataclasses import dataclass

import torch

from db.errors import SpecError
from db.spec import RunSpec
from trainer.plain_losses import cross_entropy

_WARM_UP_SIZE = 512


def check_device(spec: RunSpec, device: torch.device) -> None:
    """Refuse a device that is not there or cannot compute in the precision asked for.

    Raises
    ------
    SpecError
        With what is possible instead.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise SpecError(f"device={str(device)!r} is not supported; use cpu or cuda")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SpecError(
            f"device={str(device)!r} is not there: torch sees {count} CUDA devices; use cpu"
            + (f" or cuda:0 to cuda:{count - 1}" if count else "")
        )
    if spec.precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise SpecError(f"precision='bf16' is not supported by {name}; use fp16 or fp32")


@dataclass(frozen=True, slots=True)
class MemoryShortage:
    """An allocation that failed; bytes asked for, if the message tells."""

    requested: int | None


_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def memory_shortage(error: BaseException) -> MemoryShortage | None:
    """What was asked for when memory ran out; None if the error is another one."""
    text = str(error)
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not known and "allocate memory" not in text and "not enough memory" not in text:
        return None
    found = re.search(r"(?:[Tt]ried to|[Uu]nable to) allocate ([\d.]+) (\w+)", text)
    if found is None:
        return MemoryShortage(None)
    return MemoryShortage(int(float(found[1]) * _UNITS.get(found[2].rstrip("."), 1)))


@functools.cache
def warm_up(device: torch.device) -> None:
    """Run a toy step, so that libraries load now and take now what they keep for good.

    The first optimizer and the first matrix products of a process take tens of megabytes and
    over a second, which are no part of the run that happens to come first.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = _WARM_UP_SIZE
    weight = torch.randn(size, size, generator=generator, device=device).requires_grad_()
    optimizer = torch.optim.Adam([weight], fused=True)
    hidden = torch.nn.functional.layer_norm(weight @ weight, (size,))
    heads = hidden.view(1, 8, size, -1)
    attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    targets = torch.zeros(size, dtype=torch.int64, device=device)
    torch.autograd.backward(cross_entropy(attended.reshape(size, -1), weight, targets))
    torch.nn.utils.get_total_norm([weight.grad]).item()  # type: ignore[list-item]
    optimizer.step()
