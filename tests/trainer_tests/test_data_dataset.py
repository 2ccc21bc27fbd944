import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from db.errors import DataError
from trainer.data.dataset import ARRAYS, check_dataset, load_dataset
from trainer.data.generate import GeneratedSource, GeneratorOptions, generate
from trainer.data.interactions import Interactions, InteractionsSource
from trainer.data.prepare import prepare


@pytest.fixture
def dataset(tmp_path):
    options = GeneratorOptions(num_users=200, num_items=100, interactions_per_user=12, seed=3)
    return prepare(GeneratedSource(options), tmp_path / "data/small")


def damage(dataset, name, **changes):
    meta = json.loads((dataset.path / name).read_text())
    (dataset.path / name).write_text(json.dumps({**meta, **changes}))


def test_arrays_are_consistent(dataset):
    assert dataset.name == "small"
    assert dataset.items.dtype == np.int32
    assert dataset.items.max() == dataset.num_items - 1
    assert len(dataset.items) == dataset.offsets[-1] == len(dataset.timestamps)
    assert dataset.num_train_users == len(dataset.train) == dataset.train.users.max() + 1
    lengths = dataset.train.lengths
    assert (lengths > 0).all()
    assert dataset.item_counts.sum() == lengths.sum()
    assert (dataset.item_users > 0).all()
    assert (dataset.item_users <= dataset.item_counts).all()
    for split in (dataset.validation, dataset.test):
        assert (split.lengths > 0).all()
        assert np.array_equal(dataset.items[split.ends], split.targets)
    for start, end in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        assert (np.diff(dataset.timestamps[start:end]) >= 0).all()
    assert not set(dataset.validation.users) & set(dataset.train.users)
    assert set(dataset.test.users) <= set(dataset.train.users)


def test_arrays_are_mapped_not_read(dataset):
    loaded = load_dataset(dataset.path)
    for array in (loaded.items, loaded.timestamps, loaded.train.users, loaded.test.targets):
        assert type(array) is np.ndarray
        base = array
        while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert not array.flags.writeable


def test_opening_needs_neither_polars_nor_pyarrow(dataset):
    code = (
        "import sys; from trainer.data.dataset import load_dataset;"
        f"load_dataset({str(dataset.path)!r}).item_ids;"
        "print(sorted({'polars', 'pyarrow', 'torch', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fingerprint_depends_on_content_only(dataset, tmp_path):
    options = GeneratorOptions(num_users=200, num_items=100, interactions_per_user=12, seed=3)
    same = prepare(GeneratedSource(options), tmp_path / "elsewhere", name="other")
    assert same.name == "other"
    assert same.fingerprint == dataset.fingerprint
    changed = GeneratedSource(dataclasses.replace(options, seed=4))
    assert prepare(changed, tmp_path / "changed").fingerprint != dataset.fingerprint
    later = generate(200, 100, 12, seed=3)
    later = Interactions(later.users, later.items, later.timestamps + 7)
    # When something happened is not what training sees, only the order.
    assert prepare(InteractionsSource(later), tmp_path / "later").fingerprint == dataset.fingerprint


def test_text_ids_survive(tmp_path):
    import polars as pl

    from trainer.data.sources import open_source

    events = generate(60, 40, 12, seed=1)
    frame = pl.DataFrame({"timestamp": events.timestamps}).with_columns(
        user_id=pl.Series([f"ü{user}" for user in events.users]),
        item_id=pl.Series([f"item {item}" for item in events.items]),
    )
    frame.write_parquet(tmp_path / "a.parquet")
    text = prepare(open_source("parquet", tmp_path / "a.parquet"), tmp_path / "text")
    numbers = prepare(InteractionsSource(events), tmp_path / "numbers")
    assert text.fingerprint == numbers.fingerprint
    assert text.item_ids.tolist() == [f"item {item}" for item in numbers.item_ids]
    assert text.user_ids[5] == f"ü{numbers.user_ids[5]}"


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=r"no prepared dataset at .*nowhere; make one with"):
        load_dataset(tmp_path / "nowhere")


def test_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"is not a prepared dataset \(dataset.json is missing\)"):
        load_dataset(tmp_path)


def test_other_format_version(dataset):
    damage(dataset, "dataset.json", format_version=99)
    with pytest.raises(DataError, match=r"was prepared in format 99, this srsweep reads 1"):
        load_dataset(dataset.path)


def test_damaged_meta(dataset):
    (dataset.path / "dataset.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"dataset\.json is damaged .*prepare the dataset again"):
        load_dataset(dataset.path)


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_or_cut_array(dataset, name):
    file = dataset.path / f"{name}.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(DataError, match=rf"{name}\.npy is damaged"):
        load_dataset(dataset.path)
    np.save(file, np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match=rf"{name}\.npy has shape \(3,\), dataset\.json says"):
        load_dataset(dataset.path)
    file.unlink()
    with pytest.raises(DataError, match=rf"{name}\.npy is missing"):
        load_dataset(dataset.path)


def test_changed_content_is_found(dataset):
    check_dataset(dataset)
    items = np.load(dataset.path / "items.npy")
    items[0] = (items[0] + 1) % dataset.num_items
    np.save(dataset.path / "items.npy", items)
    with pytest.raises(DataError, match=r"has changed since it was prepared: fingerprint"):
        check_dataset(load_dataset(dataset.path))
