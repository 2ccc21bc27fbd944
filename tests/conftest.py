"""Fixtures that every test folder may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the reference data; skips where it is not there."""
    folder = os.environ.get("SRSWEEP_SHARED")
    if not folder:
        pytest.skip("SRSWEEP_SHARED is unset: the reference data is not on this machine")
    path = Path(folder)
    if not (path / "golden").is_dir():
        pytest.fail(f"SRSWEEP_SHARED={folder} holds no folder 'golden'")
    return path


@pytest.fixture
def cuda() -> str:
    """Name of the CUDA device; skips without one unless SRSWEEP_REQUIRE_GPU=1."""
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("SRSWEEP_REQUIRE_GPU") == "1":
            pytest.fail("SRSWEEP_REQUIRE_GPU=1 but torch sees no CUDA device")
        pytest.skip("torch sees no CUDA device")
    return "cuda"
