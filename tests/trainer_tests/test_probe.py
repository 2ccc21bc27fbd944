import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ListRecorder, make_dataset

from db.spec import RunSpec
from trainer import probe as module
from trainer.loop import train
from trainer.probe import MemoryProbe, release_memory

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture(autouse=True)
def _nothing_left_to_free():
    """What other tests left is freed before, not while memory is read."""
    gc.collect()
    gc.disable()
    release_memory(CPU)
    yield
    gc.enable()


def test_growth_and_peak_are_those_of_tensors():
    probe = MemoryProbe(CPU)
    assert probe.source == "resident"
    assert probe.read().allocated < 2 * MB
    kept = torch.ones(16 * MB // 4)
    torch.ones(48 * MB // 4).sum()
    reading = probe.read()
    assert reading.reserved is None
    assert reading.allocated == pytest.approx(16 * MB, abs=2 * MB)
    assert reading.peak == pytest.approx(64 * MB, abs=2 * MB)
    probe.reset_peak()
    assert probe.read().peak == pytest.approx(16 * MB, abs=2 * MB)
    probe.exclude(kept.numel() * 4)
    assert probe.read().allocated < 2 * MB


def test_holes_that_a_process_has_in_its_heap_do_not_change_figures():
    """What an earlier test or a notebook has freed would be filled first, and stay resident."""
    libc = module._libc
    libc.mallopt(module._M_MMAP_THRESHOLD, 32 * MB)
    blocks = [libc.malloc(24 * MB) for _ in range(8)]
    try:
        for block in blocks[:-1]:
            libc.free(block)
        probe = MemoryProbe(CPU)
        kept = torch.ones(16 * MB // 4)
        torch.ones(48 * MB // 4).sum()
        reading = probe.read()
        probe.close()
    finally:
        libc.free(blocks[-1])
    assert reading.allocated == pytest.approx(16 * MB, abs=2 * MB)
    assert reading.peak == pytest.approx(64 * MB, abs=2 * MB)
    assert kept[0] == 1


def test_a_second_probe_does_not_see_what_came_before():
    first = MemoryProbe(CPU)
    held = [torch.ones(n * 1000) for n in range(1, 400)]
    assert first.read().allocated > 100 * MB
    del held
    release_memory(CPU)
    again = MemoryProbe(CPU)
    kept = torch.ones(20 * MB // 4)
    assert again.read().allocated == pytest.approx(20 * MB, abs=2 * MB)
    assert kept[0] == 1


def test_sampling_takes_over_where_the_mark_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(module, "_CLEAR_REFS", Path("/proc/self/no/such/file"))
    probe = MemoryProbe(CPU)
    assert any(thread.name == "srsweep-memory" for thread in threading.enumerate())
    peak = torch.ones(64 * MB // 4)
    time.sleep(0.2)
    del peak
    reading = probe.read()
    assert reading.allocated < 4 * MB
    assert reading.peak == pytest.approx(64 * MB, abs=4 * MB)
    probe.close()
    assert not any(thread.name == "srsweep-memory" for thread in threading.enumerate())


def test_total_is_that_of_the_machine():
    assert MemoryProbe(CPU).total_bytes() > 256 * MB


def peak(**fields):
    spec = RunSpec(
        dataset="ring",
        max_seq_len=32,
        embedding_dim=32,
        num_blocks=1,
        max_epochs=1,
        precision="fp32",
        **fields,
    )
    data = make_dataset(num_users=500, num_items=3000, max_length=40)
    return train(spec, data, ListRecorder()).peak_train_memory_bytes


def test_peaks_tell_losses_batches_and_negatives_apart_and_repeat():
    """What is compared in a trade-off plot: the order and rough size of the differences."""
    peak(loss="ce", batch_size=128)  # takes up what other tests have left in the heap
    full = peak(loss="ce", batch_size=128)
    # about 2,500 tokens of a batch by 3,000 items
    logits = 128 * 20 * 3000 * 4
    assert full == pytest.approx(peak(loss="ce", batch_size=128), rel=0.15)
    assert logits < full < 4 * logits
    assert peak(loss="ce", batch_size=32) < 0.6 * full
    many = peak(loss="ce_minus", num_negatives=128, batch_size=128)
    few = peak(loss="ce_minus", num_negatives=8, batch_size=128)
    assert few < 0.5 * many
    assert peak(loss="bce", num_negatives=1, batch_size=128) < 0.5 * full


@pytest.mark.gpu
def test_cuda_figures_are_those_of_its_allocator(cuda):
    device = torch.device(cuda)
    probe = MemoryProbe(device)
    before = probe.read()
    kept = torch.ones(16 * MB // 4, device=device)
    torch.ones(48 * MB // 4, device=device).sum()
    reading = probe.read()
    assert reading.allocated - before.allocated == 16 * MB
    assert reading.peak - before.allocated >= 64 * MB
    assert reading.reserved >= reading.allocated
    assert probe.source == "cuda_allocated"
    assert kept.is_cuda


def test_evaluation_memory_is_apart_from_training():
    spec = RunSpec(dataset="ring", max_epochs=1, embedding_dim=32, max_seq_len=32)
    data = make_dataset(num_users=500, num_items=3000, max_length=40)
    result = train(spec, data, ListRecorder())
    assert result.peak_eval_memory_bytes > MB
    assert result.peak_train_memory_bytes != result.peak_eval_memory_bytes
