"""One optimizer step: forward, loss, backward and update, in one piece or in micro-batches."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from db.spec import RunSpec
from trainer.assembly import Assembly
from trainer.data.batches import IntArray
from trainer.models.network import Predictions
from trainer.seeds import derive

Phase = Literal["batch", "network", "loss", "network backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("batch", "network", "loss", "network backward", "optimizer")
"""What a step does, in this order; `loss` is both its forward and its backward pass."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MICRO_BATCH = 2**40
"""Distance of the draws of two micro-batches of a step; no run has as many steps."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step found.

    Attributes
    ----------
    loss, gradient_norm : float
        Mean loss over the targets of the batch, norm of its gradient.
    num_tokens : int
        Input tokens.
    finite : bool
        Whether loss and gradient were; if not, the weights are as before. With a gradient
        scaler an infinite gradient is part of its search and counts as finite.
    made : Predictions
        Of the last micro-batch.
    weight_grad : Tensor, shape (V, d), optional
        Gradient of the item vectors.
    """

    loss: float
    gradient_norm: float
    num_tokens: int
    finite: bool
    made: Predictions
    weight_grad: Tensor | None


class TrainingStep:
    """Takes the optimizer steps of a run.

    Parameters
    ----------
    spec : RunSpec
        With its precision resolved. With `micro_batch_size`, gradients are summed over the
        micro-batches and divided by the targets of the whole batch, whatever the share of each,
        so that a step is that of the undivided batch but for rounding and random draws.
    parts : Assembly
    on_phase : callable, optional
        Told when a phase of the step begins.
    """

    def __init__(
        self,
        spec: RunSpec,
        parts: Assembly,
        *,
        on_phase: Callable[[Phase], object] | None = None,
    ) -> None:
        self._seed = spec.seed
        self._dtype = _AUTOCAST.get(spec.precision or "fp32")
        self._parts = parts
        self._micro_batch_size = spec.micro_batch_size or spec.batch_size
        self._on_phase = on_phase

    def __call__(self, users: IntArray, step: int) -> StepOutcome:
        """Update the weights once.

        Parameters
        ----------
        users : ndarray, shape (B,), int64
            Training users of the batch.
        step : int
            Number of the step, which all its random draws depend on.
        """
        parts = self._parts
        torch.manual_seed(derive(self._seed, "dropout", step))
        pieces = np.array_split(users, math.ceil(len(users) / self._micro_batch_size))
        losses, weights, num_tokens = [], [], 0
        for number, piece in enumerate(pieces):
            made, loss, tokens = self._forward(piece, step + number * _MICRO_BATCH)
            num_tokens += tokens
            losses.append(loss.detach().float())
            weights.append(made.total_weight if len(pieces) > 1 else 1.0)
            torch.autograd.backward(parts.scaler.scale(loss * (weights[-1] / weights[0])))
            del loss
        self._enter("optimizer")
        if len(pieces) > 1:
            torch._foreach_mul_(
                [p.grad for p in parts.parameters if p.grad is not None], weights[0] / sum(weights)
            )
        mean = sum(loss * (w / sum(weights)) for loss, w in zip(losses, weights, strict=True))
        return self._update(mean, made, num_tokens)  # type: ignore[arg-type]

    def _forward(self, users: IntArray, draw: int) -> tuple[Predictions, Tensor, int]:
        parts = self._parts
        self._enter("batch")
        batch = parts.batches.pack(users)
        with self._autocast(batch.items.device.type):
            self._enter("network")
            made = parts.model.predictions(batch, derive(self._seed, "masks", draw))
            self._enter("loss")
            loss = parts.loss(made, parts.model.output_weight, parts.model.output_bias, draw)
        if self._on_phase is not None:
            # the loss hands its gradient to the network through the hidden states
            made.hidden.register_hook(self._enter_network_backward)  # type: ignore[no-untyped-call]
        return made, loss, batch.num_tokens

    def _update(self, loss: Tensor, made: Predictions, num_tokens: int) -> StepOutcome:
        parts = self._parts
        parts.scaler.unscale_(parts.optimizer)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in parts.parameters if p.grad is not None]
        )
        loss_value, norm_value = torch.stack([loss, norm.float()]).tolist()
        finite = math.isfinite(loss_value) and (
            math.isfinite(norm_value) or parts.scaler.is_enabled()
        )
        weight_grad = parts.model.output_weight.grad
        if finite:
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(loss_value, norm_value, num_tokens, finite, made, weight_grad)

    def _enter(self, phase: Phase) -> None:
        if self._on_phase is not None:
            self._on_phase(phase)

    def _enter_network_backward(self, grad: Tensor) -> None:
        self._enter("network backward")

    def _autocast(self, kind: str) -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext() if self._dtype is None else torch.autocast(kind, self._dtype)
        )
