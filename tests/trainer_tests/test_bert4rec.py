import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_bert4rec import padded_bert4rec
from padded_reference import to_windows

from db.spec import RunSpec, RunStatus
from trainer.data.batches import PackedSequences
from trainer.loop import train
from trainer.losses import make_loss
from trainer.models.bert4rec import BERT4Rec, mask_tokens
from trainer.models.build import build_model
from trainer.models.network import Predictions
from trainer.plain_losses import cross_entropy


def pack(sequences, max_seq_len=10):
    lengths = np.array([len(s) for s in sequences])
    ends = np.cumsum(lengths)
    flat = np.concatenate([np.asarray(s) for s in sequences]).astype(np.int32)
    spans = SimpleNamespace(starts=ends - lengths, ends=ends)
    packed = PackedSequences(
        torch.from_numpy(flat), spans, max_seq_len=max_seq_len, next_items=False
    )
    return packed.batch(np.arange(len(sequences)))


def make_model(num_items=40, max_seq_len=10, seed=0, dropout_rate=0.0, **more):
    model = BERT4Rec(
        num_items,
        max_seq_len=max_seq_len,
        embedding_dim=16,
        num_blocks=2,
        num_heads=2,
        dropout_rate=dropout_rate,
        **{"mask_probability": 0.3, **more},
    )
    model.reset_parameters(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def random_sequences(seed, count=9, longest=14, num_items=40):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, size=count)
    return [generator.integers(num_items, size=n) for n in lengths]


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "bert4rec_golden.npz")


GOLDEN_BLOCK = {
    "in_weight": "attention.in_proj_weight",
    "in_bias": "attention.in_proj_bias",
    "out.weight": "attention.out_proj.weight",
    "out.bias": "attention.out_proj.bias",
    "attention_norm.weight": "attention_norm.weight",
    "attention_norm.bias": "attention_norm.bias",
    "feed_forward_norm.weight": "pff_norm.weight",
    "feed_forward_norm.bias": "pff_norm.bias",
    "inner.weight": "pff.w_1.weight",
    "inner.bias": "pff.w_1.bias",
    "outer.weight": "pff.w_2.weight",
    "outer.bias": "pff.w_2.bias",
}


@pytest.fixture(params=["untied", "tied"])
def golden_case(request, golden):
    """The golden model and its reference values by name."""
    kind = request.param
    num_items, width, length, blocks, heads, _ = golden["hparams"].tolist()
    found = {n.removeprefix(kind + "/"): torch.from_numpy(golden[n]) for n in golden.files}
    w = {n[2:]: value for n, value in found.items() if n.startswith("w/")}
    state = {
        "item_embedding": w["item_embedder.cat_embeddings.item_id_seq.weight"],
        "mask_embedding": w["item_embedder.mask_embedding.weight"].squeeze(0),
        "position_embedding": w["item_embedder.position.pe.weight"],
    }
    if kind == "tied":
        state["head_bias"] = w["_head.out_bias"]
    else:
        state["head_weight"] = w["_head.linear.weight"]
        state["head_bias"] = w["_head.linear.bias"]
    for n in range(blocks):
        state |= {
            f"blocks.{n}.{ours}": w[f"transformer_blocks.{n}.{theirs}"]
            for ours, theirs in GOLDEN_BLOCK.items()
        }
    model = BERT4Rec(
        num_items,
        max_seq_len=length,
        embedding_dim=width,
        num_blocks=blocks,
        num_heads=heads,
        dropout_rate=0.0,
        mask_probability=0.15,
        tied_head=kind == "tied",
    )
    model.load_state_dict(state)
    return model, found


def golden_batch(found):
    """The golden windows without padding; rows stand in the order of length already."""
    sequences = [x[real].numpy() for x, real in zip(found["x"], found["pad_mask"], strict=True)]
    assert [len(s) for s in sequences] == sorted(len(s) for s in sequences)
    batch = pack(sequences)
    assert batch.users.tolist() == list(range(len(sequences)))
    return batch


