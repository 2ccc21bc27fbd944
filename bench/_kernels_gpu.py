"""The paper's six shapes on a GPU: milliseconds, bytes, rooflines and peers, in one process."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
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
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
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
    rate = _matrix_rate()
    rows: list[dict[str, object]] = [
        {"part": "gpu", "variant": "measured bf16 rate", "tflops": rate / 1e12}
    ]
    for name in names:
        num_tokens, num_items, num = shapes.SHAPES[name]
        generator = torch.Generator("cuda").manual_seed(0)
        common = {"dtype": torch.bfloat16, "device": "cuda", "generator": generator}
        e = torch.randn(num_tokens, shapes.WIDTH, **common).requires_grad_()  # type: ignore[call-overload]
        weight = torch.randn(num_items, shapes.WIDTH, **common).mul_(1 / 16).requires_grad_()  # type: ignore[call-overload]
        target = torch.randint(num_items, (num_tokens,), device="cuda", generator=generator)
        made = []
        table = _variants(num_tokens, num, others)
        floors = {
            variant: roofline_seconds(kind, num_tokens, num_items, num, share)
            for variant, (_, kind, share) in table.items()
        }
        timed = interleaved(
            {variant: loss for variant, (loss, _, _) in table.items()}, e, weight, target, floors,
            rounds,
        )  # fmt: skip
        for variant, (_, kind, share) in table.items():
            row: dict[str, object] = {
                "part": "gpu", "shape": name, "variant": variant, "num_tokens": num_tokens,
                "num_items": num_items, "num_negatives": num if kind == "sampled" else "",
                "roofline_ms": 1e3 * floors[variant], "must": _must(variant, share),
            }  # fmt: skip
            made.append(row | timed[variant])
        add_ratios(made, 2 * num_tokens * num_items * shapes.WIDTH / rate)
        print(measure.table(made), flush=True)
        rows += made
        del e, weight, target
        torch.cuda.empty_cache()
    return rows


def gpu_catalog_rows(sizes: list[int], widths: list[int], rounds: int) -> list[dict[str, object]]:
    """Peak memory and time of every loss against the catalog: 64 sequences of 200, bf16."""
    rows: list[dict[str, object]] = []
    for width in widths:
        for num_items in sizes:
            e = torch.randn(12_800, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
            weight = torch.randn(num_items, width, dtype=torch.bfloat16, device="cuda")
            weight = weight.mul_(width**-0.5).requires_grad_()
            target = torch.randint(num_items, (len(e),), device="cuda")
            losses = shapes.losses(num_items)
            timed = interleaved(losses, e, weight, target, dict.fromkeys(losses, 0.0), rounds)
            for name, figures in timed.items():
                row = {"part": "gpu-sizes", "variant": name, "num_tokens": len(e),
                       "num_items": num_items, "width": width}  # fmt: skip
                rows.append(row | figures)
            print(measure.table(rows[-len(losses) :]), flush=True)
            del e, weight, target
            torch.cuda.empty_cache()
    return rows


def add_ratios(rows: list[dict[str, object]], forward_seconds: float) -> None:
    """Add what the targets are stated in, to the rows of one shape.

    `forward_of_rate`: share of the measured matrix rate that a full softmax's forward pass reaches;
    `over_cut`: time over that of cut-cross-entropy, unfiltered; `over_plain`: the deterministic
    mode's time over the same loss without it.
    """
    times = {row["variant"]: float(str(row["ms"])) for row in rows if "ms" in row}
    cut = times.get("cut-cross-entropy (unfiltered)")
    for row in rows:
        if "ms" not in row:
            continue
        if row["num_negatives"] == "":
            row["forward_of_rate"] = 1e3 * forward_seconds / float(str(row["forward_ms"]))
            if cut is not None:
                row["over_cut"] = float(str(row["ms"])) / cut
        plain = str(row["variant"]).removesuffix(" deterministic")
        if plain != row["variant"] and plain in times:
            row["over_plain"] = float(str(row["ms"])) / times[plain]


def _must(variant: str, share: int) -> float | str:
    """Most that a loss may take over its floor, where a target stands."""
    if not variant.startswith("cce_minus") or "batch" in variant:
        return ""
    return {1: 1.6, 128: 3.0, 1024: 4.0}[share]


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


def interleaved(
    losses: Mapping[str, Loss],
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    floors: Mapping[str, float],
    rounds: int,
) -> dict[str, dict[str, object]]:
    """Each loss in turn, round after round, so that drift hits all alike; the first is warm-up.

    A loss that fails, a peer's too, is a row that says so, and not the end of the table.
    """
    taken: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in losses}
    rows: dict[str, dict[str, object]] = {}
    for number in range(1 + rounds):
        for name, loss in losses.items():
            affordable = max(2, int(BUDGET_SECONDS / max(floors[name], 1e-3)))
            if name in rows or number >= affordable:
                continue
            try:
                taken[name].append(_once(loss, e, weight, target))
            except Exception as problem:
                rows[name] = {"error": str(problem).splitlines()[0][:120]}
                torch.cuda.empty_cache()
    gradients = e.nbytes + weight.nbytes
    for name, figures in taken.items():
        if name in rows:
            continue
        low, middle, high = measure.spread([total for _, total, _, _ in figures[1:]])
        rows[name] = {
            "forward_ms": measure.spread([forward for forward, _, _, _ in figures[1:]])[1],
            "ms": middle, "ms_20": low, "ms_80": high, "repeats": len(figures) - 1,
            "over_roofline": middle / (1e3 * floors[name]) if floors[name] else "",
            "extra_bytes": max(peak for _, _, peak, _ in figures) - gradients,
            "loss": figures[-1][3],
        }  # fmt: skip
    return rows


def _once(loss: Loss, e: Tensor, weight: Tensor, target: Tensor) -> tuple[float, float, int, float]:
    """Milliseconds of forward and of both, peak bytes beyond what was there, and the loss."""
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
    return (
        marks[0].elapsed_time(marks[1]),
        marks[0].elapsed_time(marks[2]),
        torch.cuda.max_memory_allocated() - before,
        float(value.detach()),
    )


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
    tests = Path(__file__).parent.parent / "tests" / "kernels_tests"
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly",
        str(tests / "test_losses.py"), str(tests / "test_addressing.py"),
        "-k", "full_softmax or sampled_softmax or half_precision or bits or billion",
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("the losses' tests fail on this GPU; no figure is reported")
