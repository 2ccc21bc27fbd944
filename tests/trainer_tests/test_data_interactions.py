import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import interactions
from trainer.data.interactions import IdEncoder, InteractionLog


def codes_by_dict(values):
    known = {}
    return [known.setdefault(value, len(known)) for value in values]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def encode(chunks, type_):
    encoder = IdEncoder()
    codes = [encoder.encode(pa.array(chunk, type=type_)).tolist() for chunk in chunks]
    table = encoder.table()
    return flat(codes), [] if table is None else table.to_pylist(), encoder


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=20), max_size=6))
def test_small_numbers(chunks):
    values = flat(chunks)
    codes, table, encoder = encode(chunks, pa.int64())
    assert codes == codes_by_dict(values)
    assert table == list(dict.fromkeys(values))
    assert len(encoder) == len(table)


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(-3, 9), st.integers(2**40, 2**40 + 3))), max_size=6))
def test_numbers_of_any_size_go_from_table_to_hashing(chunks):
    values = flat(chunks)
    codes, table, _ = encode(chunks, pa.int64())
    assert codes == codes_by_dict(values)
    assert table == list(dict.fromkeys(values))


@settings(deadline=None)
@given(st.lists(st.lists(st.text("ab ü", max_size=3)), max_size=6))
def test_text(chunks):
    values = flat(chunks)
    codes, table, _ = encode(chunks, pa.string())
    assert codes == codes_by_dict(values)
    assert table == list(dict.fromkeys(values))


def test_lookup_table_is_bounded(monkeypatch):
    monkeypatch.setattr(interactions, "LOOKUP_LIMIT", 100)
    chunks = [[99, 5], [5, 60, 99], [100, 60, 7], [7, 3]]
    codes, table, _ = encode(chunks, pa.int64())
    assert codes == codes_by_dict(flat(chunks))
    assert table == [99, 5, 60, 100, 7, 3]


def column(size, first=0):
    values = np.arange(first, first + size)
    return values.astype(np.int32), values.astype(np.int32) * 2, values * 3


@pytest.mark.parametrize("memory_rows", [1, 7, 20, 1000])
@pytest.mark.parametrize("in_files", [False, True])
def test_log_gives_back_the_rows_in_order(tmp_path, memory_rows, in_files):
    log = InteractionLog(tmp_path / "log", memory_rows, in_files=in_files)
    for first in range(0, 30, 5):
        log.append(*column(5, first))
    assert len(log) == 30
    assert log.spilled == (in_files or memory_rows < 30)
    for _ in range(2):
        blocks = list(log.blocks())
        starts = [start for start, _ in blocks]
        assert starts == np.cumsum([0, *(len(block[0]) for _, block in blocks[:-1])]).tolist()
        for number, expected in enumerate(column(30)):
            assert np.array_equal(np.concatenate([block[number] for _, block in blocks]), expected)
    if log.spilled:
        assert max(len(block[0]) for _, block in blocks) <= memory_rows
    log.clear()
    assert not len(log)
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_spilled_log_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(interactions, "BLOCK_ROWS", 4)
    log = InteractionLog(tmp_path / "log", 8, in_files=True)
    log.append(*column(30))
    assert [start for start, _ in log.blocks()] == list(range(0, 30, 4))
