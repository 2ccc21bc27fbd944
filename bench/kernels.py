"""What the loss kernels cost, against the hardware, against peers and against each other.

`python -m bench kernels --part speed`    impl="torch" on this CPU against plain torch
`python -m bench kernels --part sizes`    peak memory and time against catalog size (SCE's Fig. 6)
`python -m bench kernels --part sharing`  gradient error of shared negatives, real data
`python -m bench kernels --part quality`  NDCG@10 after training with them
`python -m bench kernels --part corrections` what each logQ correction does to the gradient
`python -m bench kernels --figure DIR`    the rows of `sizes` drawn, as SVG and PNG
`python -m bench kernels --part aot`      registers, shared memory and spills, without a GPU
`python -m bench kernels --part gpu`      the paper's six shapes on a GPU, rooflines and peers
`python -m bench kernels --part gpu-sizes` memory and time against catalog size on a GPU

Without --part: the last two where there is a GPU, else the others.

Each figure is taken in a process of its own (CPU) or interleaved in one (GPU), after its loss was
found equal to a reference. CPU seconds stand beside wall seconds: on a shared machine only the
former compare.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench import measure
from kernels.linear_cross_entropy.api import (
    gbce_power,
    linear_binary_cross_entropy,
    linear_cross_entropy,
)
from kernels.negatives import Negatives
from kernels.scalable import scalable_cross_entropy

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, object]

SHAPES = {
    "megamarket": (1_638_400, 1_661_327, 1023),
    "gowalla": (327_680, 309_000, 511),
    "zvuk": (131_072, 893_000, 2047),
    "30music": (184_320, 909_000, 4095),
    "ml-20m": (131_072, 15_000, 1511),
    "beauty": (32_768, 176_000, 511),
}
"""The paper's Table 4: tokens N, items V, negatives ns; D = 256."""
CPU_PARTS = ("speed", "sizes", "sharing", "quality", "corrections", "aot")
GPU_PARTS = ("gpu", "gpu-sizes")
FILES = {
    "sizes": "kernels_catalog", "gpu-sizes": "kernels_catalog", "sharing": "kernels_sharing",
    "quality": "kernels_sharing", "corrections": "kernels_corrections", "aot": "kernels_aot",
    "gpu": "kernels_gpu",
}  # fmt: skip
"""CSV of each part; the others share one."""
CATALOGS = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
WIDTH = 256
HBM_BYTES_PER_SECOND = 3.0e12
L2_BYTES_PER_SECOND = 5.5e12
BF16_FLOPS = 790e12


