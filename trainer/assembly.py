"""The parts of a run: batches, network, loss, optimizer and evaluations, made from its spec."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from db.spec import RunSpec
from trainer.data.batches import PackedSequences, TrainingBatches, item_tensor
from trainer.evaluation import Evaluator, metric_frame
from trainer.losses import LossFunction, make_loss
from trainer.models.build import build_model
from trainer.models.network import SequenceModel
from trainer.optimizers import make_optimizer
from trainer.ranking import DEFAULT_BUDGET
from trainer.seeds import derive

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset


@dataclass
class Assembly:
    """Everything that a run computes with, on its device.

    Attributes
    ----------
    items : Tensor, shape (rows,), int32
        Items of the whole dataset, which batches are gathered from.
    batches : TrainingBatches
    validation, test : Evaluator
    model : SequenceModel
        With its initial weights.
    parameters : list of Parameter
        Of the model.
    loss : callable
    optimizer : Optimizer
    scaler : GradScaler
        Does nothing unless the precision is fp16.
    """

    items: Tensor
    batches: TrainingBatches
    validation: Evaluator
    test: Evaluator
    model: SequenceModel
    parameters: list[Parameter]
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self.parameters)


def assemble(
    spec: RunSpec,
    dataset: "Dataset",
    device: torch.device,
    *,
    evaluation_budget_bytes: int = DEFAULT_BUDGET,
) -> Assembly:
    """Make the parts of a run.

    Parameters
    ----------
    spec : RunSpec
        With its precision resolved.
    dataset : Dataset
    device : torch.device
    evaluation_budget_bytes : int
        Bytes of scores that an evaluation holds at once.

    Raises
    ------
    SpecError
        As `make_loss`.
    DataError
        No user has anything to learn from.
    """
    counts = torch.from_numpy(np.array(dataset.item_counts)).to(device)
    loss = make_loss(spec, dataset.num_items, counts)
    items = item_tensor(dataset.items, device)
    batches = training_batches(spec, items, dataset)
    validation, test = (
        evaluator(spec, items, dataset, split, evaluation_budget_bytes)
        for split in ("validation", "test")
    )
    model = build_model(spec, dataset.num_items).to(device)
    model.reset_parameters(torch.Generator(device).manual_seed(derive(spec.seed, "weights")))
    parameters = list(model.parameters())
    optimizer = make_optimizer(spec.optimizer, parameters, item_tables(model), spec.learning_rate)
    return Assembly(
        items=items,
        batches=batches,
        validation=validation,
        test=test,
        model=model,
        parameters=parameters,
        loss=loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16"),
    )


def item_tables(model: SequenceModel) -> list[Parameter]:
    """Parameters of a model with one vector per item."""
    num_items = len(model.output_weight)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and len(parameter) == num_items and "position" not in name
    ]


def training_batches(spec: RunSpec, items: Tensor, dataset: "Dataset") -> TrainingBatches:
    """Training batches as the spec asks for them, gathered from `items`."""
    next_items = spec.model == "sasrec"
    sequences = PackedSequences(
        items, dataset.train, max_seq_len=spec.max_seq_len, next_items=next_items
    )
    padded = spec.predict_first_item or spec.count_padding
    return TrainingBatches(
        sequences,
        batch_size=spec.batch_size,
        min_tokens=0 if padded else 1,
        seed=spec.seed,
    )


def evaluator(
    spec: RunSpec,
    items: Tensor,
    dataset: "Dataset",
    split: Any,
    budget_bytes: int = DEFAULT_BUDGET,
) -> Evaluator:
    """Evaluation of a split as the spec asks for it."""
    validation = split == "validation"
    return Evaluator(
        items,
        dataset.validation if validation else dataset.test,
        split=split,
        frame=metric_frame(dataset, spec.metric_frame, split),
        max_seq_len=spec.max_seq_len,
        mask_seen=spec.mask_seen,
        budget_bytes=budget_bytes,
        max_users=spec.max_validation_users if validation else None,
    )