def test_golden_hidden_states_and_loss(golden_case):
    model, found = golden_case
    batch = golden_batch(found)
    real = found["pad_mask"]
    masked = ~found["token_mask"][real]
    hidden = model(batch.items, batch.positions, masked, batch.lengths)
    torch.testing.assert_close(hidden, found["hidden"][real], atol=1e-5, rtol=0)
    loss = cross_entropy(
        hidden[masked], model.output_weight, batch.items[masked], bias=model.output_bias
    )
    assert loss.item() == pytest.approx(found["loss_ce"].item(), abs=1e-5)


def test_golden_scores(golden_case):
    model, found = golden_case
    real = found["infer_pad_mask"] & found["infer_token_mask"]
    before = [x[m].numpy() for x, m in zip(found["infer_x"], real, strict=True)]
    # a history one longer than what fits beside the mask: its first item must fall out
    whole = [np.concatenate([[39], x]) if len(x) == 9 else x for x in before]
    batch = pack(whole)
    states = model.encode(batch)
    scores = F.linear(states, model.output_weight, model.output_bias)
    expected = found["scores"][torch.from_numpy(batch.users)]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tied=st.booleans())
def test_packed_equals_padded_with_gradients(seed, tied):
    sequences = random_sequences(seed)
    model = make_model(seed=seed, tied_head=tied)
    batch = pack(sequences)
    made = model.predictions(batch, seed)
    cross_entropy(made.hidden, model.output_weight, made.targets, bias=model.head_bias).backward()

    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    items, real = to_windows([sequences[user] for user in batch.users], 10)
    masked = torch.zeros_like(real)
    masked[real] = mask_tokens(batch, 0.3, seed)
    hidden = padded_bert4rec(weights, items, real, masked, num_blocks=2, num_heads=2)
    head = weights["item_embedding" if tied else "head_weight"]
    expected = cross_entropy(hidden[masked], head, items[masked], bias=weights["head_bias"])
    expected.backward()
    torch.testing.assert_close(made.targets, items[masked])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-5, rtol=1e-4)


def test_encode_puts_the_mask_last_and_moves_the_history_up():
    sequences = [[], [3], [5, 6, 7], list(range(9)), list(range(10)), list(range(14)), []]
    model = make_model()
    batch = pack(sequences)
    states = model.encode(batch)
    weights = dict(model.named_parameters())
    for row, user in enumerate(batch.users):
        items, real = to_windows([[*sequences[user][-9:], 0]], 10)
        masked = torch.zeros_like(real)
        masked[0, -1] = True
        expected = padded_bert4rec(weights, items, real, masked, num_blocks=2, num_heads=2)
        torch.testing.assert_close(states[row], expected[0, -1], atol=1e-5, rtol=1e-4)


def test_encode_in_a_window_of_one_sees_no_history():
    model = make_model(max_seq_len=1)
    states = model.encode(pack([[3], [5, 6], []], max_seq_len=1))
    torch.testing.assert_close(states, states[:1].expand(3, -1))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), probability=st.floats(0.01, 0.99))
def test_every_user_gets_a_target_and_keeps_context(seed, probability):
    batch = pack(random_sequences(seed % 1000))
    masked = mask_tokens(batch, probability, seed)
    for part in masked.split(batch.lengths.tolist()):
        assert part.any()
        assert len(part) == 1 or not part.all()


def test_mask_rate_and_seed():
    batch = pack([np.zeros(200, dtype=int)] * 200, max_seq_len=200)
    masked = mask_tokens(batch, 0.15, 1)
    assert masked.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(masked, mask_tokens(batch, 0.15, 1))
    assert not torch.equal(masked, mask_tokens(batch, 0.15, 2))


def test_masked_items_do_not_reach_the_states():
    batch = pack(random_sequences(4))
    model = make_model()
    before = model.predictions(batch, 5)
    items = batch.items.clone()
    items[mask_tokens(batch, 0.3, 5)] = 0
    after = model.predictions(dataclasses.replace(batch, items=items), 5)
    assert torch.equal(before.hidden, after.hidden)
    assert not torch.equal(before.targets, after.targets)


def test_states_see_both_sides():
    model = make_model()
    items = torch.arange(5)
    masked = torch.tensor([False, False, True, False, False])
    lengths = np.array([5])
    states = model(items, torch.arange(5, 10), masked, lengths)
    for changed in (0, 4):
        other = items.clone()
        other[changed] = 30
        assert not torch.allclose(states[2], model(other, torch.arange(5, 10), masked, lengths)[2])


