"""Other libraries' training steps, each in a process of the environment that has them."""

import argparse
import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bench import _padded
from db.spec import RunSpec
from kernels.scalable import bucket_shape
from trainer.data.batches import PackedBatch

Seconds = tuple[float, float]
"""Wall and processor seconds of one step."""

_LOSSES = {
    "ce": "ce", "cce": "ce", "bce": "bce", "bce_plus": "bce", "gbce": "gbce", "sce": "sce",
    "ce_minus": "ce_minus", "cce_minus": "ce_minus",
}  # fmt: skip
"""The loss of the peers that is the same function of the data."""
_ONLY = {"gbce": "rectools", "sce": "replay"}
"""Losses that one library alone has; sce for SASRec."""


def peer_names(spec: RunSpec) -> dict[str, str]:
    """Peers that have the model and loss: name in the table, name in `_peer_process.py`."""
    if spec.loss not in _LOSSES:
        return {}
    if spec.loss in _ONLY:
        only = _ONLY[spec.loss]
        has = spec.model == "sasrec" or only == "rectools"
        return {only: f"{only} {spec.model}"} if has else {}
    names = {"replay": f"replay {spec.model}"}
    full = _LOSSES[spec.loss] == "ce"
    if spec.model == "sasrec" and full:
        names["replay, new network"] = "replay sasrec_network"
    names["rectools"] = f"rectools {spec.model}"
    if spec.model == "sasrec" and full:
        names["recbole, one target per row"] = "recbole sasrec"
    return names


def has_our_loss(peer: str, spec: RunSpec) -> bool:
    """Whether the peer takes our weights and its loss of them can be compared with ours."""
    same = ("replay sasrec", "replay bert4rec", "rectools sasrec")
    return _LOSSES[spec.loss] == "ce" and peer in same


class Peer:
    """A library's model in its own process.

    Parameters
    ----------
    peer : str
        Name in `_peer_process.py`.
    model : Module
        Whose weights are handed over.
    spec : RunSpec
    batches : list of PackedBatch
    layouts : list of PaddedBatch
        The same batches, padded.
    num_items : int
        Catalog.
    options : Namespace
        Of the bench.

    Attributes
    ----------
    missing : str
        Why the library could not be imported; empty if it was.
    targets : list of int
        Targets that it learns from in each batch.
    """

    def __init__(
        self,
        peer: str,
        model: nn.Module,
        spec: RunSpec,
        batches: list[PackedBatch],
        layouts: list[_padded.PaddedBatch],
        num_items: int,
        options: argparse.Namespace,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="srsweep-bench-")
        folder = Path(self._folder.name)
        job = spec.to_dict() | {
            "peer": peer,
            "loss": _LOSSES[spec.loss],
            "num_items": num_items,
            "sce_shape": bucket_shape(
                len(batches[0].items), spec.sce_alpha, spec.sce_beta, spec.sce_bucket_size_x
            ),
            "num_batches": len(batches),
            "threads": options.threads,
            "device": options.device,
        }
        (folder / "job.json").write_text(json.dumps(job))
        np.savez(folder / "batches.npz", **_padded.left_padded(layouts))
        weights = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
        np.savez(folder / "weights.npz", **weights)
        self._errors = (folder / "errors.txt").open("w+")
        program = Path(__file__).with_name("_peer_process.py")
        self._process = subprocess.Popen(
            [options.peer_python, str(program), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        try:
            ready = self._answer()
        except SystemExit:
            self.close()
            raise
        self.missing: str = ready.get("missing", "")
        self.targets: list[int] = ready.get("targets", [])

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # no answer says so too
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def step(self, number: int) -> Seconds:
        """Seconds of one training step."""
        answer = self.ask(f"step {number}")
        return answer["wall"], answer["cpu"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before reading all
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"the peer failed:\n{self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
