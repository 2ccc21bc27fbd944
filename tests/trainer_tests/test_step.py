import dataclasses

import numpy as np
import pytest
import torch
from conftest import ListRecorder

from db.spec import RunSpec
from trainer.assembly import assemble
from trainer.loop import train
from trainer.step import PHASES, TrainingStep

SPEC = RunSpec(
    dataset="ring",
    batch_size=20,
    max_seq_len=8,
    embedding_dim=16,
    num_blocks=1,
    dropout_rate=0.0,
    precision="fp32",
    max_epochs=2,
)
CPU = torch.device("cpu")


def after_one_step(dataset, spec, micro_batch_size):
    spec = dataclasses.replace(spec, micro_batch_size=micro_batch_size)
    parts = assemble(spec, dataset, CPU)
    take_step = TrainingStep(spec, parts)
    users = next(parts.batches.epoch_users(0))
    outcome = take_step(users, 0)
    return outcome, torch.cat([p.detach().flatten() for p in parts.parameters])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss": "cce"},
        {"count_padding": True, "predict_first_item": True},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(dataset, fields):
    """Their targets differ in number, so a mean of means would be another gradient."""
    spec = dataclasses.replace(SPEC, **fields)
    whole, _ = after_one_step(dataset, spec, None)
    split, _ = after_one_step(dataset, spec, 7)
    tolerance = 3e-3 if spec.precision == "fp16" else 1e-5
    assert split.loss == pytest.approx(whole.loss, rel=tolerance)
    assert split.num_tokens == whole.num_tokens
    difference = (split.weight_grad - whole.weight_grad).norm() / whole.weight_grad.norm()
    assert difference < tolerance


def test_targets_of_micro_batches_differ_in_number(dataset):
    """Without this, the test above would not tell a global mean from a mean of means."""
    parts = assemble(SPEC, dataset, CPU)
    users = next(parts.batches.epoch_users(0))
    counts = [parts.batches.pack(piece).num_tokens for piece in np.array_split(users, 3)]
    assert len(set(counts)) > 1


def test_micro_batches_draw_negatives_of_their_own(dataset, monkeypatch):
    seen = []
    spec = dataclasses.replace(SPEC, loss="ce_minus", num_negatives=4, micro_batch_size=10)
    parts = assemble(spec, dataset, CPU)
    loss = parts.loss
    parts.loss = lambda made, weight, bias, draw: (
        seen.append(draw),
        loss(made, weight, bias, draw),
    )[1]
    TrainingStep(spec, parts)(next(parts.batches.epoch_users(0)), 3)
    assert len(set(seen)) == 2
    assert seen[0] == 3


def test_training_in_micro_batches_learns_alike(dataset):
    recorders = [ListRecorder(), ListRecorder()]
    for size, recorder in zip([None, 6], recorders, strict=True):
        train(dataclasses.replace(SPEC, micro_batch_size=size), dataset, recorder)
    whole, split = ([r.loss for r in recorder.steps] for recorder in recorders)
    assert split == pytest.approx(whole, rel=1e-3)


def test_phases_come_in_order(dataset):
    parts = assemble(SPEC, dataset, CPU)
    phases = []
    TrainingStep(SPEC, parts, on_phase=phases.append)(next(parts.batches.epoch_users(0)), 0)
    assert tuple(phases) == PHASES