def test_dropout_in_training_only():
    batch = pack(random_sequences(6))
    model = make_model(dropout_rate=0.5)
    assert not torch.equal(model.predictions(batch, 0).hidden, model.predictions(batch, 0).hidden)
    model.eval()
    assert torch.equal(model.predictions(batch, 0).hidden, model.predictions(batch, 0).hidden)


def test_initial_weights():
    model = BERT4Rec(
        3000, max_seq_len=50, embedding_dim=64, num_blocks=1, num_heads=2, dropout_rate=0.1,
        mask_probability=0.2, tied_head=False,
    )  # fmt: skip
    model.reset_parameters(torch.Generator().manual_seed(0))
    expected = (2.0 / (3000 + 64)) ** 0.5
    assert model.item_embedding.std().item() == pytest.approx(expected, rel=0.02)
    assert model.head_weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.mask_embedding.std().item() == pytest.approx((2.0 / 65) ** 0.5, rel=0.3)
    block = model.blocks[0]
    assert block.inner.weight.shape == (256, 64)
    assert block.outer.bias.abs().max().item() == pytest.approx(1 / 16, rel=0.2)


LOSSES = [
    {"loss": "ce"},
    {"loss": "bce", "num_negatives": 1},
    {"loss": "ce_minus", "num_negatives": 7},
    {"loss": "cce"},
    {"loss": "cce_minus", "num_negatives": 7},
    {"loss": "bce_plus", "num_negatives": 7},
    {"loss": "gbce", "num_negatives": 7},
    {"loss": "sce", "sce_bucket_size_y": 8},
]


def make_spec(**fields):
    return RunSpec(
        **{
            "dataset": "ring",
            "model": "bert4rec",
            "batch_size": 16,
            "max_seq_len": 12,
            "embedding_dim": 16,
            "max_epochs": 2,
            "mask_probability": 0.3,
            **fields,
        }
    )


@pytest.mark.parametrize("fields", LOSSES, ids=lambda fields: fields["loss"])
def test_item_biases_take_part_in_every_loss(fields):
    spec = make_spec(dropout_rate=0.0, precision="fp32", **fields)
    model = build_model(spec, 40)
    model.reset_parameters(torch.Generator().manual_seed(0))
    made = model.predictions(pack(random_sequences(8), 12), 0)
    assert isinstance(made, Predictions)
    loss = make_loss(spec, 40)
    loss(made, model.output_weight, model.output_bias, 0).backward()
    assert model.head_bias.grad.abs().sum() > 0
    assert model.mask_embedding.grad.abs().sum() > 0


def test_fused_softmax_equals_the_plain_one_with_item_biases():
    batch = pack(random_sequences(9), 12)
    found = {}
    for loss in ("ce", "cce"):
        spec = make_spec(loss=loss, dropout_rate=0.0, precision="fp32")
        model = build_model(spec, 40)
        model.reset_parameters(torch.Generator().manual_seed(2))
        made = model.predictions(batch, 1)
        value = make_loss(spec, 40)(made, model.output_weight, model.output_bias, 0)
        value.backward()
        found[loss] = [value.detach(), *(p.grad for p in model.parameters())]
    for plain, fused in zip(found["ce"], found["cce"], strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-4)


def test_training_learns_the_walk_from_both_sides(dataset, recorder):
    spec = make_spec(
        max_epochs=90, learning_rate=0.01, dropout_rate=0.0, evaluate_every_steps=10_000
    )
    result = train(spec, dataset, recorder)
    assert result.status is RunStatus.DONE
    assert result.num_steps == len(recorder.steps) == 270
    losses = [row.loss for row in recorder.steps]
    assert np.mean(losses[:4]) == pytest.approx(np.log(40), rel=0.1)
    assert np.mean(losses[-9:]) < 0.6 * np.log(40)
    assert result.test["hit_rate_at_100"] is not None


def test_training_repeats_and_heeds_its_mask_probability(dataset, recorder):
    def losses(**fields):
        recorder.steps.clear()
        train(make_spec(**fields), dataset, recorder)
        return [row.loss for row in recorder.steps]

    first = losses()
    assert first == losses()
    assert first != losses(mask_probability=0.5)