def losses(num_items: int, num_negatives: int = 256) -> dict[str, Step]:
    """Every loss of the paper, by the name it has in a run specification."""
    num = min(num_negatives, num_items - 1)
    negatives = Negatives(num, seed=1)

    def gathered(e: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ids = torch.randint(len(weight), (len(e), num), device=e.device)
        logits = torch.einsum("nd,nkd->nk", e, weight[ids])
        logits = torch.cat([(e * weight[target]).sum(1, keepdim=True), logits], dim=1)
        return torch.nn.functional.cross_entropy(logits, torch.zeros_like(target))

    def binary(power: float, average: bool, drawn: Negatives) -> Step:
        return lambda e, weight, target: linear_binary_cross_entropy(
            e, weight, target, negatives=drawn, positive_power=power, average=average
        )

    power = gbce_power(num, num_items, 0.75)
    return {
        "bce": binary(1.0, False, Negatives(1, seed=1)),
        "bce_plus": binary(1.0, False, negatives),
        "gbce": binary(power, True, negatives),
        "ce": lambda e, weight, target: torch.nn.functional.cross_entropy(e @ weight.T, target),
        "ce_minus": gathered,
        "cce": linear_cross_entropy_step(),
        "cce_minus": linear_cross_entropy_step(negatives=negatives),
        "cce_minus_share128": linear_cross_entropy_step(
            negatives=Negatives(num, share=128, seed=1)
        ),
        "sce": lambda e, weight, target: scalable_cross_entropy(
            e, weight, target, bucket_size_y=min(256, num_items), seed=1
        ),
    }


def linear_cross_entropy_step(**options: object) -> Step:
    """`linear_cross_entropy` with options, as a loss of three tensors."""

    def step(e: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss = linear_cross_entropy(e, weight, target, **options)  # type: ignore[arg-type]
        assert isinstance(loss, Tensor)
        return loss

    return step


def full_variants() -> dict[str, Step]:
    """Full softmax: ours, plain torch, and torch's own chunked one where this torch has it."""
    functional = torch.nn.functional
    variants: dict[str, Step] = {
        "torch_chunked": linear_cross_entropy_step(impl="torch"),
        "dense": lambda e, weight, target: functional.cross_entropy(e @ weight.T, target),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for chunk in (128, 256, 512):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
            variants[f"F.linear_cross_entropy[{chunk}]"] = (
                lambda e, weight, target, options=options: functional.linear_cross_entropy(  # type: ignore[misc]
                    e, weight, target, options=options
                )
            )
    return variants


def measure_here(step: Step, num_tokens: int, num_items: int, width: int, repeats: int) -> Row:
    """Forward and backward in this process: seconds, loss, and peak resident bytes added."""
    torch.manual_seed(0)
    e = torch.randn(num_tokens, width, requires_grad=True)
    weight = torch.empty(num_items, width).normal_(0, width**-0.5).requires_grad_()
    target = torch.randint(num_items, (num_tokens,))
    small = torch.randn(8, width, requires_grad=True), torch.randn(300, width, requires_grad=True)
    step(*small, torch.arange(8)).backward()  # what is imported once is no cost of the loss
    before = _resident_bytes()
    _reset_peak()
    wall, cpu = [], []
    loss = torch.zeros(())
    for _ in range(repeats):
        e.grad = weight.grad = None
        begin, begin_cpu = time.perf_counter(), time.process_time()
        loss = step(e, weight, target)
        loss.backward()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return {
        "loss_value": float(loss.detach()),
        "wall_seconds": median(wall),
        "cpu_seconds": median(cpu),
        "peak_bytes": _peak_bytes() - before,
        "gradient_bytes": 4 * width * (num_tokens + num_items),
    }


def in_process(**job: object) -> Row:
    """`measure_here` in a process forked for it; memory and time are its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(job, sender))
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv()
    except EOFError:
        row = {"error": "killed for memory"}
    process.join()
    return row


def _answer(job: dict[str, object], sender: Connection) -> None:
    try:
        row = run_job(job)
    except (RuntimeError, MemoryError) as problem:
        row = {"error": str(problem).strip().splitlines()[0][:120]}
    sender.send(row)


def run_job(job: dict[str, object]) -> Row:
    """What `in_process` asked for."""
    torch.set_num_threads(int(str(job["threads"])))
    items = int(str(job["num_items"]))
    table = full_variants() if job["table"] == "full" else losses(items)
    return measure_here(
        table[str(job["name"])], int(str(job["num_tokens"])), items, int(str(job["width"])),
        int(str(job["repeats"])),
    )  # fmt: skip


def speed(rounds: int, threads: int, sizes: Sequence[int], num_tokens: int) -> list[Row]:
    """impl="torch" against plain torch on the CPU, D = 64; processes alternate."""
    rows = []
    for num_items in sizes:
        taken: dict[str, list[Row]] = {}
        for _ in range(rounds):
            for name in full_variants():
                if name == "dense" and num_items * num_tokens > 5e8:
                    continue
                taken.setdefault(name, []).append(
                    in_process(
                        table="full", name=name, num_tokens=num_tokens, num_items=num_items,
                        width=64, threads=threads, repeats=1,
                    )
                )  # fmt: skip
        values = [_number(row, "loss_value") for made in taken.values() for row in made]
        if max(values) - min(values) > 1e-3:
            raise SystemExit(f"losses disagree at V={num_items}: {values}; no figure is reported")
        best = min(median(_number(r, "wall_seconds") for r in made) for made in taken.values())
        for name, made in taken.items():
            middle = {
                key: median(_number(row, key) for row in made)
                for key in ("wall_seconds", "cpu_seconds", "peak_bytes", "gradient_bytes")
            }
            rows.append(
                {"part": "speed", "variant": name, "num_tokens": num_tokens, "num_items": num_items,
                 "width": 64, "rounds": rounds, **middle,
                 "over_best": middle["wall_seconds"] / best}
            )  # fmt: skip
            print(measure.table(rows[-1:]), flush=True)
    return rows


def catalog_sizes(
    sizes: Sequence[int], widths: Sequence[int], num_tokens: int, limit_bytes: float
) -> Iterator[Row]:
    """Peak memory and time of each loss against the catalog: SCE's Fig. 6 redrawn."""
    for width in widths:
        for num_items in sizes:
            for name in losses(num_items):
                row: Row = {
                    "part": "sizes", "variant": name, "num_tokens": num_tokens,
                    "num_items": num_items, "width": width, "num_negatives": 256,
                }  # fmt: skip
                tables = 3 * 4 * num_items * width
                logits = 3 * 4 * num_items * num_tokens if name == "ce" else 0
                work = num_items * num_tokens * width if name in ("ce", "cce") else 0
                if tables + logits > limit_bytes or work > 2e12:
                    yield row | {"error": "not run: beyond this machine's memory or minutes"}
                    continue
                yield row | in_process(
                    table="losses", name=name, num_tokens=num_tokens, num_items=num_items,
                    width=width, threads=1, repeats=1,
                )  # fmt: skip


def compiled_rows() -> Iterator[Row]:
    """Every kernel compiled for three generations of GPUs, at three widths."""
    from kernels import aot

    for arch, variant, used in aot.table([80, 90, 100], [64, 128, 256]):
        yield {
            "part": "aot", "arch": f"sm_{arch}", "width": variant.width, "kernel": variant.name,
            "dtype": str(variant.dtype), "registers": used.registers,
            "shared_bytes": used.shared_bytes, "spill_bytes": used.spill_bytes,
            "matrix": used.instructions,
        }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the parts that were asked for and save their rows."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--part", choices=CPU_PARTS + GPU_PARTS, action="append")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the CSVs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sizes", type=int, nargs="*", default=None, help="catalog sizes")
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--shared", type=Path, default=os.environ.get("SRSWEEP_SHARED"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--shares", nargs="*", default=(), help="of the part quality: full, 1, 32, 128, 1024, batch"
    )
    parser.add_argument("--figure", type=Path, help="draw the rows in --out into this folder")
    options = parser.parse_args(arguments)
    if options.figure:
        from bench._kernels_figure import draw_catalog

        print(*draw_catalog(options.out / "kernels_catalog.csv", options.figure), sep="\n")
        return 0
    gpu = torch.cuda.is_available()
    if os.environ.get("SRSWEEP_REQUIRE_GPU") == "1" and not gpu:
        print("SRSWEEP_REQUIRE_GPU=1 but torch sees no CUDA device", file=sys.stderr)
        return 1
    for part in options.part or (GPU_PARTS if gpu else CPU_PARTS):
        if part == "speed":
            sizes = options.sizes or [100_000, 1_000_000]
            rows = speed(options.rounds, options.threads, sizes, options.tokens)
        elif part == "sizes":
            sizes = options.sizes or CATALOGS
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
            rows = []
            for row in catalog_sizes(sizes, options.widths, 1024, 0.6 * free):
                rows.append(row)
                print(json.dumps(row), flush=True)
        elif part in ("sharing", "quality", "corrections"):
            from bench._sharing import corrections, quality, sharing

            if options.shared is None:
                print("sharing reads real data: give --shared or SRSWEEP_SHARED", file=sys.stderr)
                return 1
            shared, epochs = Path(options.shared), options.epochs
            if part == "quality":
                rows = quality(shared, epochs, options.shares)
            else:
                rows = {"sharing": sharing, "corrections": corrections}[part](shared, epochs)
        elif part == "aot":
            rows = list(compiled_rows())
        elif part == "gpu":
            from bench._kernels_gpu import gpu_rows

            rows = gpu_rows(options.shapes, options.rounds)
        else:
            from bench._kernels_gpu import gpu_catalog_rows

            rows = gpu_catalog_rows(options.sizes or CATALOGS, options.widths, options.rounds)
        print(measure.table(rows))
        measure.save(FILES.get(part, "kernels"), rows, options.out)
    return 0


def _number(row: Row, key: str) -> float:
    if key not in row:
        raise SystemExit(f"a variant failed: {row.get('error')}")
    return float(str(row[key]))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
