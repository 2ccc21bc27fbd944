"""RunSpec: keys that never change, refusals that say what to do, and its way through SQL."""

import dataclasses
import typing

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db import schema, spec
from db.connect import write_engine
from db.errors import SpecError
from db.spec import RunSpec, RunStatus, field_docs, field_types, run_key
from db.store import DatasetRecord, PlannedRun, RunStore

FINGERPRINT = "0123456789abcdef" * 4
PINNED = [
    ({}, 0, "26e8dfbad71d64a264a07aad10db970b8aeccc5f23a7bfb68294f334309c9230"),
    (
        {"num_negatives": 512, "loss": "cce_minus", "negatives_share": "batch"},
        0,
        "2b9e47527e3c32bad06932a7d1cde6673ec97974b46a14220f3c86179748627b",
    ),
    (
        {"learning_rate": 1, "model": "bert4rec", "seed": 7},
        0,
        "eb095a7659a63aac297a087bc88a3ea7006bc346946d5398e169006ae9611b62",
    ),
    (
        {"loss": "sce", "sce_mix": False, "precision": "bf16"},
        3,
        "7711eb22116f94089557643607d96a227779e07150942abde6a5785f1ec20776",
    ),
]


@pytest.mark.parametrize(("values", "replicate", "key"), PINNED)
def test_keys_never_change(values, replicate, key):
    made = RunSpec(**{"dataset": "beauty", "precision": "fp32", **values})
    assert run_key(made, FINGERPRINT, replicate) == key


def test_the_name_of_the_dataset_is_not_in_the_key_but_its_content_is():
    made = RunSpec(dataset="a", precision="fp32")
    other = dataclasses.replace(made, dataset="b")
    assert run_key(made, FINGERPRINT) == run_key(other, FINGERPRINT)
    assert run_key(made, FINGERPRINT) != run_key(made, FINGERPRINT[::-1])
    assert run_key(made, FINGERPRINT) != run_key(made, FINGERPRINT, replicate=1)


def test_every_field_but_the_name_of_the_dataset_is_in_the_key():
    changes = {
        "dataset": "b", "model": "bert4rec", "batch_size": 64, "max_seq_len": 20,
        "micro_batch_size": 8,
        "embedding_dim": 64, "num_blocks": 1, "num_heads": 1, "dropout_rate": 0.2,
        "learning_rate": 0.01, "precision": "bf16", "max_epochs": 1, "patience": 1,
        "evaluate_every_steps": 5, "max_validation_users": 5, "mask_seen": False,
        "attend_padding": True, "predict_first_item": True, "count_padding": True,
        "metric_frame": "test_history", "seed": 1, "loss": "cce", "filter_eps": 0.1,
        "filter_mode": "unbiased", "num_negatives": 2, "negative_sampler": "popularity",
        "negatives_share": 4, "logq_correction": False, "hits": "keep", "optimizer": "rowwise_adam",
        "paper_negatives": True, "gbce_t": 0.5, "sce_alpha": 1.0, "sce_beta": 2.0,
        "sce_bucket_size_x": 4, "sce_bucket_size_y": 4, "sce_mix": False, "mask_probability": 0.5,
    }  # fmt: skip
    assert set(changes) == set(field_types())
    for name, value in changes.items():
        plain = RunSpec(dataset="a", precision="fp32")
        # combinations are not the question here, so the checks of the class are gone around
        changed = dataclasses.replace(plain)
        object.__setattr__(changed, name, value)
        same = run_key(plain, FINGERPRINT) == run_key(changed, FINGERPRINT)
        assert same == (name == "dataset"), name


