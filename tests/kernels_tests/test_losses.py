"""Losses and every gradient against a float64 reference, by each implementation."""

import pytest
import torch

from kernels.linear_cross_entropy import torch_chunked, torch_fused
from kernels.linear_cross_entropy.api import (
    gbce_power,
    linear_binary_cross_entropy,
    linear_cross_entropy,
)
from kernels.linear_cross_entropy.problem import LogitOptions
from kernels.negatives import Negatives
from kernels.scalable import scalable_cross_entropy

IMPLS = ("triton", "torch")


def problem(num_tokens, num_items, width, device, dtype=torch.float32, ignored=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(num_items, width, generator=generator)
    bias = torch.randn(num_items, generator=generator)
    target = torch.randint(num_items, (num_tokens,), generator=generator)
    target[num_tokens - ignored :] = -100
    return [t.to(device, dtype) for t in (e, weight, bias)] + [target.to(device)]


def run(function, inputs, **options):
    *tensors, target = inputs
    e, weight, bias = (t.detach().clone().requires_grad_() for t in tensors)
    torch.manual_seed(5)
    extra = {} if function is scalable_cross_entropy else {"bias": bias}
    loss = function(e, weight, target, **extra, **options)
    loss.sum().backward()
    grads = [e.grad, weight.grad] + ([bias.grad] if extra else [])
    return [loss.detach().double(), *(g.double() for g in grads)]


def check(function, inputs, impl, **options):
    """Error against float64 at most twice that of plain torch in the same dtype, plus 1e-5."""
    exact = run(function, inputs, impl="reference", **options)
    plain = run(function, inputs, impl="dense", **options)
    ours = run(function, inputs, impl=impl, **options)
    for name, mine, theirs, truth in zip(
        ("loss", "e", "weight", "bias"), ours, plain, exact, strict=False
    ):
        assert torch.isfinite(mine).all(), name
        bound = 2 * (theirs - truth).abs().max() + 1e-5 * max(1.0, float(truth.abs().max()))
        assert (mine - truth).abs().max() <= bound, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "softcap": 5.0, "logit_scale": 0.3, "z_loss": 1e-3},
        {"reduction": "none", "label_smoothing": 0.1},
        {"num_items": 1000},
        {"filter_eps": 0.01},
        {"filter_eps": 0.02, "filter_mode": "unbiased"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_full_softmax(impl, options, device):
    check(linear_cross_entropy, problem(97, 611, 40, device), impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [None, 1, 32])
def test_half_precision(impl, dtype, share, device):
    inputs = problem(64, 300, 32, device, dtype)
    negatives = None if share is None else Negatives(16, share=share, seed=1)
    check(linear_cross_entropy, inputs, impl, negatives=negatives, logit_scale=0.3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [1, 4, 33, "batch"])
@pytest.mark.parametrize(
    ("sampler", "hits"),
    [
        ("uniform", "exclude"),
        ("uniform", "keep"),
        ("popularity", "exclude"),
        ("log_uniform", "mask"),
        ("in_batch", "exclude"),
    ],
)
def test_sampled_softmax(impl, share, sampler, hits, device):
    inputs = problem(70, 213, 24, device)
    options = {}
    if sampler == "popularity":
        options["item_counts"] = torch.arange(1, 214, device=device)
    if sampler == "log_uniform":
        options["ranking"] = torch.randperm(213, generator=torch.Generator().manual_seed(2))
    negatives = Negatives(13, sampler=sampler, hits=hits, share=share, seed=2**40 + 3, **options)
    check(linear_cross_entropy, inputs, impl, negatives=negatives, logit_scale=0.4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [1, 40])
@pytest.mark.parametrize(
    ("draws", "options"),
    [
        ({"stratified": True}, {}),
        ({"logq": "classic", "hits": "mask"}, {"z_loss": 0.01}),
        ({"logq": "refined", "hits": "mask"}, {}),
        ({"logq": False}, {"softcap": 4.0}),
        ({}, {"paper_compat": True}),
        ({}, {"filter_eps": 0.05}),
        ({}, {"filter_eps": 0.05, "filter_mode": "unbiased"}),
        ({}, {"deterministic": True}),
    ],
    ids=["stratified", "classic", "refined", "no-logq", "paper", "drop", "unbiased", "determinist"],
)
def test_sampled_options(impl, share, draws, options, device):
    inputs = problem(70, 91, 24, device)
    negatives = Negatives(13, share=share, seed=3, **draws)
    check(linear_cross_entropy, inputs, impl, negatives=negatives, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [1, 40])
@pytest.mark.parametrize("loss", ["bce_plus", "gbce"])
def test_binary_losses(impl, share, loss, device):
    inputs = problem(70, 91, 24, device)
    options = {"negatives": Negatives(13, share=share, seed=3)}
    if loss == "gbce":
        options |= {"positive_power": gbce_power(13, 91, 0.75), "average": True}
    check(linear_binary_cross_entropy, inputs, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.0}, {"alpha": 0.7, "mix": False, "beta": 0.5}, {"alpha": 1.0, "bucket_size_x": 9}],
)
def test_scalable(impl, options, device):
    inputs = problem(16, 120, 24, device)
    check(scalable_cross_entropy, inputs, impl, seed=4, bucket_size_y=30, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [None, 1, "batch"])
