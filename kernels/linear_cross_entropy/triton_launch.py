"""How the Triton kernels are launched: block sizes, splits, scaling of gradients.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this module, which every kernel module
is imported after, fixes at import whether the kernels run in the interpreter.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels of this process run in Triton's interpreter, on CPU tensors."""

GRADIENT_SCALE = 2.0**13
"""Factor on normalised gradients before they are cast to fp16 for a matrix product."""
FIXED_POINT = 2.0**36
"""Units of the deterministic mode's integers: steps of 1.5e-11, range 1.3e8, of the largest
upstream gradient."""
_MAX_WHOLE_WIDTH = 256
_PART_WIDTH = 128
_MAX_ROW_STRIDE = 2**22


@dataclass(frozen=True)
class TileConfig:
    """Block sizes of a kernel over tiles of logits."""

    rows: int
    """Tokens per tile."""
    columns: int
    """Items per tile."""
    width: int
    """Embedding columns per matrix product, a power of two."""
    num_parts: int
    """Such parts in the width."""
    num_warps: int = 8
    """Warps per program."""
    num_stages: int = 2
    """Depth of the software pipeline."""


def tile_config(
    kernel: str, width: int, dtype: torch.dtype, max_rows: int, *, gathers: bool = False
) -> TileConfig:
    """Block sizes from a static table: kernel, width, dtype.

    Parameters
    ----------
    kernel : {'forward', 'grad_e', 'grad_c'}
        Which kernel.
    width : int
        D.
    dtype : torch.dtype
        Of the inputs.
    max_rows : int
        Tokens that share their columns; tiles are no taller than they need to be.
    gathers : bool
        Whether the items of a tile are anywhere in the catalog.
    """
    block = max(16, triton.next_power_of_2(width))
    num_parts = 1
    if block > _MAX_WHOLE_WIDTH:
        block, num_parts = _PART_WIDTH, -(-width // _PART_WIDTH)
    wide = dtype == torch.float32
    if INTERPRETED:
        rows, columns, warps, stages = 128, 256, 4, 1
    elif kernel == "forward":
        rows, columns, warps, stages = (64, 64, 4, 2) if wide else (128, 128, 8, 2)
        columns = min(columns, 64) if gathers else columns
    elif wide:
        rows, columns, warps, stages = (32, 32, 8, 1) if block > 128 else (64, 32, 8, 2)
    elif kernel == "grad_e":
        rows, columns, warps, stages = (128, 32, 8, 3) if block > 128 else (128, 64, 8, 2)
    else:
        rows, columns, warps, stages = (32, 128, 8, 2) if block > 128 else (64, 128, 8, 2)
    rows = min(rows, max(16, triton.next_power_of_2(max_rows)))
    return TileConfig(rows, columns, block, num_parts, warps, stages)


def token_config(width: int) -> tuple[int, int, int]:
    """Tokens per program, padded width and warps of the per-token kernels."""
    block = max(16, triton.next_power_of_2(width))
    if INTERPRETED:
        return 256, block, 4
    return max(4, min(32, 2048 // block)), block, 4


def num_splits(programs: int, most: int, device: torch.device) -> int:
    """Parts to cut a reduction into so that every multiprocessor has work."""
    if INTERPRETED or not torch.cuda.is_available():
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, wanted // max(1, programs)))


def precision(dtype: torch.dtype) -> str:
    """Input precision of float32 matrix products, after torch's own setting."""
    if dtype != torch.float32 or INTERPRETED:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcasts(dtype: torch.dtype) -> bool:
    """Whether tiles are cast to float32 on loading: bf16 in the interpreter is silently wrong."""
    return INTERPRETED and dtype == torch.bfloat16


def row_major(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can address it, else a copy.

    Rows must be contiguous, and those of one tile within 32-bit offsets of its first.
    """
    whole = tensor.stride(1) == 1 or tensor.shape[1] == 1
    return tensor if whole and tensor.stride(0) <= _MAX_ROW_STRIDE else tensor.contiguous()


@dataclass(frozen=True, eq=False)
class ScaledGradients:
    """Upstream gradients over the largest of them, so that no dtype under- or overflows."""

    base: Tensor
    """Of the log-sum-exp (or sum), shape (N,)."""
    target: Tensor
    """Of the target logit, shape (N,)."""
    mean: Tensor | None
    """Of each logit by way of the mean, shape (N,)."""
    largest: Tensor
    """Shape (): what undoes the division."""

    @classmethod
    def of(cls, base: Tensor, target: Tensor, mean: Tensor | None, factor: float) -> Self:
        """Divide by the largest magnitude and multiply by `factor`, on the device."""
        largest = torch.maximum(base.abs().amax(), target.abs().amax())
        if mean is not None:
            largest = torch.maximum(largest, mean.abs().amax())
        largest = torch.where(largest == 0, 1.0, largest).float()
        scale = factor / largest
        return cls(
            (base * scale).float(),
            (target * scale).float(),
            None if mean is None else (mean * scale).float(),
            largest / factor,
        )
