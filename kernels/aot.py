"""Compile the Triton kernels for a GPU that need not be there, and count what they take.

`python -m kernels.aot --arch 80 --arch 90` prints registers, shared memory and spills of each
kernel. Nothing is run: what a kernel costs in time only a GPU can say.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.linear_cross_entropy import triton_tile, triton_token
from kernels.linear_cross_entropy.triton_launch import tile_config, token_config
from kernels.sampling import ALIAS, DROP, IDS, KEEP, LOG_UNIFORM, POOL, UNIFORM

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTERS = {"Y": "*i64", "Seed": "*i64", "FilterSeed": "*i64", "Alias": "*i32", "PoolSize": "*i64"}
_INTEGERS = ("num_tokens", "num_columns", "num", "width", "share", "columns_per_split",
             "rows_per_split", "stride_e", "stride_c", "range_size")  # fmt: skip
_FLOATS = ("scale", "softcap", "eps", "inverse_log")
_FULL = {"SAMPLED": False, "KIND": 0, "HITS": KEEP, "CORRECTED": False}


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time constants."""

    name: str
    """Short name: loss, pass, sampler."""
    kernel: triton.JITFunction
    """The kernel."""
    width: int
    """D."""
    dtype: torch.dtype
    """Of e and weight."""
    constants: dict[str, object]
    """Compile-time constants."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Depth of the software pipeline."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a compiled kernel."""

    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spill_bytes: int
    """Stores and loads of spilled registers, per thread."""
    instructions: str
    """Matrix instruction found: wgmma, tcgen05, mma or none."""


def variants(width: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Variant]:
    """Kernels as they are launched for embeddings of a width."""
    base: dict[str, object] = {
        "HAS_BIAS": False, "SOFTCAP": False, "STRATIFIED": False, "SIGMOID": False,
        "UPCAST": False, "HAS_MEAN": False, "FILTER": 0, "EXTRA": 0, "SKIP": False,
    }  # fmt: skip
    tiles = {
        "forward": triton_tile.forward_kernel,
        "grad_e": triton_tile.grad_e_kernel,
        "grad_c": triton_tile.grad_c_kernel,
    }
    shared = {"SAMPLED": True, "KIND": UNIFORM, "HITS": DROP, "CORRECTED": False, "EXTRA": 2}
    for name, kernel in tiles.items():
        for loss, extra in (
            ("cce", _FULL),
            ("cce_filtered", _FULL | {"FILTER": 1}),
            ("cce_minus_shared", shared),
        ):
            if loss == "cce_filtered" and name == "forward":
                continue
            config = tile_config(name, width, dtype, 4096, gathers=bool(extra["SAMPLED"]))
            constants = base | extra | {
                "BM": config.rows, "BN": config.columns, "BD": config.width,
                "NUM_D": config.num_parts,
                "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
            }  # fmt: skip
            yield Variant(
                f"{loss}/{name}", kernel, width, dtype, constants, config.num_warps,
                config.num_stages,
            )  # fmt: skip
    rows, block, warps = token_config(width)
    samplers = {
        "uniform": {"KIND": UNIFORM, "HITS": KEEP, "CORRECTED": False, "SKIP": True},
        "popularity": {"KIND": ALIAS, "HITS": DROP, "CORRECTED": True},
        "log_uniform": {"KIND": LOG_UNIFORM, "HITS": DROP, "CORRECTED": True},
        "in_batch": {"KIND": POOL, "HITS": DROP, "CORRECTED": True},
        "ids": {"KIND": IDS, "HITS": DROP, "CORRECTED": False},
    }
    for sampler, extra in samplers.items():
        constants = base | extra | {"BM": rows, "BD": block}
        for name, kernel in (
            ("forward", triton_token.forward_kernel),
            ("backward", triton_token.backward_kernel),
        ):
            label = f"cce_minus/{name}/{sampler}"
            yield Variant(label, kernel, width, dtype, constants, warps, 3)
    constants = base | {"BM": rows, "BD": block, "SIGMOID": True}
    constants |= {"KIND": UNIFORM, "HITS": KEEP, "CORRECTED": False, "SKIP": True}
    for name, kernel in (
        ("forward", triton_token.forward_kernel),
        ("backward", triton_token.backward_kernel),
    ):
        yield Variant(f"bce_plus/{name}", kernel, width, dtype, constants, warps, 3)
    constants = base | {"BM": 32, "BD": min(block, 256), "NUM_D": 1}
    yield Variant("positive", triton_token.positive_kernel, width, dtype, constants, 4, 3)
    kernel = triton_token.positive_grad_c_kernel
    yield Variant("positive_grad_c", kernel, width, dtype, constants, 4, 3)


