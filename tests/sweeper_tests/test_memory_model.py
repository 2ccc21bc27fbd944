import dataclasses

import numpy as np
import pytest

from bench.memory import published_rows
from db.errors import SearchError
from db.spec import RunSpec
from sweeper.memory_model import MemoryModel, Shape, analytic_bytes, calibrate, memory_terms

SHAPE = Shape(10_000, 40.0)


def spec(**how):
    return RunSpec(**{"dataset": "x", "loss": "ce", "precision": "fp32", **how})


def test_parameters_are_those_of_the_model():
    from trainer.models.build import build_model

    for model in ("sasrec", "bert4rec"):
        made = spec(model=model, embedding_dim=64, max_seq_len=30)
        counted = sum(p.numel() for p in build_model(made, 500).parameters())
        modelled = memory_terms(made, Shape(500, 10.0)).parameters / 4
        assert modelled == pytest.approx(counted, rel=0.01)


def test_logits_of_the_full_softmax_and_gathers_of_the_sampled_one():
    full = Shape(10_000, 40.0, (20.0,) * 10)
    one = memory_terms(spec(batch_size=8, max_seq_len=20), full)
    assert one.loss == 8 * 20 * 10_000 * 4
    sampled = spec(loss="ce_minus", num_negatives=7, batch_size=8, max_seq_len=20)
    assert memory_terms(sampled, full).ids == 8 * 20 * 7 * 8
    kernel = dataclasses.replace(sampled, loss="cce_minus")
    assert memory_terms(kernel, full).ids == 0
    assert memory_terms(kernel, full).loss < memory_terms(sampled, full).loss


def test_a_batch_in_pieces_holds_what_a_piece_holds():
    whole, piece = spec(batch_size=64), spec(batch_size=8)
    pieces = dataclasses.replace(whole, micro_batch_size=8)
    assert memory_terms(pieces, SHAPE) == memory_terms(piece, SHAPE)
    assert memory_terms(pieces, SHAPE).loss < memory_terms(whole, SHAPE).loss


@pytest.mark.parametrize("name", ["batch_size", "max_seq_len", "num_negatives", "embedding_dim"])
@pytest.mark.parametrize("loss", ["ce_minus", "cce_minus"])
def test_more_never_takes_less(name, loss):
    base = spec(loss=loss, num_negatives=64)
    larger = dataclasses.replace(base, **{name: 2 * getattr(base, name)})
    assert analytic_bytes(larger, SHAPE) >= analytic_bytes(base, SHAPE)


def test_lengths_by_law_and_by_quantiles():
    draws = np.random.default_rng(0).exponential(40.0, 200_000)
    assert SHAPE.tokens_per_user(30) == pytest.approx(np.minimum(draws, 30).mean(), rel=0.01)
    assert SHAPE.squared_tokens_per_user(30) == pytest.approx(
        (np.minimum(draws, 30) ** 2).mean(), rel=0.01
    )
    quantiles = {str(q): float(np.quantile(draws, q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)}
    found = Shape.from_quantiles(10_000, quantiles)
    assert found.tokens_per_user(30) == pytest.approx(SHAPE.tokens_per_user(30), rel=0.1)


def runs():
    return [
        spec(loss="ce_minus", batch_size=b, max_seq_len=s, num_negatives=n)
        for b in (16, 64, 256) for s in (16, 64) for n in (8, 128)
    ]  # fmt: skip


def test_calibration_finds_the_factors_back():
    truth = MemoryModel({**MemoryModel().factors, "loss": 1.5, "activations": 0.6}, 3e7)
    measured = [truth.predict(s, SHAPE).bytes for s in runs()]
    model = calibrate(runs(), [SHAPE] * len(measured), measured)
    assert np.abs(model.relative_errors).max() < 0.03
    assert model.factors["loss"] == pytest.approx(1.5, abs=0.05)
    for s, value in zip(runs(), measured, strict=True):
        predicted = model.predict(s, SHAPE)
        assert predicted.low <= predicted.bytes <= predicted.high
        assert predicted.bytes == pytest.approx(value, rel=0.03)


def test_without_calibration_the_interval_says_so():
    found = MemoryModel().predict(runs()[0], SHAPE)
    assert (found.bytes / found.low, found.high / found.bytes) == (2, 2)


def test_calibration_refuses_too_few_runs_and_impossible_peaks():
    with pytest.raises(SearchError, match="2 measured runs cannot calibrate"):
        calibrate(runs()[:2], [SHAPE] * 2, [1e9, 2e9])
    with pytest.raises(SearchError, match="not above 0"):
        calibrate(runs()[:3], [SHAPE] * 3, [1e9, 0.0, 2e9])


def test_the_published_runs_are_predicted(shared):
    rows = published_rows(shared / "paper" / "experiments.csv")
    inside = [r for r in rows if r["calibrated_on"].startswith("same")]
    assert len(inside) == 6
    assert np.median([r["median_error"] for r in inside]) < 0.05
    assert np.median([r["p90_error"] for r in inside]) < 0.12
