"""Errors that name the argument, custom operators, determinism, the choice of implementation."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.alias import AliasTable
from kernels.linear_cross_entropy import api, ops
from kernels.linear_cross_entropy.api import (
    explain,
    gbce_power,
    linear_binary_cross_entropy,
    linear_cross_entropy,
)
from kernels.negatives import Negatives
from kernels.scalable import bucket_loss, bucket_shape, scalable_cross_entropy

E, W = torch.zeros(4, 8), torch.zeros(20, 8)
Y = torch.tensor([0, 1, 2, 19])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e": torch.zeros(4)}, r"e has shape \(4,\); give \(N, D\)"),
        ({"weight": torch.zeros(20, 7)}, r"weight has shape \(20, 7\)"),
        ({"weight": torch.zeros(0, 8)}, r"weight has shape \(0, 8\)"),
        ({"target": Y[:3]}, r"target has shape \(3,\)"),
        ({"target": torch.tensor([0, 1, 20, 3])}, r"target\[2\]=20 is outside \[0, 20\)"),
        ({"target": torch.tensor([0, -1, 2, 3])}, r"target\[1\]=-1"),
        ({"bias": torch.zeros(19)}, r"bias has shape \(19,\)"),
        ({"weight": torch.zeros(20, 8, device="meta")}, "weight is on meta"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"logit_scale": 0.0}, "logit_scale=0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -0.5}, "z_loss=-0.5"),
        ({"filter_eps": 2.0}, "filter_eps=2.0"),
        ({"filter_mode": "some"}, "filter_mode='some'"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"impl": "cuda"}, "impl='cuda'"),
        ({"sample_weight": torch.ones(3)}, r"sample_weight has shape \(3,\)"),
        ({"paper_compat": True}, "paper_compat=True needs negatives"),
        ({"negatives": Negatives(20)}, r"negatives.num=20 exceeds the 19 items"),
        ({"negatives": Negatives(3), "label_smoothing": 0.1}, "label_smoothing=0.1"),
        (
            {"negatives": Negatives(3, sampler=AliasTable.from_counts(torch.ones(7)))},
            "covers 7 items but weight has 20 rows",
        ),
        (
            {"negatives": Negatives(3, sampler="log_uniform"), "paper_compat": True},
            "paper_compat=True draws uniformly",
        ),
        ({"negatives": Negatives(3, seed=2**63)}, f"negatives.seed={2**63}"),
        ({"num_items": 0}, "num_items=0 divides the loss"),
        ({"negatives": Negatives(3), "accum_dtype": torch.float64}, "accum_dtype=torch.float64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_that_cannot_be(options, message):
    arguments = {"e": E, "weight": W, "target": Y, "validate": True} | options
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e": E.long()}, "e has dtype torch.int64"),
        ({"weight": W.half()}, "weight has dtype torch.float16 but e has torch.float32"),
        ({"target": Y.int()}, "target has dtype torch.int32"),
        ({"e": [1.0]}, "e is a list"),
        ({"sample_weight": [1.0] * 4}, "sample_weight is a list"),
        ({"negatives": 256}, "negatives is a int"),
        ({"accum_dtype": torch.bfloat16}, "accum_dtype=torch.bfloat16"),
    ],
    ids=["e", "weight", "target", "list", "sample_weight", "negatives", "accum_dtype"],
)
def test_types_that_cannot_be(options, message):
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(**({"e": E, "weight": W, "target": Y} | options))


def test_sharded_tensors_are_refused():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="weight is a DTensor"):
        linear_cross_entropy(E, W.as_subclass(DTensor), Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num=0"),
        ({"num": 2, "share": 0}, "share=0"),
        ({"num": 2, "hits": "drop"}, "hits='drop'"),
        ({"num": 2, "logq": "other"}, "logq='other'"),
        ({"num": 2, "sampler": "zipf"}, "sampler='zipf'"),
        ({"num": 2, "sampler": "popularity"}, "item_counts is missing"),
        ({"num": 2, "sampler": "in_batch", "stratified": True}, "stratified=True"),
        ({"num": 2, "ranking": torch.arange(3)}, "ranking has no effect"),
        ({"num": 2, "sampler": torch.zeros(4, 3, dtype=torch.int64)}, r"shape \(4, 3\)"),
        ({"num": 3, "sampler": torch.zeros(4, 3)}, "dtype torch.float32"),
        ({"num": 3, "sampler": torch.zeros(4, 3, dtype=torch.int64)}, "log_q is missing"),
    ],
    ids=lambda value: "",
)
def test_negatives_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Negatives(**options)


@pytest.mark.parametrize("counts", [torch.zeros(3), torch.tensor([1.0, -1.0]), torch.ones(2, 2)])
def test_counts_that_cannot_be(counts):
    with pytest.raises(ValueError, match="counts"):
        AliasTable.from_counts(counts)


def test_other_losses_check_their_knobs():
    with pytest.raises(ValueError, match=r"positive_power=0.0"):
        linear_binary_cross_entropy(E, W, Y, negatives=Negatives(2), positive_power=0.0)
    with pytest.raises(ValueError, match="alpha=-1"):
        scalable_cross_entropy(E, W, Y, alpha=-1)
    with pytest.raises(ValueError, match="bucket_size_y=0"):
        scalable_cross_entropy(E, W, Y, bucket_size_y=0)
    with pytest.raises(ValueError, match="calibration=2"):
        gbce_power(3, 10, 2)
    with pytest.raises(ValueError, match="num_negatives=10"):
        gbce_power(10, 10, 0.5)


def test_gbce_power_at_its_ends():
    assert gbce_power(5, 101, 0.0) == pytest.approx(1.0)
    assert gbce_power(5, 101, 1.0) == pytest.approx(0.05)


def test_bucket_shape_is_the_authors():
    assert bucket_shape(10_000, 2.0, 1.0) == (200, 200)
    assert bucket_shape(10_000, 2.0, 4.0) == (400, 100)


def test_explain_says_why():
    if not torch.cuda.is_available():
        assert explain(E, W) == ("torch", "the tensors are on cpu, the Triton kernels need CUDA")
    assert explain(E.double(), W.double()).reason == "torch.float64 has no Triton kernel"
    assert explain(E, W, "dense").name == "dense"


def test_unsupported_case_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(RuntimeWarning, match="falls back to 'torch': torch.float64"):
        first = linear_cross_entropy(E.double(), W.double(), Y, impl="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_cross_entropy(E.double(), W.double(), Y, impl="triton") == first


def test_wide_embeddings_per_token_fall_back(monkeypatch, device):
    """Tiles cannot leave out each token's own target: that would be a silent wrong number."""
    monkeypatch.setattr(ops, "_warned", set())
    e, weight = torch.randn(4, 1040, device=device), torch.randn(20, 1040, device=device) * 0.01
    target, negatives = Y.to(device), Negatives(5, seed=1)
    with pytest.warns(RuntimeWarning, match="D=1040 above 1024"):
        loss = linear_cross_entropy(e, weight, target, negatives=negatives, impl="triton")
    assert loss == linear_cross_entropy(e, weight, target, negatives=negatives, impl="torch")


