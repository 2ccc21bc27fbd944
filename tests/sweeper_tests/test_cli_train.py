import dataclasses
import json
import shlex

import numpy as np
import pytest

from db.errors import DataError, SpecError
from db.spec import RunSpec, field_docs
from sweeper.cli import main as cli
from sweeper.cli import train as module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from trainer.data.generate import GeneratedSource, GeneratorOptions
    from trainer.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    options = GeneratorOptions(num_users=150, num_items=80, interactions_per_user=12.0, seed=3)
    prepare(GeneratedSource(options), folder / "tiny")
    return folder


def shown(capsys, *arguments):
    try:
        code = cli.main(list(arguments))
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SMALL = shlex.split("--embedding-dim 8 --num-blocks 1 --max-seq-len 8 --max-epochs 2 --device cpu")


def parsed(command):
    """Fields that a command line sets, as typer hands them over."""
    words = shlex.split(command)[2:]
    fields = {}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name.removeprefix("no_") in RunSpec.__dataclass_fields__ and (
            not words or words[0].startswith("--")
        ):
            fields[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            fields[name] = words.pop(0)
    return fields


@pytest.mark.parametrize(
    "spec",
    [
        RunSpec(dataset="d"),
        RunSpec(dataset="d", loss="cce_minus", num_negatives=7, negatives_share="batch"),
        RunSpec(dataset="d", loss="cce_minus", num_negatives=7, negatives_share=16),
        RunSpec(dataset="d", mask_seen=False, attend_padding=True, learning_rate=3e-4),
        RunSpec(dataset="d", loss="cce", filter_eps=1e-6, precision="bf16", seed=5),
    ],
    ids=lambda spec: spec.command(),
)
def test_the_line_that_a_spec_prints_makes_the_spec(spec):
    fields = parsed(spec.command())
    assert module.spec_from_options(fields.pop("dataset"), fields) == spec


def test_every_field_is_an_option_with_its_doc(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, doc in field_docs().items():
        assert "--" + name.replace("_", "-") in text
        if name != "dataset":
            assert doc.replace("`", "").split(";")[0][:30] in text


def test_paper_profile_is_overridden_by_what_is_typed():
    spec = module.spec_from_options("d", {"loss": "cce", "attend_padding": False}, paper=True)
    assert spec.count_padding
    assert spec.predict_first_item
    assert not spec.attend_padding
    assert spec.metric_frame == "test_history"
    assert not module.spec_from_options("d", {"loss": "cce"}).count_padding


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": "many"}, "batch_size='many' must be an integer"),
        ({"learning_rate": "1e"}, "learning_rate='1e' must be a number"),
        ({"loss": "ce_minu"}, "did you mean 'ce_minus'"),
        ({"max_seq_len": "0"}, "max_seq_len=0 must be 1 or more"),
    ],
)
def test_bad_values_are_told(fields, told):
    with pytest.raises(SpecError, match=told):
        module.spec_from_options("d", fields)


def test_unknown_dataset_lists_those_there(data_dir):
    with pytest.raises(DataError, match=r"dataset 'tini' is neither .* \(there: tiny\)"):
        module.find_dataset("tini", data_dir)
    assert module.find_dataset(str(data_dir / "tiny"), data_dir / "nowhere").name == "tiny"


def test_unknown_device_is_one_line(capsys, data_dir):
    code, out, err = shown(
        capsys, "train", "--dataset", "tiny", "--data-dir", str(data_dir), "--device", "gpu"
    )
    assert code == 2
    assert out == ""
    assert err == "srsweep: device='gpu' is unknown; use cpu, cuda, cuda:N or auto\n"


