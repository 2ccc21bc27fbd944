from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_reference import padded_sasrec, to_windows

from trainer.data.batches import PackedSequences
from trainer.models.sasrec import SASRec
from trainer.plain_losses import (
    binary_cross_entropy,
    cross_entropy,
    sampled_cross_entropy,
)
from trainer.ranking import encode_users


def pack(sequences, max_seq_len, next_items=True):
    lengths = np.array([len(s) for s in sequences])
    ends = np.cumsum(lengths)
    flat = np.concatenate([np.asarray(s) for s in sequences]).astype(np.int32)
    spans = SimpleNamespace(starts=ends - lengths, ends=ends)
    return PackedSequences(
        torch.from_numpy(flat), spans, max_seq_len=max_seq_len, next_items=next_items
    )


def make_model(num_items=40, max_seq_len=10, width=16, seed=0, **flags):
    model = SASRec(
        num_items,
        max_seq_len=max_seq_len,
        embedding_dim=width,
        num_blocks=2,
        num_heads=2,
        **{"dropout_rate": 0.0, **flags},
    )
    model.reset_parameters(torch.Generator().manual_seed(seed))
    # biases away from zero, so that padding shows wherever it is let in
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "sasrec_golden.npz")


@pytest.fixture
def paper_model(golden):
    num_items, width, length, blocks, heads = golden["hparams"][:5].tolist()
    model = SASRec(
        num_items,
        max_seq_len=length,
        embedding_dim=width,
        num_blocks=blocks,
        num_heads=heads,
        dropout_rate=0.0,
        attend_padding=True,
        predict_first_item=True,
    )
    w = {name[2:]: torch.from_numpy(golden[name]) for name in golden.files if name[:2] == "w/"}
    state = {
        "item_embedding": w["item_embedder.item_emb.weight"][:-1],
        "position_embedding": w["item_embedder.pos_emb.pe.weight"],
        "output_norm.weight": w["output_normalization.last_layernorm.weight"],
        "output_norm.bias": w["output_normalization.last_layernorm.bias"],
    }
    for n in range(blocks):
        layers = "sasrec_layers."
        for kind in ("weight", "bias"):
            attention = f"{layers}attention_layers.{n}."
            norms = f"{layers}attention_layernorms.{n}.{kind}"
            forward = f"{layers}forward_layers.{n}."
            state |= {
                f"blocks.{n}.in_{kind}": w[f"{attention}in_proj_{kind}"],
                f"blocks.{n}.out.{kind}": w[f"{attention}out_proj.{kind}"],
                f"blocks.{n}.attention_norm.{kind}": w[norms],
                f"blocks.{n}.feed_forward_norm.{kind}": w[f"{layers}forward_layernorms.{n}.{kind}"],
                f"blocks.{n}.inner.{kind}": w[f"{forward}conv1.{kind}"].squeeze(),
                f"blocks.{n}.outer.{kind}": w[f"{forward}conv2.{kind}"].squeeze(),
            }
    model.load_state_dict(state)
    return model


@pytest.fixture
def paper_batch(golden):
    """The golden windows, taken apart: the last input and its label end every sequence."""
    sequences = []
    for x, labels, mask in zip(golden["x"], golden["labels"], golden["label_mask"], strict=True):
        count = int(mask.sum())
        first = [] if count < len(x) else [x[0]]
        whole = np.concatenate([first, labels[len(labels) - count :]])
        # ten of ten positions labelled: whether the first input is real decides the length
        sequences.append(whole[-11:])
    lengths = golden["lengths"]
    sequences = [s[-min(n, 11) :] for s, n in zip(sequences, lengths, strict=True)]
    return pack(sequences, 10).batch(np.arange(len(sequences)))


def flat_order(golden):
    """Index of each golden target (row-major) among our targets: tokens, then first items."""
    pads, labelled = golden["pad_mask"], golden["label_mask"]
    tokens = np.cumsum(pads[labelled].astype(int)) - 1
    firsts = np.cumsum(~pads[labelled]) - 1 + int((pads & labelled).sum())
    return np.where(pads[labelled], tokens, firsts)


def test_golden_hidden_states_and_scores(golden, paper_model, paper_batch):
    hidden = paper_model(paper_batch).detach()
    expected = torch.from_numpy(golden["hidden"])[torch.from_numpy(golden["pad_mask"])]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    states = paper_model.encode(paper_batch)
    scores = states @ paper_model.output_weight.T
    np.testing.assert_allclose(scores.detach(), golden["last_scores"], atol=1e-5)


def check_gradient(model, loss, expected):
    model.zero_grad()
    loss.backward()
    # the golden table has one more row, for padding
    np.testing.assert_allclose(model.item_embedding.grad, expected[:-1], atol=1e-5)


def test_golden_ce(golden, paper_model, paper_batch):
    made = paper_model.predictions(paper_batch, 0)
    assert made.targets.shape == (34,)
    loss = cross_entropy(made.hidden, paper_model.output_weight, made.targets)
    assert loss.item() == pytest.approx(golden["loss/ce"].item(), abs=1e-5)
    check_gradient(paper_model, loss, golden["grad_item/ce"])


def test_golden_ce_without_first_items(paper_model, paper_batch):
    hidden = paper_model(paper_batch)
    loss = cross_entropy(hidden, paper_model.output_weight, paper_batch.targets)
    assert loss.item() == pytest.approx(4.3401, abs=1e-4)


