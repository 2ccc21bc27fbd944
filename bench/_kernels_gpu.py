"""The paper's six shapes on a GPU: milliseconds, bytes, rooflines and peers, in one process."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import kernels as shapes
from bench import measure
from kernels.linear_cross_entropy.api import linear_cross_entropy
from kernels.negatives import Negatives

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BUDGET_SECONDS = 8.0
"""Longest that the repeats of one variant at one shape may take."""


def roofline_seconds(kind: str, num_tokens: int, num_items: int, num: int, share: int) -> float:
    """Least time of forward and backward: matrix units or memory, whichever is slower.

    Full softmax: one matrix pass forward, three backward. Sampled: two gathers of embeddings and
    one read-modify-write of fp32 gradients per set, against four matrix passes where sets are
    shared.
    """
    width = shapes.WIDTH
    if kind == "full":
        return 4 * 2 * num_tokens * num_items * width / shapes.BF16_FLOPS
    gathered = num_tokens / share * num * width
    table_fits_l2 = num_items * width * 2 < 30e6
    rate = shapes.L2_BYTES_PER_SECOND if table_fits_l2 else shapes.HBM_BYTES_PER_SECOND
    memory = 2 * gathered * 2 / rate + gathered * 8 / shapes.HBM_BYTES_PER_SECOND
    if share == 1:
        return memory
    return max(memory, 4 * 2 * num_tokens * num * width / shapes.BF16_FLOPS)


def peers() -> tuple[dict[str, Loss], list[str]]:
    """Other people's full softmax, and the names of those that are not installed."""
    found: dict[str, Loss] = {}
    missing = []
    functional = torch.nn.functional
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024)
        found["F.linear_cross_entropy"] = lambda e, weight, target: functional.linear_cross_entropy(
            e, weight, target, options=options
        )
    else:
        missing.append("F.linear_cross_entropy")
    try:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut-cross-entropy (unfiltered)"] = lambda e, weight, target: cut(
            e, weight, target, filter_eps=None, impl="cce"
        )
        found["cut-cross-entropy"] = lambda e, weight, target: cut(e, weight, target, impl="cce")
    except ImportError:
        missing.append("cut-cross-entropy")
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional")
        fused = liger.liger_fused_linear_cross_entropy
        found["liger-kernel"] = lambda e, weight, target: fused(e, weight, target)
    except ImportError:
        missing.append("liger-kernel")
    return found, missing


def gpu_rows(names: list[str], rounds: int) -> list[dict[str, object]]:
    """Rows of the table; none where the tests of the losses fail on this GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; the GPU figures stay open")
    _require_green()
    others, missing = peers()
    print(f"left out, not installed: {', '.join(missing) or 'none'}")
    peak = _matrix_rate()
    rows: list[dict[str, object]] = [
        {"part": "gpu", "variant": "measured bf16 rate", "tflops": peak / 1e12}
    ]
    for name in names:
        num_tokens, num_items, num = shapes.SHAPES[name]
        generator = torch.Generator("cuda").manual_seed(0)
        common = {"dtype": torch.bfloat16, "device": "cuda", "generator": generator}
        e = torch.randn(num_tokens, shapes.WIDTH, **common).requires_grad_()  # type: ignore[call-overload]
        weight = torch.randn(num_items, shapes.WIDTH, **common).mul_(1 / 16).requires_grad_()  # type: ignore[call-overload]
        target = torch.randint(num_items, (num_tokens,), device="cuda", generator=generator)
        for variant, (loss, kind, share) in _variants(num_tokens, num, others).items():
            floor = roofline_seconds(kind, num_tokens, num_items, num, share)
            row: dict[str, object] = {
                "part": "gpu", "shape": name, "variant": variant, "num_tokens": num_tokens,
                "num_items": num_items, "num_negatives": num if kind == "sampled" else "",
                "roofline_ms": 1e3 * floor,
            }  # fmt: skip
            if floor > BUDGET_SECONDS:
                rows.append(row | {"error": "above the time budget by its roofline"})
                continue
            rows.append(row | _time(loss, e, weight, target, floor, rounds))
            print(measure.table(rows[-1:]), flush=True)
        del e, weight, target
        torch.cuda.empty_cache()
    return rows


def _variants(
    num_tokens: int, num: int, others: dict[str, Loss]
) -> dict[str, tuple[Loss, str, int]]:
    def sampled(share: int | str, deterministic: bool = False) -> Loss:
        negatives = Negatives(num, share=share, seed=1)  # type: ignore[arg-type]
        return lambda e, weight, target: linear_cross_entropy(  # type: ignore[return-value]
            e, weight, target, negatives=negatives, deterministic=deterministic
        )

    table: dict[str, tuple[Loss, str, int]] = {
        "cce": (lambda e, w, y: linear_cross_entropy(e, w, y), "full", 1),  # type: ignore[dict-item,return-value]
        "cce drop 2**-12": (
            lambda e, w, y: linear_cross_entropy(e, w, y, filter_eps=2.0**-12), "full", 1,  # type: ignore[dict-item,return-value]
        ),
        "cce_minus": (sampled(1), "sampled", 1),
        "cce_minus share 128": (sampled(128), "sampled", 128),
        "cce_minus share 128 deterministic": (sampled(128, True), "sampled", 128),
        "cce_minus share 1024": (sampled(1024), "sampled", 1024),
        "cce_minus share batch": (sampled("batch"), "sampled", num_tokens),
        "dense": (lambda e, w, y: torch.nn.functional.cross_entropy(e @ w.T, y), "full", 1),
    }  # fmt: skip
    return table | {name: (loss, "full", 1) for name, loss in others.items()}


def _time(
    loss: Loss, e: Tensor, weight: Tensor, target: Tensor, floor: float, rounds: int
) -> dict[str, object]:
    forward, total = [], []
    try:
        for number in range(1 + max(1, min(rounds, int(BUDGET_SECONDS / max(floor, 1e-3))))):
            e.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            value = loss(e, weight, target)
            marks[1].record()
            value.backward()  # type: ignore[no-untyped-call]
            marks[2].record()
            torch.cuda.synchronize()
            if number:
                forward.append(marks[0].elapsed_time(marks[1]))
                total.append(marks[0].elapsed_time(marks[2]))
    except (RuntimeError, ValueError) as problem:
        torch.cuda.empty_cache()
        return {"error": str(problem).splitlines()[0][:120]}
    low, middle, high = measure.spread(total)
    gradients = e.nbytes + weight.nbytes
    return {
        "forward_ms": measure.spread(forward)[1],
        "ms": middle, "ms_20": low, "ms_80": high,
        "over_roofline": middle / (1e3 * floor),
        "extra_bytes": torch.cuda.max_memory_allocated() - before - gradients,
        "finite": math.isfinite(float(value.detach())),
    }  # fmt: skip


def _matrix_rate() -> float:
    """Measured bf16 matrix rate of this GPU, operations per second."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * 8192**3 / (1e-3 * sorted(times)[len(times) // 2])


def _require_green() -> None:
    """No figure on red."""
    tests = Path(__file__).parent.parent / "tests" / "kernels_tests" / "test_losses.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", str(tests)]
    if subprocess.run([*command, "-k", "full_softmax or sampled_softmax"], check=False).returncode:
        raise SystemExit("the losses' tests fail on this GPU; no figure is reported")