@pytest.mark.parametrize("negatives", [None, Negatives(4, seed=2)], ids=["full", "sampled"])
def test_gpu_with_too_little_for_a_kernel_falls_back(negatives, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuse(*_arguments, **_options):
        raise OutOfResources(200_000, 101_376, "shared memory")

    monkeypatch.setattr(ops, "_warned", set())
    for name in ("full", "sampled"):
        for way in ("forward", "backward"):
            monkeypatch.setattr(ops.triton_module(name), way, refuse)
    gradients = []
    for impl in ("torch", "triton"):
        e, weight, target = leaves()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            # what _choose lets through where a GPU is there
            monkeypatch.setattr(api, "_explicit_triton_obstacle", lambda e, weight: "")
            linear_cross_entropy(e, weight, target, negatives=negatives, impl=impl).backward()
        gradients.append((e.grad, weight.grad))
        assert len(seen) == (impl == "triton")
    assert "101376" in str(seen[0].message)
    torch.testing.assert_close(*gradients)


def test_float64_accumulation_is_torchs(monkeypatch, device):
    monkeypatch.setattr(ops, "_warned", set())
    e, weight, target = (t.detach().to(device) for t in leaves())
    weight.requires_grad_()
    with pytest.warns(RuntimeWarning, match="accum_dtype=torch.float64"):
        linear_cross_entropy(e, weight, target, accum_dtype=torch.float64, impl="triton").backward()
    double = weight.detach().double().requires_grad_()
    linear_cross_entropy(e.double(), double, target).backward()
    torch.testing.assert_close(weight.grad, double.grad.float(), rtol=1e-5, atol=1e-7)


def leaves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(12, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    return e, weight, torch.randint(40, (12,), generator=generator)


def test_operators_pass_torchs_own_checks():
    e, weight, target = leaves()
    seed = torch.tensor(3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    full = (e, weight, None, target, seed, 1.0, None, True, 0, 0.0, torch.float32, "torch")
    torch.library.opcheck(ops.full_softmax, full, test_utils=checks)
    total = (e, weight, None, target, torch.ones(len(e)), 1.0)
    torch.library.opcheck(ops.full_softmax_total, total, test_utils=checks)
    sampled = (
        e, weight, None, target, seed, None, None, None, None, None, 0, 4, 1, True, False, 0,
        False, False, 0.0, False, 1.0, None, 0, 0.0, False, "torch",
    )  # fmt: skip
    torch.library.opcheck(ops.sampled_sum, sampled, test_utils=checks)
    members, items = torch.arange(12).view(3, 4), torch.arange(15).view(3, 5)
    torch.library.opcheck(
        bucket_loss, (e, weight, target, members, items, False, "torch"), test_utils=checks
    )


def test_gradients_kept_from_the_forward_pass():
    """Scaled by what comes from above, as often as asked; never taken for constants."""
    e, weight, target = leaves()
    loss = linear_cross_entropy(e, weight, target, impl="torch")
    first = torch.autograd.grad(loss, (e, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (e, weight), retain_graph=True)
    each = linear_cross_entropy(e, weight, target, impl="torch", reduction="none")
    other_way = torch.autograd.grad(each.mean(), (e, weight))
    for once, thrice, other in zip(first, again, other_way, strict=True):
        torch.testing.assert_close(thrice, 3 * once)
        torch.testing.assert_close(once, other)
    (slope,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(e, weight, target, impl="torch"), loss)


def test_checkpointed_loss_has_the_same_gradients():
    for reentrant in (False, True):
        e, weight, target = leaves()

        def loss(e, weight, target=target):
            return linear_cross_entropy(e * 2, weight, target, impl="torch")

        loss(e, weight).backward()
        expected = [e.grad.clone(), weight.grad.clone()]
        e.grad = weight.grad = None
        checkpoint(loss, e, weight, use_reentrant=reentrant).backward()
        torch.testing.assert_close([e.grad, weight.grad], expected)


def test_gradients_by_finite_differences():
    e, weight, target = leaves()
    e, weight = (t.detach()[:, :3].double().requires_grad_() for t in (e[:5], weight[:9]))
    target = target[:5] % 9
    assert torch.autograd.gradcheck(
        lambda *t: linear_cross_entropy(*t, target, impl="torch", logit_scale=0.3), (e, weight)
    )
    assert torch.autograd.gradcheck(
        lambda *t: linear_cross_entropy(*t, target, softcap=3.0, z_loss=0.1, label_smoothing=0.1),
        (e, weight),
    )
    for share in (1, 3):
        negatives = Negatives(4, share=share, seed=1)
        assert torch.autograd.gradcheck(
            lambda *t, n=negatives: linear_cross_entropy(*t, target, negatives=n), (e, weight)
        )


@pytest.mark.parametrize(
    "negatives", [None, Negatives(4, seed=2), Negatives(4)], ids=["full", "sampled", "fresh"]
)
def test_compiled_loss_equals_eager(negatives):
    """A fresh seed comes from torch's generator, inside what is compiled."""
    e, weight, target = leaves()

    def loss(e, weight):
        return linear_cross_entropy(e * 2, weight, target, negatives=negatives, impl="torch")

    torch.manual_seed(3)
    loss(e, weight).backward()
    eager = e.grad.clone()
    e.grad = weight.grad = None
    torch.manual_seed(3)
    torch.compile(loss, backend="aot_eager", fullgraph=True)(e, weight).backward()
    torch.testing.assert_close(e.grad, eager)


def test_checkpointing_draws_the_same_negatives():
    e, weight, target = leaves()

    def loss(e):
        return linear_cross_entropy(e, weight, target, negatives=Negatives(4), impl="torch")

    results = []
    for wrapped in (loss, lambda e: checkpoint(loss, e, use_reentrant=False)):
        torch.manual_seed(9)
        e.grad = None
        value = wrapped(e)
        value.backward()
        results.append((value.detach(), e.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_micro_batches_of_sampled_losses_add_up():
    """Each micro-batch has its own seed; together they divide by the targets of all of them."""
    e, weight, target = leaves()
    parts = [slice(0, 5), slice(5, 12)]
    for seed, part in enumerate(parts):
        negatives = Negatives(4, seed=seed)
        linear_cross_entropy(
            e[part], weight, target[part], negatives=negatives, num_items=12
        ).backward()
    accumulated = weight.grad.clone()
    e.grad = weight.grad = None
    losses = [
        linear_cross_entropy(
            e[part], weight, target[part], negatives=Negatives(4, seed=seed), reduction="none"
        )
        for seed, part in enumerate(parts)
    ]
    torch.cat(losses).mean().backward()
    torch.testing.assert_close(accumulated, weight.grad, rtol=1e-5, atol=1e-7)


def test_autocast_casts_both_sides():
    e, weight, target = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(e, weight, target, impl="torch")
    assert loss.dtype == torch.float32
    loss.backward()
    assert e.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("share", [None, 1, 32])
def test_deterministic_mode_repeats_every_bit(share, device):
    generator = torch.Generator().manual_seed(0)
    e0 = torch.randn(64, 8, generator=generator).to(device)
    w0 = torch.randn(30, 8, generator=generator).to(device)
    target = torch.randint(30, (64,), generator=generator).to(device)
    negatives = None if share is None else Negatives(16, share=share, seed=1)
    seen = []
    for _ in range(10 if device == "cuda" else 2):
        e, weight = e0.clone().requires_grad_(), w0.clone().requires_grad_()
        linear_cross_entropy(
            e, weight, target, negatives=negatives, deterministic=True, impl="triton"
        ).backward()
        seen.append((e.grad, weight.grad))
    for grads in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, seen[0], strict=True))
