"""What sharing negatives costs: gradient error and NDCG@10 on MovieTweetings.

A bag-of-recent-items model (the mean of the last ten item vectors, tied weights) is trained with
the full softmax; at that point the gradient of the sampled loss is compared with the full one, for
sets shared by T tokens. Then the same model is trained from scratch with each T.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.alias import AliasTable
from kernels.linear_cross_entropy.api import linear_cross_entropy
from kernels.negatives import Negatives

SHARES: tuple[int | str, ...] = (1, 32, 128, 1024, "batch")
HISTORY, WIDTH, BATCH, NUM_NEGATIVES, DRAWS, SEEDS = 10, 64, 2048, 64, 16, 2


def load_examples(path: Path, min_count: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Histories (n, HISTORY; -1 padded) and targets of training, and of each user's last event."""
    columns = np.array([line.split("::") for line in path.read_text().splitlines()], dtype=float)
    user, item, when = columns[:, 0].astype(int), columns[:, 1].astype(int), columns[:, 3]
    _, codes, counts = np.unique(item, return_inverse=True, return_counts=True)
    keep = counts[codes] >= min_count
    _, codes = np.unique(codes[keep], return_inverse=True)
    user, when = user[keep], when[keep]
    order = np.lexsort((when, user))
    user, codes = user[order], codes[order]
    train: tuple[list[np.ndarray], list[int]] = ([], [])
    test: tuple[list[np.ndarray], list[int]] = ([], [])
    for sequence in np.split(codes, np.flatnonzero(np.diff(user)) + 1):
        for place in range(1, len(sequence)):
            history = np.full(HISTORY, -1)
            recent = sequence[max(0, place - HISTORY) : place]
            history[-len(recent) :] = recent
            into = test if place == len(sequence) - 1 and place >= 2 else train
            into[0].append(history)
            into[1].append(int(sequence[place]))
    tensors = [torch.from_numpy(np.array(part)) for part in (*train, *test)]
    return tensors[0], tensors[1], tensors[2], tensors[3], int(codes.max()) + 1


def hidden(items: Tensor, history: Tensor) -> Tensor:
    """Mean vector of the history, scaled to unit variance at initialisation."""
    known = (history >= 0).float()[..., None]
    total = (items[history.clamp(min=0)] * known).sum(1)
    return total / known.sum(1).clamp(min=1).sqrt()