def test_a_new_field_with_a_default_keeps_the_keys(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(RunSpec):
        label_smoothing: float = 0.0

    old = RunSpec(dataset="a", precision="fp32", seed=3)
    new = Later(dataset="a", precision="fp32", seed=3)
    smoothed = Later(dataset="a", precision="fp32", seed=3, label_smoothing=0.1)
    key = run_key(old, FINGERPRINT)
    monkeypatch.setattr(spec, "field_types", lambda: typing.get_type_hints(Later))
    assert run_key(new, FINGERPRINT) == key
    assert run_key(smoothed, FINGERPRINT) != key


def test_the_key_needs_a_resolved_precision():
    with pytest.raises(SpecError, match="precision is null"):
        run_key(RunSpec(dataset="a"), FINGERPRINT)
    assert RunSpec(dataset="a").resolved("cuda").precision == "bf16"
    assert RunSpec(dataset="a").resolved("cpu").precision == "fp32"
    assert RunSpec(dataset="a", precision="fp16").resolved("cpu").precision == "fp16"


def test_integers_and_floats_of_equal_value_make_one_key():
    whole = RunSpec(dataset="a", precision="fp32", learning_rate=1)
    real = RunSpec(dataset="a", precision="fp32", learning_rate=1.0)
    assert run_key(whole, FINGERPRINT) == run_key(real, FINGERPRINT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 3}, "unknown field 'batchsize'; did you mean 'batch_size'?"),
        ({"zzz": 3}, "unknown field 'zzz'; allowed are dataset, model, loss"),
        ({"loss": "cce-"}, "loss='cce-' is unknown; did you mean 'cce'?"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be an integer"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and below 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number above 0"),
        ({"num_heads": 3}, "embedding_dim=256 is not a multiple of num_heads=3"),
        ({"loss": "ce_minus"}, "loss='ce_minus' samples its negatives"),
        ({"num_negatives": 4}, "num_negatives=4 has no meaning with loss='ce'"),
        ({"loss": "bce", "num_negatives": 4}, "it takes one; use 'bce_plus'"),
        ({"gbce_t": 0.5}, "gbce_t=0.5 has no effect with loss='ce'"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be 1 or more"),
        ({"micro_batch_size": 128}, "micro_batch_size=128 leaves batch_size=128 whole"),
        (
            {"micro_batch_size": 8, "loss": "sce"},
            "micro_batch_size=8 would change what loss='sce' takes from a batch",
        ),
        (
            {"micro_batch_size": 8, "loss": "cce_minus", "num_negatives": 4,
             "negative_sampler": "in_batch"},
            "negative_sampler='in_batch' takes from a batch",
        ),
        (
            {"micro_batch_size": 8, "loss": "bce_plus", "num_negatives": 4,
             "negatives_share": "batch"},
            "negatives_share='batch' takes from a batch",
        ),
    ],
)  # fmt: skip
def test_refusals_name_value_and_remedy(values, message):
    with pytest.raises(SpecError) as caught:
        RunSpec.from_mapping({"dataset": "a", **values})
    assert message in str(caught.value)


def test_a_mapping_without_a_dataset_is_refused():
    with pytest.raises(SpecError, match="dataset is missing"):
        RunSpec.from_mapping({})


def test_every_field_is_documented():
    assert set(field_docs()) == set(field_types())
    assert all(text.endswith(".") for text in field_docs().values())


def test_the_command_repeats_the_run():
    made = RunSpec(dataset="a", loss="cce_minus", num_negatives=8, mask_seen=False)
    assert made.command() == (
        "srsweep train --dataset a --loss cce_minus --num-negatives 8 --no-mask-seen"
    )


def test_final_statuses():
    assert [s for s in RunStatus if not s.is_final] == [RunStatus.PENDING, RunStatus.RUNNING]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def module_url(request, databases):
    return databases.sqlite() if request.param == "sqlite" else databases.postgres()


@pytest.fixture(scope="module")
def engine(module_url):
    made = write_engine(module_url)
    yield made
    made.dispose()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_spec_survives_the_way_through_sql(engine, module_url, specs, data):
    made = data.draw(specs)
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(
            schema.datasets.insert().values(
                id=1, name="x", fingerprint="x", details="{}", created_at=schema.utc_in()
            )
        )
        connection.execute(
            schema.runs.insert().values(
                **schema.spec_values(made),
                run_key="k",
                dataset_id=1,
                replicate=0,
                source="own",
                status="pending",
                created_at=schema.utc_in(),
                updated_at=schema.utc_in(),
            )
        )
        row = connection.execute(sa.select(schema.runs)).one()
        transaction.rollback()
    read = schema.spec_from_values(dict(row._mapping))
    assert read == made
    assert [type(v) for v in read.to_dict().values()] == [type(v) for v in made.to_dict().values()]
    assert run_key(read, FINGERPRINT) == run_key(made, FINGERPRINT)


def test_the_store_gives_back_the_spec(store_url):
    store = RunStore.open(store_url)
    store.put_dataset(DatasetRecord(name="a", fingerprint=FINGERPRINT))
    made = RunSpec(
        dataset="a", precision="bf16", loss="cce_minus", num_negatives=8, negatives_share="batch"
    )
    planned = PlannedRun(spec=made, fingerprint=FINGERPRINT)
    store.put_sweep("s", "", [planned])
    assert store.run(planned.key).spec == made
