import dataclasses
import json

import numpy as np
import pytest
import torch

from db.errors import DataError, SpecError
from db.spec import RunSpec
from trainer.export import (
    export_model,
    keep_model,
    load_exported_model,
    load_kept_model,
    start_from,
)
from trainer.loop import TrainOptions, train
from trainer.models.build import build_model

TEXT = np.dtypes.StringDType()


def make_spec(**fields):
    return RunSpec(
        **{
            "dataset": "ring",
            "batch_size": 16,
            "max_seq_len": 12,
            "embedding_dim": 16,
            "max_epochs": 1,
            "evaluate_every_steps": 2,
            **fields,
        }
    )


@pytest.fixture
def catalog(dataset):
    dataset.item_ids = np.arange(1000, 1000 + dataset.num_items)
    return dataset


def keep(path, spec, dataset, recorder, **more):
    def on_trained(model, result):
        keep_model(path, model, spec, dataset, result)

    return train(spec, dataset, recorder, options=TrainOptions(on_trained=on_trained), **more)


@pytest.fixture
def exported(catalog, recorder, tmp_path):
    """Exported model, and the spec that it was trained with."""
    spec = make_spec()
    keep(tmp_path / "a.model", spec, catalog, recorder)
    export_model(load_kept_model(tmp_path / "a.model"), catalog, tmp_path / "served")
    return load_exported_model(tmp_path / "served"), spec


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
def test_kept_and_exported_weights_are_those_that_were_tested(model, catalog, recorder, tmp_path):
    spec = make_spec(model=model)
    found = {}

    def on_trained(trained, result):
        found.update({n: v.clone() for n, v in trained.state_dict().items()})
        keep_model(tmp_path / "a.model", trained, spec, catalog, result)

    result = train(spec, catalog, recorder, options=TrainOptions(on_trained=on_trained))
    kept = load_kept_model(tmp_path / "a.model")
    assert kept.spec == spec
    assert kept.measured["ndcg_at_10"] == result.test["ndcg_at_10"]
    assert kept.measured["validation_ndcg_at_10"] == result.validation["ndcg_at_10"]
    export_model(kept, catalog, tmp_path / "served")
    served = load_exported_model(tmp_path / "served")
    assert served.item_ids.tolist() == list(range(1000, 1040))
    assert served.digest() == kept.digest()
    for name, value in served.restore().state_dict().items():
        assert torch.equal(value, found[name])
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "a.model",
        "items.json",
        "model.json",
        "model.safetensors",
    ]


def test_text_ids_survive(catalog, recorder, tmp_path):
    catalog.item_ids = np.array([f"Ä{n}" for n in range(catalog.num_items)], dtype=TEXT)
    keep(tmp_path / "a.model", make_spec(), catalog, recorder)
    export_model(load_kept_model(tmp_path / "a.model"), catalog, tmp_path / "served")
    assert load_exported_model(tmp_path / "served").item_ids.tolist() == catalog.item_ids.tolist()


def test_export_refuses_another_dataset_and_a_full_folder(catalog, recorder, tmp_path):
    keep(tmp_path / "a.model", make_spec(), catalog, recorder)
    kept = load_kept_model(tmp_path / "a.model")
    with pytest.raises(DataError, match=r"a\.model|not empty"):
        export_model(kept, catalog, tmp_path)
    catalog.fingerprint = "f" * 64
    with pytest.raises(DataError, match=f"fingerprint 000000000000, this dataset has {'f' * 12}"):
        export_model(kept, catalog, tmp_path / "served")


def test_start_from_takes_over_items_by_id(exported):
    saved, spec = exported
    ids = np.array([1005, 7, 1039, 1000])  # item 7 is new, most others are gone
    model = build_model(spec, 4)
    model.reset_parameters(torch.Generator().manual_seed(9))
    drawn = model.item_embedding.detach().clone()
    assert start_from(model, spec, saved, ids) == 1
    assert torch.equal(model.item_embedding[0], saved.weights["item_embedding"][5])
    assert torch.equal(model.item_embedding[1], drawn[1])
    assert torch.equal(model.item_embedding[2], saved.weights["item_embedding"][39])
    assert torch.equal(model.blocks[1].in_weight, saved.weights["blocks.1.in_weight"])


def test_start_from_aligns_windows_at_their_ends(exported):
    saved, spec = exported
    old = saved.weights["position_embedding"]
    for length in (5, 20):
        longer = dataclasses.replace(spec, max_seq_len=length)
        model = build_model(longer, 40)
        model.reset_parameters(torch.Generator().manual_seed(9))
        start_from(model, longer, saved, saved.item_ids)
        shared = min(length, 12)
        assert torch.equal(model.position_embedding[-shared:], old[-shared:])


def test_a_run_that_starts_from_a_model_begins_where_that_ended(exported, catalog, recorder):
    saved, spec = exported
    long = dataclasses.replace(spec, max_epochs=30, evaluate_every_steps=1000, learning_rate=0.01)
    recorder.steps.clear()
    trained = {}

    def on_trained(model, result):
        trained.update({n: v.clone() for n, v in model.state_dict().items()})

    train(long, catalog, recorder, options=TrainOptions(on_trained=on_trained))
    cold = [row.loss for row in recorder.steps]
    recorder.steps.clear()
    better = dataclasses.replace(saved, weights=trained)
    train(
        long,
        catalog,
        recorder,
        initialise=lambda model: start_from(model, long, better, catalog.item_ids),
    )
    warm = [row.loss for row in recorder.steps]
    assert warm[0] < 0.8 * cold[0]


def test_start_from_refuses_what_does_not_fit(exported):
    saved, spec = exported
    wide = dataclasses.replace(spec, embedding_dim=32)
    model = build_model(spec, 40)
    with pytest.raises(SpecError, match="embedding_dim=32 cannot start from a model with embed"):
        start_from(model, wide, saved, saved.item_ids)
    with pytest.raises(SpecError, match="of the model are numbers, those of the dataset texts"):
        start_from(model, spec, saved, np.array(["a", "b"], dtype=TEXT))
    with pytest.raises(SpecError, match="none of the dataset's 2 items is among the 40"):
        start_from(model, spec, saved, np.array([1, 2]))
    with pytest.raises(SpecError, match="no item ids; export it"):
        start_from(model, spec, dataclasses.replace(saved, item_ids=None), np.array([1]))


def test_files_that_are_no_models_are_named(exported, tmp_path):
    served = tmp_path / "served"
    with pytest.raises(DataError, match=r"model\.safetensors was not written by srsweep"):
        load_kept_model(served / "model.safetensors")
    with pytest.raises(DataError, match=r"missing\.model cannot be read as a model"):
        load_kept_model(tmp_path / "missing.model")
    kept = (tmp_path / "a.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(DataError, match=r"cut\.model cannot be read as a model"):
        load_kept_model(tmp_path / "cut.model")
    about = json.loads((served / "model.json").read_text())

    def describe(**changes):
        (served / "model.json").write_text(json.dumps(about | changes))

    describe(format=99)
    with pytest.raises(DataError, match="format 99, this srsweep reads 1"):
        load_exported_model(served)
    describe(num_items=41)
    with pytest.raises(DataError, match="holds other weights than its description: item_embed"):
        load_exported_model(served)
    describe()
    (served / "items.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="lists 2 items, the model has 40"):
        load_exported_model(served)
    (served / "items.json").unlink()
    with pytest.raises(DataError, match=r"not an exported model .*items\.json"):
        load_exported_model(served)
