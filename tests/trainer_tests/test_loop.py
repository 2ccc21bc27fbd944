import dataclasses
import math

import pytest
import torch
from conftest import ListRecorder, make_dataset

from db.errors import DataError, LostLeaseError, SpecError
from db.measures import KS, METRICS
from db.spec import RunSpec, RunStatus, run_key
from trainer import assembly
from trainer.checkpoint import CheckpointFile
from trainer.device import check_device, memory_shortage
from trainer.loop import TrainingInterrupted, TrainOptions, train

SPEC = RunSpec(
    dataset="ring",
    batch_size=16,
    max_seq_len=8,
    embedding_dim=16,
    num_blocks=1,
    num_heads=2,
    max_epochs=4,
    learning_rate=0.01,
    precision="fp32",
)


def run(dataset, recorder=None, options=None, **fields):
    recorder = recorder or ListRecorder()
    return train(dataclasses.replace(SPEC, **fields), dataset, recorder, options=options), recorder


def losses(recorder):
    return [record.loss for record in recorder.steps]


def test_training_learns_the_ring(dataset):
    result, recorder = run(dataset, max_epochs=30, patience=30)
    assert result.status is RunStatus.DONE
    assert result.final_loss < 0.75 * losses(recorder)[0]
    # three items may follow; ten guesses of 40 hit one in four
    assert result.test["hit_rate_at_10"] > 0.6


def test_every_step_and_evaluation_is_reported(dataset):
    result, recorder = run(dataset)
    assert [r.step for r in recorder.steps] == list(range(12))
    assert [r.epoch for r in recorder.steps] == [n // 3 for n in range(12)]
    lengths = dataset.train.ends - dataset.train.starts
    tokens = sum(min(n - 1, 8) for n in lengths)
    assert sum(r.tokens for r in recorder.steps[:3]) == tokens
    assert all(r.step_seconds > 0 and r.peak_bytes >= 0 for r in recorder.steps)
    assert all(math.isfinite(r.gradient_norm) for r in recorder.steps)
    found = {(r.step, r.split) for r in recorder.evaluations}
    assert found == {(3, "validation"), (6, "validation"), (9, "validation")} | {
        (12, "validation"),
        (result.best_step, "test"),
    }
    per_evaluation = {(r.metric, r.k) for r in recorder.evaluations if r.split == "test"}
    assert per_evaluation == {(metric, k) for metric in METRICS for k in KS}
    assert all(r.standard_error is not None for r in recorder.evaluations)
    assert {r.num_users for r in recorder.evaluations} == {6}
    assert result.num_steps == 12
    assert result.num_epochs == 4
    assert result.stop_reason == "max_epochs"
    assert result.tokens_per_second > 0
    assert result.train_seconds == pytest.approx(sum(r.step_seconds for r in recorder.steps))


def test_test_uses_the_weights_of_the_best_validation(dataset):
    """A run that goes on past its best tests what a run that ends there tests."""
    whole, recorder = run(dataset, max_epochs=12, learning_rate=0.05, patience=12)
    values = {
        r.step: r.value
        for r in recorder.evaluations
        if (r.split, r.metric, r.k) == ("validation", "ndcg", 10)
    }
    best = max(values, key=lambda step: (values[step], -step))
    assert whole.best_step == best
    assert whole.validation["ndcg_at_10"] == values[best]
    assert best < 36, "the best is not the last, or the test shows nothing"
    shorter, _ = run(dataset, max_epochs=best // 3, learning_rate=0.05, patience=12)
    assert shorter.test == whole.test


def test_patience_counts_validations_without_strict_improvement(dataset, monkeypatch):
    values = iter([0.1, 0.3, 0.3, 0.2, 0.9])
    monkeypatch.setattr("trainer.outcome.selection_value", lambda records: next(values))
    result, _ = run(dataset, max_epochs=9, patience=2)
    assert result.stop_reason == "patience"
    assert result.num_epochs == 4
    assert result.best_step == 6


def test_evaluation_every_steps_and_at_the_end(dataset):
    _, recorder = run(dataset, evaluate_every_steps=5)
    steps = sorted({r.step for r in recorder.evaluations if r.split == "validation"})
    assert steps == [5, 10, 12]


def test_validation_sample_is_the_same_for_all_seeds(dataset):
    big = make_dataset(num_users=300)
    counts = []
    for seed in (1, 2):
        _, recorder = run(big, max_epochs=1, max_validation_users=7, seed=seed)
        counts.append({r.num_users for r in recorder.evaluations if r.split == "validation"})
    assert counts == [{7}, {7}]
    samples = [
        assembly.evaluator(
            dataclasses.replace(SPEC, max_validation_users=7, seed=seed),
            torch.from_numpy(big.items),
            big,
            "validation",
        )._users.tolist()
        for seed in (1, 2)
    ]
    assert samples[0] == samples[1]


def test_thinned_step_rows(dataset):
    _, recorder = run(dataset, options=TrainOptions(step_rows_every=5))
    assert [r.step for r in recorder.steps] == [0, 5, 10]


def test_divergence_keeps_the_last_finite_step(dataset):
    result, recorder = run(dataset, learning_rate=1e30, max_epochs=3)
    assert result.status is RunStatus.DIVERGED
    assert result.stop_reason == "diverged"
    assert all(math.isfinite(loss) for loss in losses(recorder))
    assert result.num_steps == len(recorder.steps) >= 1
    assert result.test == {}
    assert f"not finite after {result.num_steps} steps" in result.error


def test_running_out_of_memory_is_a_result(dataset):
    width = 2**40
    result, recorder = run(dataset, embedding_dim=width)
    assert result.status is RunStatus.OUT_OF_MEMORY
    assert result.requested_bytes == 40 * width * 4
    assert 0 < result.total_bytes < result.requested_bytes
    assert 0 <= result.allocated_bytes < result.total_bytes
    assert recorder.steps == []


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            int(2.5 * 2**30),
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 768 bytes. Error code 12 (Cannot allocate memory)"
            ),
            768,
        ),
        (MemoryError("Unable to allocate 1.50 MiB for an array with shape (1,)"), 1572864),
        (MemoryError(), None),
    ],
)
def test_bytes_asked_for_are_read_from_the_message(error, requested):
    assert memory_shortage(error).requested == requested


