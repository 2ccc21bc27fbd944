"""Kernels compile for GPUs that are not there; on sm_90 none of them spills a register."""

import os
import subprocess
import sys

import pytest


def compile_table(*arguments: str) -> list[list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "kernels.aot", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stderr
    print(result.stdout)
    return [line.split() for line in result.stdout.splitlines()[1:]]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_nothing_spills_on_hopper(width):
    rows = compile_table("--arch", "90", "--width", str(width), "--fewer")
    assert len(rows) == 10
    assert [row for row in rows if row[5] != "0"] == []
    assert all(0 < int(row[3]) <= 255 for row in rows)
    tiles = [row for row in rows if "shared/" in row[2] or "cce/" in row[2]]
    assert {row[6] for row in tiles} == {"wgmma"}


@pytest.mark.parametrize(("arch", "matrix"), [("80", "mma.sync"), ("100", "tcgen05.mma")])
def test_other_generations_compile(arch, matrix):
    rows = compile_table("--arch", arch, "--width", "64", "--fewer")
    assert len(rows) == 10
    assert matrix in {row[6] for row in rows}
