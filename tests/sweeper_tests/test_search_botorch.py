"""BoTorch beside the default sampler in the bench: skipped by name, or asked like any other."""

import pytest

from bench import _botorch
from bench.search import OBJECTIVES, Replay, main, replay_order, replay_search
from db.spec import RunSpec, RunStatus
from sweeper.search.ask import Search
from sweeper.search.space import MEMORY, Observation, SearchSpace


@pytest.fixture
def replay():
    answers = {}
    for size in (32, 64, 128, 256, 512):
        for length in (16, 32, 64):
            spec = RunSpec(dataset="toy", loss="ce", batch_size=size, max_seq_len=length)
            values = {"ndcg_at_10": 1 - 1 / size - 1 / length, MEMORY: 1e6 * size * length}
            answers[spec] = Observation(spec, RunStatus.DONE, values)
    return Replay("toy", answers)


def test_botorch_is_skipped_by_name_where_it_is_missing(monkeypatch, capsys, tmp_path):
    (tmp_path / "paper").mkdir()
    columns = "dataset,batch_size,max_seq_len,loss_sample_count,NDCG_10_test,max_allocated_memory"
    rows = ["toy,32,16,8,0.1,1,9", "toy,64,16,8,0.2,2,9", "toy,64,32,8,0.3,3,9"]
    text = "\n".join([f"{columns},run_training_epoch", *rows])
    (tmp_path / "paper" / "experiments.csv").write_text(text)
    monkeypatch.setenv("SRSWEEP_SHARED", str(tmp_path))
    monkeypatch.setattr(_botorch, "is_installed", lambda: False)
    assert main(["--samplers", "botorch,grid", "--batches", "1", "--share", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("botorch is skipped")
    assert [line.split()[0] for line in lines[3:]] == ["grid", "grid"]


def test_botorch_begins_with_our_first_design(replay):
    asker = replay_search(replay, {}, "botorch").with_seed(3)
    ours = Search(SearchSpace(replay.points), OBJECTIVES).with_seed(3)
    assert asker.propose([], 4) == ours.propose([], 4)


@pytest.mark.parametrize("batch", [1, 3])
def test_botorch_asks_for_each_point_once_and_the_same_again(replay, batch):
    pytest.importorskip("botorch", reason="BoTorch is not installed")
    orders = [
        replay_order(replay, replay_search(replay, {}, "botorch"), batch=batch, budget=9)
        for _ in range(2)
    ]
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 9
