import csv

import pytest

import bench.batches as batches_bench
import bench.trainer as trainer_bench
from trainer.models.sasrec import SASRec


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
def test_a_tiny_shape_is_measured_and_saved(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.measure.RESULTS", tmp_path)
    monkeypatch.setattr(trainer_bench.save, "__defaults__", (tmp_path,))
    losses = ["ce", "cce_minus"]
    arguments = ["--shapes", "tiny", "--losses", *losses, "--model", model, "--rounds", "2"]
    assert trainer_bench.main([*arguments, "--save"]) == 0
    with (tmp_path / "trainer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["variant"]) for row in rows] == [
        ("ce", "packed"),
        ("ce", "padded, valid logits"),
        ("ce", "padded, all logits"),
        ("cce_minus", "packed"),
        ("cce_minus", "padded, valid logits"),
    ]
    assert all(row["model"] == model and float(row["tokens_per_second"]) > 0 for row in rows)
    assert {row["times_packed"] for row in rows if row["variant"] == "packed"} == {"1.0"}
    assert "times_packed" in capsys.readouterr().out


def test_no_figure_is_printed_when_the_packed_model_is_wrong(monkeypatch, capsys):
    def shifted(self, batch, seed):
        made = original(self, batch, seed)
        return type(made)(made.hidden * 1.01, made.targets)

    original = SASRec.predictions
    monkeypatch.setattr(SASRec, "predictions", shifted)
    with pytest.raises(SystemExit, match=r"loss differs from the padded model's by .*: no figures"):
        trainer_bench.main(["--shapes", "tiny", "--rounds", "1"])
    assert capsys.readouterr().out == ""


def test_a_peer_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named replay' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match="no module named replay"):
        trainer_bench.main(["--shapes", "tiny", "--rounds", "1", "--peer-python", str(broken)])


def test_a_library_that_is_not_there_is_left_out(tmp_path, capsys):
    lacking = tmp_path / "python"
    lacking.write_text("""#!/bin/sh\necho '{"missing": "No module named x"}'\n""")
    lacking.chmod(0o755)
    arguments = ["--shapes", "tiny", "--rounds", "1", "--peer-python", str(lacking)]
    assert trainer_bench.main(arguments) == 0
    found = capsys.readouterr()
    assert "rectools is left out: No module named x" in found.err
    assert "packed" in found.out
    assert "rectools" not in found.out


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ("ml1m_sl200_d64", 0.46),
        ("ml1m_sl50_d64", 0.12),
        ("beauty_sl50_d64", 0.89),
    ],
)
def test_generated_lengths_leave_as_much_padding_as_the_real_data(shape, padded):
    options = trainer_bench._parse(["--batches", "20"])
    found = trainer_bench.SHAPES[shape]
    batches = trainer_bench.make_batches(found, options)
    tokens = sum(batch.num_tokens for batch in batches)
    slots = sum(len(batch.users) for batch in batches) * found.max_seq_len
    assert 1 - tokens / slots == pytest.approx(padded, abs=0.03)


def test_gathering_is_timed_beside_slicing_user_by_user(capsys):
    assert batches_bench.main(["--shapes", "tiny", "--batch-size", "8", "--rounds", "3"]) == 0
    out = capsys.readouterr().out
    assert "gathered" in out
    assert "sliced user by user" in out
