import dataclasses

import pytest
import torch
from conftest import make_dataset

from db.errors import DataError
from db.spec import RunSpec
from trainer.profile import PARTS, TensorTracker, profile
from trainer.step import PHASES

SPEC = RunSpec(
    dataset="ring",
    max_seq_len=16,
    embedding_dim=16,
    num_blocks=1,
    batch_size=64,
    precision="fp32",
)


@pytest.fixture(scope="module")
def catalog():
    return make_dataset(num_users=300, num_items=2000, max_length=20)


def test_tensors_count_from_first_to_last_reference():
    before = torch.ones(1000)
    with TensorTracker([before]) as tracker:
        tracker.phase = "network"
        kept = before * 2
        (before + kept).sum()
        tracker.phase = "loss"
        view = kept[:10]
        more = torch.ones(500)
        del more
    # two of 4,000 bytes at once, then one with 2,000; a view takes nothing
    assert tracker.peak == {"activations": 8000 + 4}
    assert view.shape == (10,)
    with TensorTracker([]) as tracker:
        tracker.phase = "loss"
        torch.ones(500)
        torch.ones(250)
    assert tracker.peak == {"loss": 2000}


def test_parts_are_the_bytes_that_arithmetic_gives(catalog):
    found = profile(SPEC, catalog, num_steps=2)
    weights = found.num_parameters * 4
    assert found.step_bytes["parameters"] == weights
    # two moments per weight, and the steps of each parameter
    assert found.step_bytes["optimizer state"] == pytest.approx(2 * weights, abs=400)
    assert set(found.step_bytes) == set(PARTS)
    tokens = found.step_bytes["loss"] / (2000 * 4)
    assert 300 < tokens < 64 * 16, "the logits of one batch"
    assert set(found.phase_seconds) == set(PHASES)
    assert all(seconds > 0 for seconds in found.phase_seconds.values())
    assert found.num_steps == 2


def test_the_loss_is_what_grows_with_negatives_and_what_fused_losses_save(catalog):
    def loss_bytes(**fields):
        return profile(dataclasses.replace(SPEC, **fields), catalog, num_steps=1).step_bytes["loss"]

    many = loss_bytes(loss="ce_minus", num_negatives=128)
    assert many > 1.8 * loss_bytes(loss="ce_minus", num_negatives=64)
    # the work space of a fused loss lies inside its operator and is counted all the same
    assert 10_000 < loss_bytes(loss="cce") < 0.4 * loss_bytes(loss="ce")


def test_micro_batches_lower_activations_and_loss(catalog):
    whole = profile(SPEC, catalog, num_steps=1).step_bytes
    split = profile(dataclasses.replace(SPEC, micro_batch_size=16), catalog, num_steps=1).step_bytes
    assert split["parameters"] == whole["parameters"]
    assert split["loss"] < 0.5 * whole["loss"]
    assert split["activations"] < 0.5 * whole["activations"]


def test_evaluation_is_bounded_by_its_budget(catalog):
    small = profile(SPEC, catalog, num_steps=1, evaluation_budget_bytes=2**16)
    large = profile(SPEC, catalog, num_steps=1, evaluation_budget_bytes=2**24)
    assert small.evaluation_bytes < large.evaluation_bytes


def test_bert4rec_is_followed_alike(catalog):
    found = profile(dataclasses.replace(SPEC, model="bert4rec"), catalog, num_steps=1)
    assert found.step_bytes["activations"] > 0
    assert found.step_bytes["loss"] > 0


def test_steps_that_diverge_are_no_profile(catalog):
    spec = dataclasses.replace(SPEC, learning_rate=1e30)
    with pytest.raises(DataError, match=r"not finite in step \d: nothing to profile"):
        profile(spec, catalog, num_steps=2)


def test_steps_without_enough_memory_are_told(catalog):
    width = 2**40
    asked = 2000 * width * 4
    with pytest.raises(DataError, match=rf"not suffice for a step, {asked:,} bytes asked for of"):
        profile(dataclasses.replace(SPEC, embedding_dim=width), catalog, num_steps=1)