def train(data: tuple[Tensor, Tensor], num_items: int, share: int | str | None, epochs: int,
          seed: int) -> Tensor:  # fmt: skip
    """Item vectors after training with the full softmax (None) or shared negatives."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(num_items, WIDTH, generator=generator).mul_(0.05).requires_grad_()
    optimizer = torch.optim.Adam([items], lr=5e-3, betas=(0.9, 0.98))
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            negatives = None
            if share is not None:
                negatives = Negatives(NUM_NEGATIVES, share=share, seed=seed * 2**32 + step)  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss = linear_cross_entropy(
                hidden(items, data[0][rows]), items, data[1][rows], negatives=negatives
            )
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            step += 1
    return items.detach()


def ndcg(items: Tensor, history: Tensor, target: Tensor) -> float:
    """NDCG@10 over the whole catalog, what was seen left in."""
    scores = hidden(items, history) @ items.T
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    return float(torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0).mean())


def gradients(
    items: Tensor, data: tuple[Tensor, Tensor], negatives: Negatives | None
) -> list[Tensor]:
    """Gradients of the mean loss with respect to hidden states and output item vectors."""
    e = hidden(items, data[0]).requires_grad_()
    weight = items.clone().requires_grad_()
    linear_cross_entropy(e, weight, data[1], negatives=negatives).backward()  # type: ignore[union-attr]
    assert e.grad is not None
    assert weight.grad is not None
    return [e.grad, weight.grad]


def sharing(shared: Path, epochs: int) -> list[dict[str, object]]:
    """One row per T: relative gradient errors, root mean square over draws."""
    history, target, _, _, num_items = load_examples(_ratings(shared))
    items = train((history, target), num_items, None, epochs, 0)
    batch = torch.randperm(len(history), generator=torch.Generator().manual_seed(9))[:BATCH]
    sample = (history[batch], target[batch])
    exact = gradients(items, sample, None)
    rows: list[dict[str, object]] = []
    for share in SHARES:
        square = [0.0, 0.0]
        for draw in range(DRAWS):
            negatives = Negatives(NUM_NEGATIVES, share=share, seed=1000 + draw)  # type: ignore[arg-type]
            for place, (got, true) in enumerate(
                zip(gradients(items, sample, negatives), exact, strict=True)
            ):
                square[place] += float((got - true).square().sum() / true.square().sum()) / DRAWS
        rows.append(
            {"part": "sharing", "share": share, "num_items": num_items,
             "num_negatives": NUM_NEGATIVES, "tokens": BATCH, "draws": DRAWS,
             "trained_epochs": epochs, "grad_e_error": square[0] ** 0.5,
             "grad_weight_error": square[1] ** 0.5}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def corrections(shared: Path, epochs: int) -> list[dict[str, object]]:
    """One row per logQ correction of popularity draws: bias and error of the gradients.

    The bias is that of the mean over draws; what is left of the draws' own noise in it is the error
    over the root of their number.
    """
    history, target, _, _, num_items = load_examples(_ratings(shared))
    items = train((history, target), num_items, None, epochs, 0)
    batch = torch.randperm(len(history), generator=torch.Generator().manual_seed(9))[:BATCH]
    sample = (history[batch], target[batch])
    exact = gradients(items, sample, None)
    counts = torch.bincount(target, minlength=num_items) + 1
    table = AliasTable.from_counts(counts)
    draws = 8 * DRAWS
    rows: list[dict[str, object]] = []
    for name, logq, hits in (
        ("none", False, "mask"), ("logq", True, "mask"), ("exclude", True, "exclude"),
        ("refined", "refined", "mask"), ("classic", "classic", "mask"),
    ):  # fmt: skip
        mean = [torch.zeros_like(t) for t in exact]
        square = [0.0, 0.0]
        for draw in range(draws):
            negatives = Negatives(
                NUM_NEGATIVES, sampler=table, share=128, logq=logq, hits=hits, seed=1000 + draw  # type: ignore[arg-type]
            )  # fmt: skip
            for place, got in enumerate(gradients(items, sample, negatives)):
                mean[place] += got / draws
                error = (got - exact[place]).square().sum() / exact[place].square().sum()
                square[place] += float(error) / draws
        bias = [
            float((m - t).square().sum() / t.square().sum()) ** 0.5
            for m, t in zip(mean, exact, strict=True)
        ]
        rows.append(
            {"part": "corrections", "correction": name, "sampler": "popularity", "share": 128,
             "num_items": num_items, "num_negatives": NUM_NEGATIVES, "tokens": BATCH,
             "draws": draws, "trained_epochs": epochs, "grad_e_bias": bias[0],
             "grad_e_error": square[0] ** 0.5, "grad_weight_bias": bias[1],
             "grad_weight_error": square[1] ** 0.5}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def quality(shared: Path, epochs: int, shares: Sequence[str] = ()) -> list[dict[str, object]]:
    """One row per T, and one for the full softmax: NDCG@10 on each user's last event.

    With `shares` only these, of "full" and those of `SHARES`.
    """
    history, target, test_history, test_target, num_items = load_examples(_ratings(shared))
    rows: list[dict[str, object]] = []
    for share in (None, *SHARES):
        if shares and str(share or "full") not in shares:
            continue
        scores = [
            ndcg(
                train((history, target), num_items, share, epochs, seed), test_history, test_target
            )
            for seed in range(SEEDS)
        ]
        rows.append(
            {"part": "quality", "share": share or "full softmax", "num_items": num_items,
             "num_negatives": "" if share is None else NUM_NEGATIVES, "tokens": BATCH,
             "trained_epochs": epochs, "seeds": SEEDS, "ndcg_at_10": sum(scores) / SEEDS,
             "ndcg_spread": max(scores) - min(scores)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _ratings(shared: Path) -> Path:
    return shared / "data" / "movietweetings-100k" / "ratings.dat"
