"""The paper's two published files, in small, and their oddities."""

import csv

import openpyxl
import pytest

from db import query
from db.errors import TransferError
from db.transfer_paper import import_paper, read_paper

METRICS = ("Coverage", "HitRate", "MAP", "MRR", "NDCG", "Precision", "Recall", "Surprisal")
HEADER = [
    "run_training_epoch", "run_training_batch", "max_allocated_memory", "allocated_memory",
    *(f"{metric}_{k}_test" for metric in METRICS for k in (1, 5, 10, 20, 100)),
    "dataset", "model", "batch_size", "loss_sample_count", "max_seq_len", "seed", "exp_name",
]  # fmt: skip
CURVES = ["train_loss_epoch_val", "train_loss_step_val"]


def _row(negatives, name, ndcg=0.01, memory=1.5, **changes):
    row = dict.fromkeys(HEADER, 0.001)
    row |= {
        "run_training_epoch": 12.5, "run_training_batch": 0.25, "max_allocated_memory": memory,
        "NDCG_10_test": ndcg, "dataset": "beauty", "model": "sasrec", "batch_size": 64,
        "loss_sample_count": negatives, "max_seq_len": 32, "seed": 42, "exp_name": name,
    }  # fmt: skip
    return {**row, **changes}


def _csv(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _workbook(path, rows):
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append([None, *HEADER, *CURVES])
    for number, row in enumerate(rows):
        sheet.append([number, *(row.get(name) for name in (*HEADER, *CURVES))])
    book.save(path)
    return path


def test_the_csv_becomes_runs_with_our_names_and_units(tmp_path):
    file = _csv(tmp_path / "experiments.csv", [
        _row("128.0", "beauty_sasrec_cem"), _row("inf", "beauty_sasrec_ce"),
        _row("128.0", "beauty_sasrec_cem", ndcg=0.011, memory=3.0),
        _row("inf", "beauty_sasrec_cem", max_seq_len=64),
    ])  # fmt: skip
    url = f"sqlite:///{tmp_path}/runs.db"
    counts, found = import_paper(url, file)
    assert (counts.new, counts.known, counts.steps) == (4, 0, 0)
    assert found.notes[0] == "1 rows repeat a point and are kept as replicates."
    assert "1 rows named as a sampled loss have no number of negatives" in found.notes[1]
    frame = query.summary_frame(url)
    assert frame["loss"].tolist() == ["ce_minus", "ce", "ce_minus", "ce"]
    assert frame["num_negatives"].isna().tolist() == [False, True, False, True]
    assert frame["replicate"].tolist() == [0, 0, 1, 0]
    assert frame["peak_train_memory_bytes"].tolist()[:3] == [1.5 * 2**30, 1.5 * 2**30, 3 * 2**30]
    assert frame["ndcg_at_10"].tolist()[2] == 0.011
    assert (frame["surprisal_at_100"] == 0.001).all()
    assert set(frame["memory_source"]) == set(frame["time_source"]) == {"published_mixed"}
    again, _ = import_paper(url, file)
    assert (again.new, again.known) == (0, 4)
    assert query.summary_frame(url).equals(frame)
    kept = query.rows(url, "select versions from attempts order by id limit 1")[0]["versions"]
    assert found.sha256 in kept
    assert '"row": 2' in kept


def test_the_workbook_adds_curves_even_to_known_runs(tmp_path):
    row = _row(128, "beauty_sasrec_cem")
    plain = _csv(tmp_path / "experiments.csv", [row])
    curve = {"train_loss_step_val": "9.5 9.0 nan 8.0", "train_loss_epoch_val": "9.2 8.1"}
    full = _row(None, "beauty_sasrec_ce", train_loss_step_val="7.0")
    book = _workbook(tmp_path / "data.xlsx", [{**row, **curve}, full])
    url = f"sqlite:///{tmp_path}/runs.db"
    import_paper(url, plain)
    counts, _ = import_paper(url, book)
    assert (counts.new, counts.known, counts.steps) == (1, 1, 5)
    steps = query.rows(url, "select run_key, step, epoch, loss from run_steps where "
                            "loss_function = 'ce_minus' order by step")  # fmt: skip
    assert [row["step"] for row in steps] == [49, 99, 149, 199]
    assert [row["epoch"] for row in steps] == [0, 0, 1, 1]
    assert [row["loss"] for row in steps] == [9.5, 9.0, None, 8.0]
    assert import_paper(url, book)[0].steps == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_allocated_memory": "much"}, "row 2, column max_allocated_memory: 'much' is not a"),
        ({"max_allocated_memory": "nan"}, "max_allocated_memory: nan is not a finite number"),
        ({"max_allocated_memory": 1.5 * 2**30}, "1.61061e\\+09 is no number of GiB"),
        ({"run_training_epoch": ""}, "column run_training_epoch: the number is missing"),
        ({"batch_size": 64.5}, "column batch_size: 64.5 is not a whole number"),
        ({"exp_name": "beauty_xyz"}, "column exp_name: 'beauty_xyz' ends in none of _ce"),
        ({"exp_name": "beauty_ce"}, "column loss_sample_count: 128 negatives with the full"),
    ],
)
def test_a_bad_cell_names_row_and_column(tmp_path, change, sentence):
    file = _csv(tmp_path / "experiments.csv", [_row("128.0", "beauty_sasrec_cem", **change)])
    with pytest.raises(TransferError, match=sentence):
        read_paper(file)


def test_another_file_is_refused_with_the_way_to_import_it(tmp_path):
    header = [name for name in HEADER if name not in ("seed", "model")]
    file = _csv(tmp_path / "theirs.csv", [], header)
    with pytest.raises(TransferError, match=r"theirs\.csv lacks the columns model, seed; 'import"):
        read_paper(file)
    with pytest.raises(TransferError, match=r"experiments\.csv holds no run below its header"):
        read_paper(_csv(tmp_path / "experiments.csv", []))
    (tmp_path / "data.xlsx").write_bytes(b"no zip")
    with pytest.raises(TransferError, match=r"data\.xlsx is not a readable workbook"):
        read_paper(tmp_path / "data.xlsx")
    with pytest.raises(TransferError, match=r"gone\.csv: No such file or directory"):
        read_paper(tmp_path / "gone.csv")
