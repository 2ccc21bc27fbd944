import json

import pytest

from sweeper.cli import main as cli

TRAIN = ["--embedding-dim", "8", "--num-blocks", "1", "--max-seq-len", "8", "--max-epochs", "1"]


def run(*words):
    """Run a command that succeeds; typer leaves by SystemExit."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    assert left.value.code in (0, None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Folder of two generated datasets, and a model trained on the first."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("old", 1), ("new", 2)):
        run("generate", "--users", 150, "--items", 60, "--seed", seed, "--out", folder / name)
    model = folder / "kept.model"
    run("train", "--dataset", "old", "--data-dir", folder, *TRAIN, "--keep-model", model)
    return folder


def test_export_and_start_from_on_newer_data(kept, tmp_path, capsys):
    served = tmp_path / "served"
    run("export-model", kept / "kept.model", "--out", served, "--data-dir", kept)
    about = json.loads((served / "model.json").read_text())
    items = json.loads((served / "items.json").read_text())
    assert about["spec"]["dataset"] == "old"
    assert about["num_items"] == len(items) == len(set(items))
    capsys.readouterr()
    run("train", "--dataset", "new", "--data-dir", kept, *TRAIN, "--from", served)
    text = capsys.readouterr().err
    assert f"starting from {served}: " in text
    assert f"of its {len(items):,} items" in text


def test_start_from_is_not_recorded(kept, tmp_path, capsys):
    served = tmp_path / "served"
    run("export-model", kept / "kept.model", "--out", served, "--data-dir", kept)
    words = ["train", "--dataset", "new", "--data-dir", str(kept), *TRAIN, "--from", str(served)]
    assert cli.main([*words, "--db", f"sqlite:///{tmp_path}/runs.db"]) == 2
    assert "--from cannot go with --db" in capsys.readouterr().err
    assert not (tmp_path / "runs.db").exists()


def test_export_of_a_file_that_is_no_model(kept, tmp_path, capsys):
    (tmp_path / "x.model").write_text("no")
    words = ["export-model", str(tmp_path / "x.model"), "--out", str(tmp_path / "served")]
    assert cli.main(words) == 2
    assert "x.model cannot be read as a model" in capsys.readouterr().err
    assert not (tmp_path / "served").exists()
