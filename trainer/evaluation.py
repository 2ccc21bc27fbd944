"""Ranks the held-out users of a dataset with a model and reports every metric."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from db.measures import METRICS, EvaluationRecord, Split
from db.spec import MetricFrame
from trainer.data.batches import IntArray, PackedSequences
from trainer.models.network import SequenceModel
from trainer.ranking import (
    Frame,
    Scorer,
    encode_users,
    inner_products,
    rank_items,
    single_target_metrics,
)
from trainer.seeds import derive

_USERS_AT_ONCE = 4096
_SAMPLE_SEED = 20_250_131
"""The validation sample is the same for all runs on a dataset, whatever their seed."""


class HeldOut(Protocol):
    """Histories and one held-out item per user (`trainer.data.dataset.EvaluationSet`)."""

    @property
    def starts(self) -> IntArray:
        """First position of each history in the dataset's items."""

    @property
    def ends(self) -> IntArray:
        """One past the last position of each history."""

    @property
    def targets(self) -> IntArray:
        """Held-out item of each user."""


class FrameCounts(Protocol):
    """The counts of a dataset that Coverage and Surprisal need."""

    @property
    def item_users(self) -> IntArray:
        """Distinct training users of each item."""

    @property
    def num_train_users(self) -> int:
        """Training users."""

    @property
    def test_history_item_users(self) -> IntArray:
        """Distinct users of each item in the test histories."""

    @property
    def num_test_history_users(self) -> int:
        """Users with a test history."""


def metric_frame(dataset: FrameCounts, frame: MetricFrame, split: Split) -> Frame:
    """Users and items that Coverage and Surprisal refer to.

    Parameters
    ----------
    dataset : FrameCounts
    frame : {"train", "test_history"}
        `test_history` is the paper's: the histories that test lists are made from, with
        Surprisal averaged over all their users.
    split : {"validation", "test"}
        The paper's average makes sense for test lists only.
    """
    if frame == "train":
        return Frame(dataset.item_users, dataset.num_train_users)
    return Frame(
        dataset.test_history_item_users,
        dataset.num_test_history_users,
        average_over_users=split == "test",
    )


class Evaluator:
    """Evaluation of one split.

    Parameters
    ----------
    items : Tensor, shape (rows,), int32
        Items of the dataset, on the device of the model.
    held_out : HeldOut
        Histories and targets.
    split : {"validation", "test"}
    frame : Frame
        Reference of Coverage and Surprisal.
    max_seq_len : int
        Most recent items that a state is made from.
    mask_seen : bool
        Never recommend an item of the history.
    budget_bytes : int
        Bytes of scores held at once.
    max_users : int, optional
        Evaluate a fixed random sample of that many users.
    """

    def __init__(
        self,
        items: Tensor,
        held_out: HeldOut,
        *,
        split: Split,
        frame: Frame,
        max_seq_len: int,
        mask_seen: bool,
        budget_bytes: int,
        max_users: int | None = None,
    ) -> None:
        self._items = items
        self._held_out = held_out
        self._split = split
        self._frame = frame
        self._mask_seen = mask_seen
        self._budget_bytes = budget_bytes
        self._sequences = PackedSequences(
            items, held_out, max_seq_len=max_seq_len, next_items=False
        )
        self._users = np.arange(len(held_out.targets))
        if max_users is not None and max_users < len(self._users):
            generator = np.random.default_rng(_SAMPLE_SEED)
            self._users = np.sort(generator.choice(self._users, max_users, replace=False))

    @property
    def num_users(self) -> int:
        """Users that are evaluated."""
        return len(self._users)

    def rank(self, scorer: Callable[[IntArray], Scorer], num_items: int) -> IntArray:
        """Ranked lists of all evaluated users, shape (num_users, 100), int64.

        Parameters
        ----------
        scorer : callable
            Makes what scores some users, given as rows of the split.
        num_items : int
            Catalog size V.
        """
        found = []
        for begin in range(0, len(self._users), _USERS_AT_ONCE):
            rows = self._users[begin : begin + _USERS_AT_ONCE]
            found.append(
                rank_items(
                    scorer(rows),
                    len(rows),
                    num_items,
                    device=self._items.device,
                    seen=self._seen(rows) if self._mask_seen else None,
                    budget_bytes=self._budget_bytes,
                )
            )
        return np.concatenate(found)

    def lists(self, model: SequenceModel) -> IntArray:
        """Ranked lists of all evaluated users by a model in evaluation mode."""
        weight, bias = model.output_weight.detach(), model.output_bias

        def scorer(users: IntArray) -> Scorer:
            states = encode_users(model, self._sequences, users, weight.shape[1])
            return inner_products(states, weight, None if bias is None else bias.detach())

        return self.rank(scorer, len(weight))

    def evaluate(self, model: SequenceModel, *, step: int, epoch: int) -> list[EvaluationRecord]:
        """All metrics at all cut-offs.

        Parameters
        ----------
        model : SequenceModel
            In evaluation mode.
        step, epoch : int
            When in training this is.
        """
        with torch.inference_mode():
            lists = self.lists(model)
        return self.records(lists, step=step, epoch=epoch)

    def records(self, lists: IntArray, *, step: int, epoch: int) -> list[EvaluationRecord]:
        """Metrics of given lists, as `evaluate` reports them.

        Parameters
        ----------
        lists : ndarray, shape (num_users, K), int64
            Recommended items, best first, -1 past the end.
        step, epoch : int
            When in training this is.
        """
        targets = self._held_out.targets[self._users]
        seed = derive(_SAMPLE_SEED, "bootstrap")
        found = single_target_metrics(lists, targets, self._frame, seed=seed)
        return [
            EvaluationRecord(
                step=step,
                epoch=epoch,
                split=self._split,
                metric=metric,
                k=k,
                value=_finite(found[metric, k].value),
                standard_error=_finite(found[metric, k].standard_error),
                num_users=len(targets),
            )
            for metric in METRICS
            for (name, k) in found
            if name == metric
        ]

    def _seen(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Pairs of row and item that the users have had, over their whole histories."""
        starts, ends = self._held_out.starts[rows], self._held_out.ends[rows]
        lengths = ends - starts
        if not lengths.sum():
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        total = np.cumsum(lengths)
        index = np.arange(total[-1]) + np.repeat(starts - (total - lengths), lengths)
        items = self._items[torch.from_numpy(index).to(self._items.device)].cpu().numpy()
        return np.repeat(np.arange(len(rows)), lengths), items.astype(np.int64)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
