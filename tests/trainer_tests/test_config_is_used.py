"""A knob that does nothing would corrupt the run database: every field is read, or refused."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import ListRecorder, make_dataset

from db.errors import SpecError
from db.spec import RunSpec
from trainer.loop import train

SMALL = {
    "dataset": "ring",
    "batch_size": 16,
    "max_seq_len": 8,
    "embedding_dim": 8,
    "num_blocks": 1,
    "num_heads": 1,
    "max_epochs": 2,
    "precision": "fp32",
}
CCE_MINUS = {"loss": "cce_minus", "num_negatives": 4}
SCE = {"loss": "sce", "sce_bucket_size_y": 8}


@dataclass(frozen=True)
class Change:
    """A field, a value other than the base's, and what has to be set for it to matter."""

    field: str
    value: Any
    base: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self):
        return f"{self.field}={self.value}"


CHANGES = [
    Change("model", "bert4rec"),
    Change("loss", "cce_minus", {"loss": "ce_minus", "num_negatives": 4}),
    Change("loss", "bce_plus", {"loss": "gbce", "num_negatives": 4}),
    Change("loss", "sce"),
    Change("batch_size", 12),
    Change("micro_batch_size", 8),
    Change("max_seq_len", 6),
    Change("num_negatives", 5, CCE_MINUS),
    Change("num_negatives", 5, {"loss": "ce_minus", "num_negatives": 4}),
    Change("negative_sampler", "popularity", CCE_MINUS),
    Change("negative_sampler", "log_uniform", CCE_MINUS),
    Change("negative_sampler", "in_batch", CCE_MINUS),
    Change("negatives_share", 4, CCE_MINUS),
    Change("negatives_share", "batch", CCE_MINUS),
    Change("logq_correction", False, CCE_MINUS),
    Change("logq_correction", False, {"loss": "ce_minus", "num_negatives": 4}),
    Change("hits", "mask", CCE_MINUS),
    Change("hits", "keep", CCE_MINUS),
    Change("hits", "mask", {"loss": "bce_plus", "num_negatives": 4}),
    Change("filter_eps", 0.03, {"loss": "cce"}),
    Change("filter_eps", 0.2, CCE_MINUS),
    Change("filter_mode", "unbiased", {"loss": "cce", "filter_eps": 0.03}),
    Change("gbce_t", 0.2, {"loss": "gbce", "num_negatives": 4}),
    Change("sce_alpha", 0.5, SCE),
    Change("sce_beta", 0.25, SCE),
    Change("sce_bucket_size_x", 3, SCE),
    Change("sce_bucket_size_y", 4, SCE),
    Change("sce_mix", False, SCE),
    Change("embedding_dim", 6),
    Change("num_blocks", 2),
    Change("num_heads", 2),
    Change("dropout_rate", 0.3),
    Change("mask_probability", 0.5, {"model": "bert4rec"}),
    Change("learning_rate", 0.01),
    Change("optimizer", "rowwise_adam", CCE_MINUS),
    Change("precision", "bf16"),
    Change("precision", "fp16"),
    Change("max_epochs", 1),
    Change("patience", 1, {"learning_rate": 0.5, "max_epochs": 8}),
    Change("evaluate_every_steps", 2),
    Change("max_validation_users", 3),
    Change("mask_seen", False),
    Change("attend_padding", True),
    Change("predict_first_item", True),
    Change("count_padding", True),
    Change("count_padding", True, {"loss": "cce"}),
    Change("metric_frame", "test_history"),
    Change("paper_negatives", True, CCE_MINUS),
    Change("seed", 7),
]


@functools.cache
def base_outcome(fields):
    """Outcome of a base, shared by the changes that start from it."""
    return outcome(**dict(fields))


def outcome(**fields):
    """Everything that a run reports, besides times and memory."""
    recorder = ListRecorder()
    result = train(RunSpec(**{**SMALL, **fields}), make_dataset(), recorder)
    steps = [(r.step, r.epoch, r.loss, r.gradient_norm, r.tokens) for r in recorder.steps]
    values = [(r.step, r.split, r.metric, r.k, r.value, r.num_users) for r in recorder.evaluations]
    return steps, values, result.num_parameters, result.test


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_field_changes_training_or_evaluation(change):
    base = base_outcome(tuple(change.base.items()))
    assert base != outcome(**{**change.base, change.field: change.value})


def test_every_field_is_tried():
    assert {change.field for change in CHANGES} == set(RunSpec.__dataclass_fields__) - {"dataset"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"negative_sampler": "popularity", "loss": "ce_minus", "num_negatives": 4}, "ce_minus"),
        ({"hits": "keep", "loss": "ce"}, "hits='keep' has no effect with loss='ce'"),
        (CCE_MINUS | {"paper_negatives": True, "hits": "keep"}, "without paper_negatives"),
        (CCE_MINUS | {"paper_negatives": True, "logq_correction": False}, "logq_correction=False"),
        (
            {"loss": "bce_plus", "num_negatives": 4, "negatives_share": 4, "hits": "mask"},
            "hits='mask' has no effect",
        ),
        ({"mask_probability": 0.3}, "mask_probability=0.3 has no effect"),
        ({"count_padding": True, "loss": "sce"}, "count_padding=True has no effect"),
        ({"optimizer": "rowwise_adam"}, "optimizer='rowwise_adam' has no effect"),
    ],
)
def test_fields_without_effect_are_refused(fields, told):
    with pytest.raises(SpecError, match=told):
        RunSpec(**{**SMALL, **fields})


@pytest.mark.parametrize("fields", [{}, CCE_MINUS, SCE, {"model": "bert4rec"}], ids=str)
def test_equal_runs_report_the_same(fields):
    """Without this, a changed outcome would prove nothing."""
    assert base_outcome(tuple(fields.items())) == outcome(**fields)


def test_global_random_state_does_not_matter():
    torch.manual_seed(1)
    first = base_outcome(())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert first == outcome()
    assert torch.equal(state, torch.get_rng_state()), "training left its mark on torch's generator"
