"""A planned sweep, workers and records for the tests of the store."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import reject
from hypothesis import strategies as st

from db.connect import write_engine
from db.errors import SpecError
from db.measures import KS, METRICS, EvaluationRecord, RunResult, StepRecord
from db.spec import FULL_LOSSES, SAMPLED_LOSSES, RunSpec, RunStatus
from db.store import Claim, DatasetRecord, PlannedRun, RunStore, WorkerInfo
from db.writer import RunWriter

FINGERPRINT = "f" * 64
WORKER = WorkerInfo(host="node-1", pid=4711, device_class="cpu-8GiB", device_memory_bytes=2**33)


class Bench:
    """A store with one dataset and one sweep, and short ways to what tests do with it."""

    def __init__(self, url: str, folder: Path, num_runs: int = 3) -> None:
        self.url = url
        self.store = RunStore.open(url)
        self.spool_dir = folder / "spool"
        self.store.put_dataset(
            DatasetRecord(name="tiny", fingerprint=FINGERPRINT, num_users=20, num_items=50)
        )
        self.planned = [
            PlannedRun(
                spec=RunSpec(dataset="tiny", precision="fp32", seed=seed), fingerprint=FINGERPRINT
            )
            for seed in range(num_runs)
        ]
        self.keys = [run.key for run in self.planned]
        self.store.put_sweep("demo", "seed: [0, 1, 2]", self.planned)

    def claim(self, number: int = 0, lease_seconds: float = 60.0) -> Claim:
        """Claim a run that is free."""
        held = self.store.claim(self.keys[number], WORKER, lease_seconds=lease_seconds)
        assert held is not None
        return held

    def writer(
        self, held: Claim, *, flush_seconds: float = 0.02, patience_seconds: float = 20.0
    ) -> RunWriter:
        """Writer with short pauses."""
        return self.store.writer(
            held,
            spool_dir=self.spool_dir,
            flush_seconds=flush_seconds,
            patience_seconds=patience_seconds,
        )

    def run_out(self, held: Claim) -> None:
        """Let the lease of an attempt run out, by the database's clock."""
        self.execute(
            "UPDATE attempts SET lease_until = '2000-01-01 00:00:00.000000', lease_seconds = 0 "
            "WHERE id = :id",
            id=held.attempt_id,
        )

    def execute(self, sql: str, **params: object) -> None:
        """Run one statement behind the store's back."""
        engine = write_engine(self.url)
        with engine.begin() as connection:
            connection.execute(sa.text(sql), params)
        engine.dispose()

    def rows(self, sql: str, **params: object) -> list[tuple[object, ...]]:
        """Rows of one SELECT."""
        engine = write_engine(self.url)
        with engine.begin() as connection:
            found = [tuple(row) for row in connection.execute(sa.text(sql), params)]
        engine.dispose()
        return found

    def steps_of(self, held: Claim) -> list[int]:
        """Step numbers of an attempt."""
        query = "SELECT step FROM steps WHERE attempt_id = :id ORDER BY step"
        return [int(str(row[0])) for row in self.rows(query, id=held.attempt_id)]


@pytest.fixture
def bench(store_url: str, tmp_path: Path) -> Bench:
    """Store with a planned sweep, on SQLite and on PostgreSQL."""
    return Bench(store_url, tmp_path)


