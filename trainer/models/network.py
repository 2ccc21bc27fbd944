"""What every sequence model offers to training and ranking."""

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.batches import PackedBatch


@dataclass(frozen=True, slots=True)
class Predictions:
    """Hidden states and the items that they are to predict.

    Attributes
    ----------
    hidden : Tensor, shape (N, d)
    targets : Tensor, shape (N,), int64
    weight : Tensor, shape (N,), float32, optional
        How many equal targets a row stands for; None is one each.
    """

    hidden: Tensor
    targets: Tensor
    weight: Tensor | None = None

    @property
    def total_weight(self) -> float:
        """Targets that the rows stand for together."""
        return float(len(self.targets)) if self.weight is None else float(self.weight.sum())


class SequenceModel(nn.Module, abc.ABC):
    """A network whose scores are hidden states times item vectors."""

    @property
    @abc.abstractmethod
    def output_weight(self) -> Tensor:
        """Item vectors of the scores, shape (V, d)."""

    @property
    @abc.abstractmethod
    def output_bias(self) -> Tensor | None:
        """Item biases of the scores, shape (V,), if it has any."""

    @abc.abstractmethod
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw initial weights.

        Parameters
        ----------
        generator : torch.Generator
            On the device of the parameters.
        """

    @abc.abstractmethod
    def predictions(self, batch: PackedBatch, seed: int) -> Predictions:
        """Hidden states with the items that they are to predict.

        Parameters
        ----------
        batch : PackedBatch
        seed : int
            Of whatever the model draws besides dropout.
        """

    @abc.abstractmethod
    def encode(self, batch: PackedBatch) -> Tensor:
        """State that ranks each user's next item, shape (B, d), in the order of `batch.users`."""
