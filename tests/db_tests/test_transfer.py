"""Runs to files and back, and other people's files."""

import csv
import math

import pytest

from db import query
from db.errors import TransferError
from db.imported import ForeignRun, put_foreign
from db.spec import RunSpec, RunStatus
from db.store import DatasetRecord
from db.transfer import ColumnMapping, export_runs, import_table

FINGERPRINT = "a" * 64
HEADER = "dataset,loss,batch_size,max_seq_len,num_negatives,peak_train_memory_bytes,ndcg_at_10"
ROW = "ml,ce_minus,64,50,128,3000000000,0.05"


def _url(folder, name):
    return f"sqlite:///{folder}/{name}.db"


def _filled(folder):
    """A database with finished, infeasible and repeated runs."""
    measured = {
        "memory_source": "cuda_allocated", "time_source": "training_only", "timing": "exclusive",
        "num_steps": 100, "best_step": 80, "final_loss": 0.1 + 0.2, "ndcg_at_10": 1 / 3,
        "ndcg_at_10_se": 1e-17, "peak_train_memory_bytes": 2**40 + 1, "epoch_seconds": 12.5,
        "stop_reason": "patience",
    }  # fmt: skip
    bound = {**dict.fromkeys(measured), "memory_source": "cuda_allocated",
             "requested_bytes": 5, "total_bytes": 2**33, "memory_bound_bytes": 2**33}  # fmt: skip
    spec = RunSpec(
        dataset="ml", loss="cce_minus", num_negatives=64, precision="fp32", negatives_share="batch"
    )
    full = RunSpec(dataset="ml", precision="bf16", learning_rate=3e-4, mask_seen=False)
    common = {"fingerprint": FINGERPRINT, "source": "theirs", "device_class": "H100, 80 GiB"}
    runs = [
        ForeignRun(spec=spec, summary=measured, **common),
        ForeignRun(spec=spec, summary={**measured, "ndcg_at_10": 0.25}, replicate=1, **common),
        ForeignRun(spec=full, summary=bound, status=RunStatus.OUT_OF_MEMORY, **common),
    ]
    record = DatasetRecord(name="ml", fingerprint=FINGERPRINT, num_users=10, num_items=20)
    url = _url(folder, "first")
    put_foreign(url, "sweep", "", [record], runs)
    return url


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_export_writes_import_reads_back_unchanged(tmp_path, suffix):
    first = _filled(tmp_path)
    file, again = (tmp_path / f"{name}.{suffix}" for name in ("runs", "again"))
    assert export_runs(first, file) == 3
    second = _url(tmp_path, "second")
    found = import_table(second, file)
    assert (found.counts.new, found.counts.known, found.notes) == (3, 0, ())
    before, after = query.summary_frame(first), query.summary_frame(second)
    assert before.equals(after)
    assert after["ndcg_at_10"].tolist()[:2] == [1 / 3, 0.25]
    assert after["status"].tolist() == ["done", "done", "out_of_memory"]
    assert math.isnan(after["peak_train_memory_bytes"].iloc[2])
    export_runs(second, again)
    if suffix == "csv":
        assert file.read_bytes() == again.read_bytes()


def test_csv_and_parquet_hold_the_same_runs(tmp_path):
    first = _filled(tmp_path)
    for suffix in ("csv", "parquet"):
        export_runs(first, tmp_path / f"runs.{suffix}")
    url = _url(tmp_path, "both")
    assert import_table(url, tmp_path / "runs.csv").counts.new == 3
    assert import_table(url, tmp_path / "runs.parquet").counts.known == 3
    assert len(query.summary_frame(url)) == 3


def test_an_edited_row_is_refused_under_its_old_key(tmp_path):
    file = tmp_path / "runs.csv"
    export_runs(_filled(tmp_path), file)
    key = next(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))["run_key"]
    file.write_text(file.read_text().replace(",64,", ",65,", 1))
    with pytest.raises(TransferError, match=f"row 2: run_key {key[:12]} does not belong"):
        import_table(_url(tmp_path, "second"), file)