def test_trains_and_prints_metrics_with_errors(capsys, data_dir):
    arguments = ["train", "--dataset", "tiny", "--data-dir", str(data_dir), *SMALL]
    code, out, err = shown(capsys, *arguments)
    assert code == 0
    assert "done (max_epochs) after" in out
    assert "NDCG" in out
    assert " +- " in out
    assert "Peak training memory" in out
    taken = int(out.partition("after ")[2].partition(" steps")[0])
    (timed,) = [line for line in out.splitlines() if "Steps timed" in line]
    assert timed.split()[-1] == str(taken - 3)
    assert err.count("validation NDCG@10") == 2
    code, out, _ = shown(capsys, *arguments, "--json")
    (row,) = json.loads(out)
    assert row["embedding_dim"] == 8
    assert row["status"] == "done"
    assert 0 <= row["ndcg_at_10"] <= 1
    assert row["ndcg_at_10_se"] > 0


def test_records_what_it_printed_once(capsys, data_dir, tmp_path):
    from db.query import rows

    url = f"sqlite:///{tmp_path / 'runs.db'}"
    arguments = ["train", "--dataset", "tiny", "--data-dir", str(data_dir), *SMALL, "--db", url]
    code, out, _ = shown(capsys, *arguments, "--json")
    assert code == 0
    (printed,) = json.loads(out)
    (stored,) = rows(
        url, "select runs.status, num_steps from runs join run_summary on run_id = runs.id"
    )
    assert stored == {"status": "done", "num_steps": printed["num_steps"]}
    (steps,) = rows(url, "select count(*) as n from steps")
    assert steps["n"] == printed["num_steps"]
    code, _, err = shown(capsys, *arguments)
    assert code == 2
    assert "is done in the database already" in err


def test_baselines_stand_beside_the_model(capsys, data_dir):
    code, out, _ = shown(
        capsys, "baselines", "--dataset", "tiny", "--data-dir", str(data_dir), *SMALL, "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert [row["ranked by"] for row in found] == ["most popular", "last-item Markov", "sasrec, ce"]
    for row in found[:2]:
        difference = found[2]["ndcg_at_10"] - row["ndcg_at_10"]
        error = np.hypot(found[2]["ndcg_at_10_se"], row["ndcg_at_10_se"])
        assert row["model_ahead_by_se"] == pytest.approx(difference / error)


def test_result_row_names_everything_once():
    from db.measures import RunResult
    from db.spec import RunStatus

    result = RunResult(
        status=RunStatus.DONE, num_steps=3, num_epochs=1, best_step=3, num_parameters=9
    )
    result = dataclasses.replace(result, test={"ndcg_at_10": 0.5}, validation={"ndcg_at_10": 0.7})
    row = module.result_row(RunSpec(dataset="d"), result)
    assert row["ndcg_at_10"] == 0.5
    assert row["validation_ndcg_at_10"] == 0.7
    assert row["status"] == "done"


def test_profile_prints_tables_and_draws(capsys, data_dir, tmp_path):
    arguments = ["train", "--dataset", "tiny", "--data-dir", str(data_dir), *SMALL, "--profile"]
    code, out, _ = shown(capsys, *arguments, "--profile-dir", str(tmp_path / "profile"))
    assert code == 0
    for told in ("optimizer state", "activations", "measured peak", "network backward"):
        assert told in out
    written = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert written == ["profile.csv", "profile.png", "profile.svg"]
    code, out, _ = shown(capsys, *arguments, "--json")
    rows = json.loads(out)
    shares = [row["share"] for row in rows if row["kind"] == "step_time" and row["share"]]
    assert sum(shares) == pytest.approx(1.0)
    (tmp_path / "file").touch()
    code, _, err = shown(capsys, *arguments, "--profile-dir", str(tmp_path / "file" / "x"))
    assert code == 2
    assert "choose another folder" in err


def test_micro_batches_are_recorded_with_the_run(capsys, data_dir, tmp_path):
    from db.query import rows

    url = f"sqlite:///{tmp_path / 'runs.db'}"
    arguments = ["train", "--dataset", "tiny", "--data-dir", str(data_dir), *SMALL, "--db", url]
    for more in (["--micro-batch-size", "16"], []):
        assert shown(capsys, *arguments, *more)[0] == 0
    found = rows(url, "SELECT micro_batch_size FROM runs ORDER BY id")
    assert [row["micro_batch_size"] for row in found] == [16, None]
