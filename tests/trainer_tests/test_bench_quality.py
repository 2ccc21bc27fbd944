import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import quality


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(quality.__file__).parent))
    import _peer_quality

    yield _peer_quality
    for name in ("_peer_quality", "_replay"):
        sys.modules.pop(name, None)


def test_windows_are_padded_on_the_left(peer):
    items = np.arange(10, 20, dtype=np.int32)
    starts, ends = np.array([0, 2, 9]), np.array([2, 9, 10])
    found, mask = peer.left_padded(items, starts, ends, 3)
    assert found.tolist() == [[0, 10, 11], [16, 17, 18], [0, 0, 19]]
    assert mask.tolist() == [[False, True, True], [True] * 3, [False, False, True]]


def test_ranks_leave_the_history_out(peer):
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    network = SimpleNamespace(
        eval=lambda: None,
        forward_step=lambda features, mask: torch.ones(*mask.shape, 1),
    )
    items = np.array([0, 1, 3, 2, 0], dtype=np.int32)
    # the first user has seen items 0 and 1 and is to get 3; the second has seen its target
    test = np.array([[0, 1], [0, 2], [2, 4], [3, 2]])
    job = {"num_items": 5, "max_seq_len": 4}
    found = peer.rank(network, scores.T, {"items": items, "test": test}, "test", job)
    gain = 1 / math.log2(3)
    assert found["ndcg"] == pytest.approx(gain / 2)
    assert found["ndcg_se"] == pytest.approx(np.std([gain, 0.0], ddof=1) / math.sqrt(2))
    assert found["hit_rate"] == 0.5
    assert found["num_users"] == 2


def test_seeds_are_summarised_by_library_and_loss():
    def row(library, seed, ndcg):
        return {
            "library": library, "loss": "ce", "seed": seed, "ndcg_at_10": ndcg,
            "ndcg_at_10_se": 0.01, "hit_rate_at_10": 2 * ndcg,
        }  # fmt: skip

    rows = [row("srsweep", 42, 0.1), row("srsweep", 43, 0.2), row("replay-rec", 42, 0.3)]
    ours, theirs = quality.summary(rows)
    assert ours["ndcg_at_10"] == pytest.approx(0.15)
    assert ours["over_seeds_sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert ours["seeds"] == 2
    assert theirs["over_seeds_sd"] is None