def test_a_foreign_file_through_a_mapping(tmp_path):
    file = tmp_path / "theirs.csv"
    file.write_text(
        "bs,sl,ns,mem,seconds_per_epoch,ndcg,comment\n"
        "64,50,128,2.5,1500,0.05,good\n64,50,inf,,nan,inf,bad\n64,50,128,2.5,1500,0.06,again\n"
    )
    mapping = ColumnMapping(
        columns={"bs": "batch_size", "sl": "max_seq_len", "ns": "num_negatives",
                 "mem": "peak_train_memory_bytes", "seconds_per_epoch": "epoch_seconds",
                 "ndcg": "ndcg_at_10"},
        units={"peak_train_memory_bytes": "GiB", "epoch_seconds": "ms"},
        values={"dataset": "ml", "loss": "ce_minus"},
    )  # fmt: skip
    url = _url(tmp_path, "runs")
    with pytest.raises(TransferError, match=r"row 3: .*ce_minus"):
        import_table(url, file, source="theirs", mapping=mapping)
    file.write_text(file.read_text().replace("inf,,", "64,,"))
    found = import_table(url, file, source="theirs", mapping=mapping)
    assert found.counts.new == 3
    assert "1 columns are not imported: comment." in found.notes
    assert "1 values of ndcg_at_10 that are not finite are stored as missing." in found.notes
    frame = query.summary_frame(url)
    assert frame["peak_train_memory_bytes"].tolist()[0] == 2.5 * 2**30
    assert frame["epoch_seconds"].tolist()[0] == 1.5
    assert frame["replicate"].tolist() == [0, 0, 1]
    assert set(frame["memory_source"].dropna()) == {"published_mixed"}
    again = import_table(url, file, source="theirs", mapping=mapping)
    assert (again.counts.new, again.counts.known) == (0, 3)
    assert query.summary_frame(url).equals(frame)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dataset,loss,batch_size\nml,ce,64\n", "theirs.csv lacks max_seq_len; map its columns"),
        (f"{HEADER}\n{ROW}\nml,ce_minus,many,50,128,3e9,0.05\n",
         "row 3, column batch_size: 'many' is not a number"),
        (f"{HEADER}\nml,ce_minus,64,50,128,3e9,good\n",
         "row 2, column ndcg_at_10: 'good' is not a number"),
        (f"{HEADER}\nml,ce_minus,64.5,50,128,3e9,0.1\n",
         "row 2, column batch_size: '64.5' is not a whole number"),
        (f"{HEADER}\n{ROW}\nml,ce_minus,64,50,256,2.5,0.05\n",
         r"peak_train_memory_bytes=2 bytes in 1 of 2 rows is too little for a training run"),
        (f"{HEADER}\nml,ce_minus,64,50,256,2.5,0.05\n",
         "give the file's unit, for example --unit peak_train_memory_bytes=GiB"),
        (f"{HEADER}\nml,ce_minux,64,50,128,3e9,0.05\n", "row 2: .*ce_minux.*ce_minus"),
        (f"{HEADER}\nml,ce_minus,64,50\n", "row 2: 4 cells under 7 columns"),
        (f"{HEADER}\n,ce_minus,64,50,128,3e9,0.1\n", "row 2, column dataset: the value is missing"),
        (f"{HEADER}\n", "theirs.csv holds no run below its header"),
        ("", "theirs.csv is empty"),
        (f"{HEADER},status\n{ROW},doen\n", "row 2, column status: 'doen' is no final status.*done"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, text, sentence):
    file = tmp_path / "theirs.csv"
    file.write_text(text)
    url = _url(tmp_path, "runs")
    with pytest.raises(TransferError, match=sentence):
        import_table(url, file, source="theirs")
    assert not (tmp_path / "runs.db").exists()


def test_what_a_mapping_cannot_mean_is_refused(tmp_path):
    file = tmp_path / "theirs.csv"
    file.write_text(f"{HEADER}\n{ROW}\n")
    url = _url(tmp_path, "runs")
    for mapping, sentence in (
        (ColumnMapping(columns={"loss": "los"}), "'los' is no column of ours.*loss"),
        (ColumnMapping(columns={"lss": "loss"}), "theirs.csv has no column 'lss'.*loss"),
        (ColumnMapping(units={"epoch_seconds": "sec"}), "unit 'sec' of epoch_seconds is unknown"),
        (ColumnMapping(columns={"loss": "dataset"}), "two columns would become 'dataset'"),
    ):
        with pytest.raises(TransferError, match=sentence):
            import_table(url, file, source="theirs", mapping=mapping)
    with pytest.raises(TransferError, match="row 2: no source; name where the runs are from"):
        import_table(url, file)


def test_files_that_cannot_be_read_or_written(tmp_path):
    url = _filled(tmp_path)
    with pytest.raises(TransferError, match=r"runs\.txt: name a file that ends in \.csv or"):
        export_runs(url, tmp_path / "runs.txt")
    with pytest.raises(TransferError, match=r"gone/runs\.csv: No such file or directory"):
        export_runs(url, tmp_path / "gone" / "runs.csv")
    with pytest.raises(TransferError, match="no finished run to export"):
        export_runs(url, tmp_path / "runs.csv", datasets=["other"])
    with pytest.raises(TransferError, match=r"missing\.csv: No such file"):
        import_table(url, tmp_path / "missing.csv", source="theirs")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(TransferError, match=r"broken\.parquet is no readable Parquet file"):
        import_table(url, broken, source="theirs")
