"""Trains replay-rec's SASRec on a prepared dataset, by an interpreter of its own.

`python _peer_quality.py DATASET JOB` reads the arrays of `srsweep prepare` and writes one line of
JSON per validation, then one with the test of the best weights. The network, its initialisation
and its dropout are replay-rec's; the loss is its cross-entropy over the targets that are not
padding, so that no logit of padding is computed.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from _replay import SasRecModule  # noqa: E402
from torch.nn import functional  # noqa: E402

TOP = 10


def main(folder, job):
    """Train until patience ends, then test."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    data = {n: np.load(folder / f"{n}.npy") for n in ("items", "train", "validation", "test")}
    job["num_items"] = len(np.load(folder / "item_counts.npy"))
    peer = SasRecModule(job, None)
    network, table = peer.module._model, peer.module._model.item_embedder.item_emb.weight
    optimizer = torch.optim.Adam(network.parameters(), lr=job["learning_rate"], betas=(0.9, 0.98))
    order = np.random.default_rng(job["seed"])
    _, starts, ends = data["train"]
    best, since = {"ndcg": -1.0}, 0
    for epoch in range(1, job["max_epochs"] + 1):
        network.train()
        users = order.permutation(len(starts))
        for first in range(0, len(users), job["batch_size"]):
            chosen = users[first : first + job["batch_size"]]
            batch = left_padded(data["items"], starts[chosen], ends[chosen], job["max_seq_len"] + 1)
            items, mask = (torch.from_numpy(array) for array in batch)
            inputs, seen, valid = items[:, :-1], mask[:, :-1], mask[:, 1:] & mask[:, :-1]
            hidden = network.forward_step({"item_id": inputs}, seen)[valid]
            logits = hidden @ table[: job["num_items"]].T
            optimizer.zero_grad()
            functional.cross_entropy(logits, items[:, 1:][valid]).backward()
            optimizer.step()
        found = {"epoch": epoch, **rank(network, table, data, "validation", job)}
        print(json.dumps(found), flush=True)
        since = 0 if found["ndcg"] > best["ndcg"] else since + 1
        if since == 0:
            best = found | {"weights": copy.deepcopy(network.state_dict())}
        if since >= job["patience"]:
            break
    network.load_state_dict(best["weights"])
    print(json.dumps({"best_epoch": best["epoch"], **rank(network, table, data, "test", job)}))


def left_padded(items, starts, ends, length):
    """The last `length` items of each user and where there are any, shape (n, length)."""
    starts = np.maximum(starts, ends - length)
    places = ends[:, None] - length + np.arange(length)
    mask = places >= starts[:, None]
    return np.where(mask, items[np.where(mask, places, 0)], 0).astype(np.int64), mask


def rank(network, table, data, name, job):
    """NDCG and hit rate over the whole catalog, items of the history left out."""
    network.eval()
    _, starts, ends, targets = data[name]
    places = []
    for first in range(0, len(starts), 256):
        rows = slice(first, first + 256)
        batch = left_padded(data["items"], starts[rows], ends[rows], job["max_seq_len"])
        with torch.no_grad():
            hidden = network.forward_step(
                {"item_id": torch.from_numpy(batch[0])}, torch.from_numpy(batch[1])
            )
            scores = (hidden[:, -1] @ table[: job["num_items"]].T).numpy()
        own = scores[np.arange(len(scores)), targets[rows]]
        for row, (start, end) in enumerate(zip(starts[rows], ends[rows], strict=True)):
            scores[row, data["items"][start:end]] = -np.inf
        hidden_targets = np.isneginf(scores[np.arange(len(scores)), targets[rows]])
        places.append(np.where(hidden_targets, np.inf, (scores > own[:, None]).sum(axis=1)))
    place = np.concatenate(places)
    gains = np.where(place < TOP, 1 / np.log2(np.minimum(place, TOP) + 2), 0.0)
    return {
        "ndcg": gains.mean(),
        "ndcg_se": gains.std(ddof=1) / len(gains) ** 0.5,
        "hit_rate": (place < TOP).mean(),
        "num_users": len(gains),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