@pytest.mark.parametrize(
    ("num_tokens", "num_items", "width", "ignored"),
    [(1, 37, 5, 0), (6, 37, 48, 6), (5, 2, 16, 0)],
    ids=["one-token", "all-ignored", "two-items"],
)
def test_odd_shapes(impl, share, num_tokens, num_items, width, ignored, device):
    inputs = problem(num_tokens, num_items, width, device, ignored=ignored)
    negatives = None if share is None else Negatives(1, share=share, seed=3)
    check(linear_cross_entropy, inputs, impl, negatives=negatives)
    if ignored == num_tokens:
        assert run(linear_cross_entropy, inputs, impl=impl, negatives=negatives)[0] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_one_item(impl, device):
    loss, *grads = run(linear_cross_entropy, problem(4, 1, 8, device, ignored=0), impl=impl)
    assert loss.abs() < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [None, 20])
def test_wide_embeddings_are_split(impl, share, device):
    inputs = problem(20, 70, 300, device)
    negatives = None if share is None else Negatives(9, share=share, seed=3)
    check(linear_cross_entropy, inputs, impl, negatives=negatives, logit_scale=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_common_offset_of_logits(impl, device):
    e, weight, bias, target = problem(30, 90, 16, device)
    plain = run(linear_cross_entropy, [e, weight, bias, target], impl=impl)
    lifted = run(linear_cross_entropy, [e, weight, bias + 1024.0, target], impl=impl)
    for a, b in zip(plain, lifted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [None, 1, 32])
def test_strided_and_misaligned_inputs(impl, share, device):
    e, weight, bias, target = problem(40, 90, 17, device)
    strided = [
        torch.stack([e, e], 2)[..., 0],
        torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(90, 17),
        torch.stack([bias, bias], 1)[:, 0],
        torch.stack([target, target], 1)[:, 0],
    ]
    negatives = None if share is None else Negatives(9, share=share, seed=3)
    for a, b in zip(
        run(linear_cross_entropy, [e, weight, bias, target], impl=impl, negatives=negatives),
        run(linear_cross_entropy, strided, impl=impl, negatives=negatives),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_negative_hits(impl, device):
    """Two items, three masked draws: most tokens lose all, none may become NaN."""
    inputs = problem(64, 5, 8, device)
    ids = inputs[3].clamp(min=0)[:, None].expand(-1, 3)
    negatives = Negatives(3, sampler=ids, logq=False, hits="mask")
    loss, *grads = run(
        linear_cross_entropy, inputs, impl=impl, negatives=negatives, reduction="none"
    )
    assert loss.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads)


def test_weights_and_lse_have_gradients(device):
    e, weight, _, target = problem(30, 90, 16, device)
    sample_weight = torch.rand(30, device=device)
    results = []
    for impl in ("torch", "reference"):
        leaf = e.clone().requires_grad_()
        loss, lse = linear_cross_entropy(
            leaf, weight, target, sample_weight=sample_weight, return_lse=True, impl=impl
        )
        (loss + lse.square().mean()).backward()
        results.append((loss.double(), leaf.grad.double()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_with_num_items(device):
    e, weight, bias, target = problem(40, 90, 16, device)
    whole = run(linear_cross_entropy, [e, weight, bias, target], impl="torch")[2]
    count = int((target >= 0).sum())
    parts = [
        run(linear_cross_entropy, [e[s], weight, bias, target[s]], impl="torch", num_items=count)[2]
        for s in (slice(0, 7), slice(7, 40))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-7)


def test_huge_rows_are_addressed_in_64_bits():
    """The last draw of N * ns > 2**31 has a 64-bit counter and its own words."""
    from kernels.philox import philox4x32, words

    rows = torch.tensor([2**31 // 1023 + 7, 2**40])
    drawn = words(9, rows, 1023)
    counter = rows * 256 + 1022 // 4
    assert int(counter.max()) > 2**32
    expected = torch.stack(philox4x32(9, counter), -1)[:, 1022 % 4]
    assert torch.equal(drawn[:, -1, 0], expected)
    wrapped = torch.stack(philox4x32(9, counter & 0xFFFFFFFF), -1)[:, 1022 % 4]
    assert not torch.equal(drawn[:, -1, 0], wrapped)


@pytest.mark.gpu
def test_more_than_two_billion_elements(cuda):
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    num_items, width = 2**31 // 256 + 4096, 256
    weight = torch.zeros(num_items, width, dtype=torch.bfloat16, device=cuda)
    weight[-1] = 1.0
    e = torch.ones(16, width, dtype=torch.bfloat16, device=cuda, requires_grad=True)
    target = torch.full((16,), num_items - 1, device=cuda)
    loss = linear_cross_entropy(e, weight, target, logit_scale=1 / 16, impl="triton")
    expected = torch.log(torch.tensor(num_items - 1.0).double() + 2.718281828**16) - 16
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert torch.isfinite(e.grad).all()


def test_paper_loss_equals_the_published_code(shared, device):
    import numpy as np

    golden = np.load(shared / "golden" / "sasrec_golden.npz")
    hidden = torch.from_numpy(golden["hidden"]).to(device)
    items = torch.from_numpy(golden["w/" + _item_table(golden)]).to(device)
    mask = torch.from_numpy(golden["label_mask"]).to(device).bool()
    target = torch.from_numpy(golden["labels"]).to(device)[mask]
    ids = torch.from_numpy(golden["negatives"]).to(device)
    negatives = Negatives(ids.shape[1], sampler=ids, logq=False)
    for impl in IMPLS:
        loss = linear_cross_entropy(
            hidden[mask], items[:-1].contiguous(), target, negatives=negatives, paper_compat=True,
            impl=impl,
        )  # fmt: skip
        expected = float(golden["loss/cce_minus_kernel_as_coded"])
        assert float(loss) == pytest.approx(expected, abs=2e-5)


def _item_table(golden):
    width = golden["hidden"].shape[-1]
    return next(
        name[2:]
        for name in golden.files
        if name.startswith("w/") and golden[name].shape == (41, width)
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.1, -20.0], ids=["large", "small", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_found_on_the_way_forward(dtype, scale, threads, monkeypatch):
    """Blocks of tokens and tiles of items, the last ones partial; some tokens weigh nothing."""
    monkeypatch.setattr(torch_fused, "MAX_BLOCK", 16)
    monkeypatch.setattr(torch_fused, "MIN_BLOCK", 16)
    monkeypatch.setattr(torch_fused, "TILE_ELEMENTS", 300)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = problem(41, 151, 24, "cpu", dtype)
    inputs[3][5:8] = -100
    inputs[3][9] = inputs[3][10]
    weights = torch.linspace(0, 2, 41)
    called = spy(monkeypatch, torch_fused, "forward_and_gradients")
    for options in ({}, {"sample_weight": weights, "reduction": "sum"}, {"num_items": 7.0}):
        check(linear_cross_entropy, inputs, "torch", logit_scale=scale, **options)
    assert len(called) == 3


def test_items_that_a_bias_rules_out(monkeypatch):
    """A bias of minus infinity over whole tiles, the first among them."""
    monkeypatch.setattr(torch_fused, "TILE_ELEMENTS", 300)
    e, weight, bias, target = problem(10, 90, 8, "cpu")
    target.clamp_(min=60)
    bias[:60] = -torch.inf
    kept = [e, weight[60:], bias[60:], (target - 60).clamp(min=0)]
    ours = run(linear_cross_entropy, [e, weight, bias, target], impl="torch")
    without = run(linear_cross_entropy, kept, impl="reference")
    torch.testing.assert_close(ours[0], without[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], without[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[2][60:], without[2], rtol=1e-4, atol=1e-6)
    assert not ours[2][:60].any()
    assert not ours[3][:60].any()


def test_bounds_on_memory_send_large_catalogs_through_twice(monkeypatch):
    inputs = problem(40, 100, 8, "cpu")
    called = spy(monkeypatch, torch_fused, "forward_and_gradients")
    with monkeypatch.context() as bounds:
        bounds.setattr(torch_fused, "BUFFER_BYTES", 4 * 100 * 31)
        check(linear_cross_entropy, inputs, "torch")
    with monkeypatch.context() as bounds:
        bounds.setattr(torch_fused, "GRADIENT_BYTES", 4 * 100 * 8 - 1)
        check(linear_cross_entropy, inputs, "torch")
    assert not called
    monkeypatch.setattr(torch_fused, "BUFFER_BYTES", 4 * 100 * 32)
    monkeypatch.setattr(torch_fused, "GRADIENT_BYTES", 4 * 100 * 8)
    check(linear_cross_entropy, inputs, "torch")
    assert called


@pytest.mark.parametrize(
    ("num_items", "tokens"),
    [(10, 128), (524_288, 128), (700_000, 80), (1_000_000, 64), (2_097_152, 32), (3_000_000, 0)],
)
def test_blocks_of_tokens_fill_vectors_and_the_buffer(num_items, tokens):
    weight = torch.empty(num_items, 4, device="meta")
    assert torch_fused.block_tokens(4096, weight) == tokens


def spy(monkeypatch, module, name):
    """Calls of a function that still does its work."""
    original, calls = getattr(module, name), []

    def watched(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.mark.parametrize("scale", [1.0, 0.1, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_logits_need_no_maximum(scale, dtype, monkeypatch):
    """Both ways through the torch path, over many tiles, the last of them partial."""
    monkeypatch.setattr(torch_chunked, "CPU_TILE", (16, 16))
    monkeypatch.setattr(torch_chunked, "CPU_THREADS_TILE", (16, 16))
    inputs = problem(41, 150, 24, "cpu", dtype)
    plain = torch_chunked._are_small(*inputs[:3], LogitOptions(scale))
    assert plain == (abs(scale) < 1)
    check(linear_cross_entropy, inputs, "torch", logit_scale=scale, reduction="none")
    check(linear_cross_entropy, inputs, "torch", logit_scale=scale, z_loss=1e-3)