def build(variant: Variant, arch: int) -> triton.compiler.CompiledKernel:
    """Compile a variant to a cubin for compute capability arch / 10."""
    signature, constants, attributes = {}, {}, {}
    kernel = variant.kernel
    for position, name in enumerate(kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(position,)] = variant.constants[name]
            continue
        signature[name] = _type_of(name, variant)
        if signature[name].startswith("*") or name in ("width", "stride_e", "stride_c"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(variant: Variant, arch: int) -> Usage:
    """Compile a variant anew and read what ptxas reports of that very cubin."""
    report = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        with contextlib.redirect_stdout(report):
            compiled = build(variant, arch)
    registers = re.search(r"Used (\d+) registers", report.getvalue())
    assert registers is not None
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", report.getvalue()))
    ptx = compiled.asm["ptx"]
    matrix = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), "none")
    return Usage(int(registers[1]), compiled.metadata.shared, spills, matrix)


def table(
    archs: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    only: str = "",
    fewer: bool = False,
) -> Iterator[tuple[int, Variant, Usage]]:
    """Usage of each kernel as it is launched, for each compute capability and width.

    Parameters
    ----------
    archs : sequence of int
        80 for compute capability 8.0.
    widths : sequence of int
        D.
    dtype : torch.dtype
        Of e and weight.
    only : str
        Part of the names wanted.
    fewer : bool
        Each kernel with one sampler, without filter.
    """
    for arch in archs:
        for width in widths:
            for variant in variants(width, dtype):
                few = "filtered" not in variant.name and variant.name.count("/") < 2
                few = (few or variant.name.endswith("/uniform")) and "bce" not in variant.name
                if only in variant.name and (few or not fewer):
                    yield arch, variant, usage(variant, arch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; exit 1 when a kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; repeatable")
    parser.add_argument("--width", type=int, action="append", help="embedding width; repeatable")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--fewer", action="store_true", help="one sampler, no filter: faster")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args(arguments)
    print("arch  width  kernel                          regs  shared  spill  matrix")
    spilled = 0
    for arch, variant, used in table(
        options.arch or [90], options.width or [64, 128, 256], getattr(torch, options.dtype),
        only=options.only, fewer=options.fewer,
    ):  # fmt: skip
        spilled += used.spill_bytes
        print(
            f"{arch:<4}  {variant.width:<5}  {variant.name:<30}  {used.registers:>4}  "
            f"{used.shared_bytes:>6}  {used.spill_bytes:>5}  {used.instructions}",
            flush=True,
        )
    return int(spilled > 0)


def _type_of(name: str, variant: Variant) -> str:
    if name in ("E", "C", "B", "OutE"):
        return _TYPES[variant.dtype]
    if name == "Out" and "grad" in variant.name and "cce_minus" not in variant.name:
        return _TYPES[variant.dtype]
    if name == "Source":
        return "*i32" if variant.constants.get("KIND") == ALIAS else "*i64"
    if name in _POINTERS:
        return _POINTERS[name]
    if name in _INTEGERS:
        return "i32"
    if name in _FLOATS:
        return "fp32"
    return "i64" if name == "log_range" else "*fp32"


if __name__ == "__main__":
    raise SystemExit(main())