@pytest.fixture(scope="session")
def make_bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """Maker of the same for a URL."""
    return lambda url: Bench(url, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def worker() -> WorkerInfo:
    """Where the tests' attempts run."""
    return WORKER


def make_step(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "epoch": step // 10,
        "loss": 1.0 / (step + 1),
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "step_seconds": 0.01,
        "tokens": 640,
        "allocated_bytes": 1000 + step,
        "reserved_bytes": 4096,
        "peak_bytes": 2000 + step,
    }
    return StepRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def step() -> Callable[..., StepRecord]:
    """Maker of a step record; keywords replace values."""
    return make_step


def make_evaluation(step: int, split: str = "validation", value: float = 0.25) -> list[object]:
    return [
        EvaluationRecord(step, step // 10, split, metric, k, value + i / 100, 0.01, 20)  # type: ignore[arg-type]
        for i, metric in enumerate(METRICS)
        for k in KS
    ]


@pytest.fixture(scope="session")
def evaluation() -> Callable[..., list[object]]:
    """Maker of all rows of one evaluation."""
    return make_evaluation


def make_result(status: RunStatus = RunStatus.DONE, **changes: object) -> RunResult:
    values: dict[str, object] = {
        "status": status,
        "num_steps": 30,
        "num_epochs": 3,
        "best_step": 20,
        "num_parameters": 1234,
        "test": {"ndcg_at_10": 0.125, "ndcg_at_10_se": 0.01, "coverage_at_10": 0.5},
        "validation": {"ndcg_at_10": 0.25},
        "peak_train_memory_bytes": 3_000_000_000,
        "epoch_seconds": 1.5,
        "stop_reason": "max_epochs",
    }
    return RunResult(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def result() -> Callable[..., RunResult]:
    """Maker of a run's result."""
    return make_result


@st.composite
def _specs(draw: st.DrawFn) -> RunSpec:
    """Valid specifications that reach every column."""
    loss = draw(st.sampled_from(["bce", "bce_plus", "gbce", "ce", "ce_minus", "cce", "cce_minus",
                                 "sce"]))  # fmt: skip
    model = draw(st.sampled_from(["sasrec", "bert4rec"]))
    heads = draw(st.integers(1, 8))
    values: dict[str, object] = {
        "dataset": draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                                max_size=20)),
        "model": model,
        "loss": loss,
        "batch_size": draw(st.integers(1, 2**62)),
        "max_seq_len": draw(st.integers(1, 5000)),
        "num_heads": heads,
        "embedding_dim": heads * draw(st.integers(1, 64)),
        "dropout_rate": draw(st.floats(0, 0.999)),
        "learning_rate": draw(st.floats(1e-300, 1e300)),
        "precision": draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        "evaluate_every_steps": draw(st.none() | st.integers(1, 10**6)),
        "max_validation_users": draw(st.none() | st.integers(1, 10**9)),
        "mask_seen": draw(st.booleans()),
        "metric_frame": draw(st.sampled_from(["train", "test_history"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }  # fmt: skip
    if loss != "sce" and values["batch_size"] > 1:
        values["micro_batch_size"] = draw(st.none() | st.integers(1, values["batch_size"] - 1))
    if loss in SAMPLED_LOSSES:
        values["num_negatives"] = 1 if loss == "bce" else draw(st.integers(1, 10**6))
        values["optimizer"] = draw(st.sampled_from(["adam", "rowwise_adam"]))
    if loss in {"bce_plus", "gbce", "cce_minus"}:
        values["negatives_share"] = draw(st.just("batch") | st.integers(1, 10**6))
        values["hits"] = draw(st.sampled_from(["exclude", "mask", "keep"]))
    if loss in {"cce", "cce_minus"} and draw(st.booleans()):
        values["filter_eps"] = draw(st.floats(1e-12, 0.5))
        values["filter_mode"] = draw(st.sampled_from(["drop", "unbiased"]))
    if loss == "sce":
        values["sce_bucket_size_x"] = draw(st.none() | st.integers(1, 10**4))
        values["sce_mix"] = draw(st.booleans())
    if model == "sasrec":
        values["attend_padding"] = draw(st.booleans())
        if loss in FULL_LOSSES:
            values["count_padding"] = draw(st.booleans())
    else:
        values["mask_probability"] = draw(st.floats(0.01, 0.99))
    try:
        return RunSpec(**values)  # type: ignore[arg-type]
    except SpecError:
        reject()


@pytest.fixture(scope="session")
def specs() -> st.SearchStrategy[RunSpec]:
    """Strategy of valid run specifications."""
    return _specs()
