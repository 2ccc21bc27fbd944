import os

import pytest
import torch

# Triton reads this when a kernel is decorated: it must be set before one is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    """Where Triton kernels run: a GPU, or the interpreter on CPU tensors."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("SRSWEEP_REQUIRE_GPU") == "1":
        pytest.fail("SRSWEEP_REQUIRE_GPU=1 but torch sees no CUDA device")
    return "cpu"


@pytest.fixture(autouse=True)
def nan_filled_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that a kernel forgets to write are NaN, not leftovers."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, filled)
