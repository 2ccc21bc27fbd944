"""The loss bench: its floors, its ratios, and that nothing in it rots unrun."""

import pytest
import torch

from bench import _kernels_gpu, kernels


@pytest.mark.parametrize(
    ("kind", "share", "seconds"),
    [("full", 1, 7.055), ("sampled", 1, 1.716), ("sampled", 1024, 0.00435)],
)
def test_floors_of_the_largest_shape(kind, share, seconds):
    num_tokens, num_items, num = kernels.SHAPES["megamarket"]
    floor = _kernels_gpu.roofline_seconds(kind, num_tokens, num_items, num, share)
    assert floor == pytest.approx(seconds, rel=0.01)


def test_ratios_compare_with_the_right_rows():
    rows = [
        {"variant": "cce", "num_negatives": "", "ms": 4.0, "forward_ms": 1.0},
        {"variant": "cut-cross-entropy (unfiltered)", "num_negatives": "", "ms": 8.0,
         "forward_ms": 2.0},
        {"variant": "cce_minus share 128", "num_negatives": 511, "ms": 2.0, "forward_ms": 1.0},
        {"variant": "cce_minus share 128 deterministic", "num_negatives": 511, "ms": 3.0,
         "forward_ms": 1.0},
        {"variant": "dense", "num_negatives": "", "error": "out of memory"},
    ]  # fmt: skip
    _kernels_gpu.add_ratios(rows, forward_seconds=0.6e-3)
    assert rows[0]["forward_of_rate"] == pytest.approx(0.6)
    assert rows[0]["over_cut"] == 0.5
    assert rows[3]["over_plain"] == 1.5
    assert "over_cut" not in rows[2]
    assert rows[4] == {"variant": "dense", "num_negatives": "", "error": "out of memory"}


def test_failing_peer_is_a_row(monkeypatch):
    def once(loss, e, weight, target):
        return 1.0, loss(e, weight, target), 100, 0.5

    def broken(e, weight, target):
        raise TypeError("unexpected keyword argument 'impl'\nmore")

    monkeypatch.setattr(_kernels_gpu, "_once", once)
    e, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    losses = {"ours": lambda *_: 10.0, "peer": broken, "slow": lambda *_: 20.0}
    floors = {"ours": 0.002, "peer": 0.002, "slow": 100.0}
    rows = _kernels_gpu.interleaved(losses, e, weight, torch.zeros(2), floors, rounds=5)
    assert rows["peer"] == {"error": "unexpected keyword argument 'impl'"}
    assert rows["ours"]["over_roofline"] == pytest.approx(5.0)
    assert rows["ours"]["extra_bytes"] == 100 - 4 * (8 + 12)
    assert (rows["ours"]["repeats"], rows["slow"]["repeats"]) == (5, 1)


def test_every_loss_runs_and_is_measured():
    for name, step in kernels.losses(310, 20).items():
        row = kernels.measure_here(step, 24, 310, 8, 1)
        assert row["loss_value"] > 0, name
        assert row["gradient_bytes"] == 4 * 8 * (24 + 310)


def test_full_softmax_variants_agree():
    values = [
        kernels.measure_here(step, 40, 310, 8, 1)["loss_value"]
        for step in kernels.full_variants().values()
    ]
    assert max(values) - min(values) < 1e-5