def test_golden_ce_minus(golden, paper_model, paper_batch):
    made = paper_model.predictions(paper_batch, 0)
    negatives = torch.empty(34, 7, dtype=torch.int64)
    negatives[torch.from_numpy(flat_order(golden))] = torch.from_numpy(golden["negatives"])
    assert (negatives == made.targets[:, None]).any(), "the golden draws hold a hit"
    loss = sampled_cross_entropy(made.hidden, paper_model.output_weight, made.targets, negatives)
    assert loss.item() == pytest.approx(golden["loss/ce_sampled"].item(), abs=1e-5)
    check_gradient(paper_model, loss, golden["grad_item/ce_sampled"])


def test_golden_bce(golden, paper_model, paper_batch):
    made = paper_model.predictions(paper_batch, 0)
    negatives = torch.empty(34, 7, dtype=torch.int64)
    negatives[torch.from_numpy(flat_order(golden))] = torch.from_numpy(golden["negatives"])
    loss = binary_cross_entropy(made.hidden, paper_model.output_weight, made.targets, negatives)
    # the paper adds 1e-6 inside each logarithm, which is worth more than float rounding
    scores = made.hidden @ paper_model.output_weight.T
    correction = (
        sum(
            (torch.log(s.sigmoid() + 1e-6) - F.logsigmoid(s)).sum()
            for s in (
                scores.gather(1, made.targets[:, None]),
                -scores.gather(1, negatives),
            )
        )
        / 34
    )
    expected = golden["loss/bce_sampled"].item()
    assert (loss - correction).item() == pytest.approx(expected, abs=1e-5)
    check_gradient(paper_model, loss - correction, golden["grad_item/bce_sampled"])


def test_golden_counted_padding(golden, paper_model, paper_batch):
    paper_model._count_padding = True
    made = paper_model.predictions(paper_batch, 0)
    loss = cross_entropy(
        made.hidden, paper_model.output_weight, made.targets, target_weight=made.weight
    )
    expected = golden["loss/cce_as_coded_pads_counted_as_item0"].item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=9),
    attend_padding=st.booleans(),
    seed=st.integers(0, 5),
)
def test_packed_equals_padded(lengths, attend_padding, seed):
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, 40, size=n) for n in lengths]
    model = make_model(attend_padding=attend_padding, seed=seed)
    batch = pack(sequences, 10).batch(np.arange(len(sequences)))
    items, real = to_windows([s[:-1] for s in sequences], 10)
    weights = {k: v.requires_grad_() for k, v in weights_of(model).items()}
    windows = padded_sasrec(
        weights, items, real, num_blocks=2, num_heads=2, attend_padding=attend_padding
    )[batch.users]
    expected = windows[real[batch.users]]
    hidden = model(batch)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
    (hidden * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def test_encode_takes_last_state_and_padding_for_no_history():
    model = make_model().eval()
    sequences = [[1, 2, 3], [], [4], list(range(15))]
    packed = pack(sequences, 10, next_items=False)
    states = encode_users(model, packed, np.arange(4), 16).detach()
    torch.testing.assert_close(states[1], model.output_norm.bias.detach())
    items, real = to_windows(sequences, 10)
    windows = padded_sasrec(
        weights_of(model), items, real, num_blocks=2, num_heads=2, attend_padding=False
    )
    for row in (0, 2, 3):
        torch.testing.assert_close(states[row], windows[row, -1], atol=1e-5, rtol=1e-5)


def test_initial_weights_have_the_spread_of_the_reference():
    model = SASRec(
        4000, max_seq_len=50, embedding_dim=64, num_blocks=2, num_heads=2, dropout_rate=0.1
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    assert model.item_embedding.std().item() == pytest.approx((2 / 4065) ** 0.5, rel=0.02)
    assert model.position_embedding.std().item() == pytest.approx((2 / 114) ** 0.5, rel=0.05)
    block = model.blocks[0]
    assert block.in_weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
    assert block.inner.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert not block.in_bias.any()
    assert not block.out.bias.any()
    assert block.inner.bias.abs().max() <= 1 / 8
    assert block.inner.bias.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.3)


@pytest.mark.parametrize("attend_padding", [False, True])
def test_dropout_has_the_mean_and_spread_of_the_padded_model(attend_padding):
    """Dropout draws differ between layouts, so means and spreads over many draws are compared."""
    model = make_model(dropout_rate=0.3, attend_padding=attend_padding).train()
    generator = np.random.default_rng(0)
    # windows that are full or nearly so: one dropped sink stands for few dropped keys
    sequences = [generator.integers(0, 40, size=n) for n in (11, 11, 10)]
    batch = pack(sequences, 10).batch(np.arange(3))
    items, real = to_windows([s[:-1] for s in sequences], 10)
    weights = weights_of(model)
    torch.manual_seed(0)
    draws = 1500
    with torch.no_grad():
        ours = torch.stack([model(batch) for _ in range(draws)])
        theirs = torch.stack(
            [
                padded_sasrec(
                    weights,
                    items,
                    real,
                    num_blocks=2,
                    num_heads=2,
                    attend_padding=attend_padding,
                    dropout=0.3,
                )[batch.users][real[batch.users]]
                for _ in range(draws)
            ]
        )
    error = (ours.var(0) + theirs.var(0)).div(draws).sqrt()
    distance = (ours.mean(0) - theirs.mean(0)).abs() / error
    assert distance.max() < 5.0
    assert distance.square().mean() == pytest.approx(1.0, abs=0.35)
    ratio = ours.std(0) / theirs.std(0)
    assert ratio.log().abs().max() < 0.15