def test_other_errors_are_not_taken_for_lack_of_memory(dataset, monkeypatch):
    assert memory_shortage(RuntimeError("shape mismatch")) is None

    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(assembly, "make_loss", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(dataset)


def test_lost_lease_passes_through(dataset):
    class Lost(ListRecorder):
        def step(self, record):
            if record.step == 4:
                raise LostLeaseError("attempt 1 belongs to another worker")
            super().step(record)

    recorder = Lost()
    with pytest.raises(LostLeaseError, match="attempt 1"):
        run(dataset, recorder)
    assert len(recorder.steps) == 4


def test_devices_that_cannot_be_used_are_refused(monkeypatch):
    with pytest.raises(SpecError, match="device='mps' is not supported"):
        check_device(SPEC, torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match="device='cuda:7' is not there: torch sees 2 CUDA"):
        check_device(SPEC, torch.device("cuda:7"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    low = dataclasses.replace(SPEC, precision="bf16")
    with pytest.raises(SpecError, match="precision='bf16' is not supported by Tesla T4"):
        check_device(low, torch.device("cuda:0"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_alike(dataset, precision):
    reference, _ = run(dataset, max_epochs=6)
    result, recorder = run(dataset, max_epochs=6, precision=precision)
    assert result.status is RunStatus.DONE
    assert result.final_loss == pytest.approx(reference.final_loss, rel=0.03)
    assert all(math.isfinite(r.gradient_norm or 0.0) for r in recorder.steps)


def test_histograms_of_gradients_are_recorded(dataset):
    _, recorder = run(
        dataset, loss="cce", filter_eps=0.01, options=TrainOptions(histograms_every=6)
    )
    names = [(r.step, r.name) for r in recorder.histograms]
    assert names == [(s, n) for s in (0, 6) for n in ("logit_gradient", "item_gradient")]
    assert all(0.01 in r.edges and 2.0**-24 in r.edges for r in recorder.histograms)
    assert sum(recorder.histograms[1].counts) == 40 * 16


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss": "cce_minus", "num_negatives": 4, "evaluate_every_steps": 2},
        {"loss": "cce_minus", "num_negatives": 4, "optimizer": "rowwise_adam"},
        {"precision": "fp16"},
        {"model": "bert4rec"},
    ],
    ids=str,
)
def test_resumed_runs_repeat_the_uninterrupted_one_bit_for_bit(dataset, tmp_path, fields):
    whole, expected = run(dataset, **fields)
    resumed = ListRecorder()
    # stops after 1, 2, 3 ... further steps until the run is through
    for number in range(1, 9):
        options = TrainOptions(checkpoint_dir=tmp_path, should_stop=StopAfter(number))
        try:
            result, _ = run(dataset, resumed, options, **fields)
            break
        except TrainingInterrupted:
            continue
    assert number > 3
    assert losses(resumed) == losses(expected)
    assert [r.gradient_norm for r in resumed.steps] == [r.gradient_norm for r in expected.steps]
    assert result.test == whole.test
    assert result.num_steps == whole.num_steps
    assert result.best_step == whole.best_step
    assert list(tmp_path.iterdir()) == [], "a finished run leaves no checkpoint"


def test_a_crash_resumes_from_the_last_checkpoint(dataset, tmp_path):
    class Crash(ListRecorder):
        def step(self, record):
            if record.step == 7:
                raise OSError("power is out")
            super().step(record)

    options = TrainOptions(checkpoint_dir=tmp_path, checkpoint_minutes=0.0)
    with pytest.raises(OSError, match="power is out"):
        run(dataset, Crash(), options)
    file = CheckpointFile(tmp_path, run_key(SPEC, dataset.fingerprint))
    assert file.num_steps() == 7
    result, rest = run(dataset, options=options)
    whole, expected = run(dataset)
    assert losses(rest) == losses(expected)[7:]
    assert result.test == whole.test


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(dataset, tmp_path):
    options = TrainOptions(checkpoint_dir=tmp_path, should_stop=StopAfter(2))
    with pytest.raises(TrainingInterrupted, match="stopped after 2 steps"):
        run(dataset, options=options)
    (path,) = tmp_path.iterdir()
    other = dataclasses.replace(SPEC, seed=1)
    taken = CheckpointFile(tmp_path, run_key(other, dataset.fingerprint))
    path.rename(taken.path)
    with pytest.raises(DataError, match=rf"belongs to run {path.stem[:12]}"):
        run(dataset, options=TrainOptions(checkpoint_dir=tmp_path), seed=1)
    taken.path.write_bytes(taken.path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot be read .*; delete it to start the run anew"):
        run(dataset, options=TrainOptions(checkpoint_dir=tmp_path), seed=1)
