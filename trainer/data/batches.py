"""Training and evaluation batches without padding, gathered from flat item arrays."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from db.errors import DataError
from trainer.seeds import derive

IntArray = npt.NDArray[np.int64]


class Spans(Protocol):
    """Users as slices of one flat item array, as `trainer.data.dataset.SequenceSet` holds them."""

    @property
    def starts(self) -> IntArray:
        """First position of each user, shape (num_users,)."""

    @property
    def ends(self) -> IntArray:
        """One past the last position of each user, shape (num_users,)."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences of a batch laid end to end, shortest first, with no padded position between them.

    Attributes
    ----------
    items : Tensor, shape (T,), int64
        Input items of all sequences.
    positions : Tensor, shape (T,), int64
        Place of each token in the window; the last one of a sequence is `max_seq_len - 1`.
    targets : Tensor, shape (T,), int64
        The item that follows each token; empty in batches for evaluation.
    lengths : ndarray, shape (S,), int64
        Tokens of each sequence, ascending, all above 0; on the host.
    first_items : Tensor, shape (F,), int64
        First items of the sequences that do not fill the window: a padded model predicts each
        from a padded input.
    users : ndarray, shape (B,), int64
        Row of each user in the set that was batched, in the order of the sequences. The
        `B - S` users without an input token come first.
    max_seq_len : int
        Length of the window.
    """

    items: Tensor
    positions: Tensor
    targets: Tensor
    lengths: IntArray
    first_items: Tensor
    users: IntArray
    max_seq_len: int

    @property
    def num_tokens(self) -> int:
        """Input tokens T."""
        return self.items.shape[0]

    @property
    def num_padded(self) -> int:
        """Positions of the padded window without any label."""
        return len(self.users) * self.max_seq_len - self.num_tokens - self.first_items.shape[0]

    def last_tokens(self) -> Tensor:
        """Index of the last token of each sequence, shape (S,), int64."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1).to(self.items.device)


def item_tensor(items: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """Flat items as a tensor; on a CPU it shares the memory of the (mapped) array.

    Parameters
    ----------
    items : ndarray, shape (rows,), int32
        Items of all users, one after the other; may be a read-only memory map.
    device : torch.device
        Where batches are gathered.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(items).to(device)


class PackedSequences:
    """Gathers batches of users from a flat item array.

    Parameters
    ----------
    items : Tensor, shape (rows,), int32
        See `item_tensor`; batches are made on its device.
    spans : Spans
        Users as slices of `items`, oldest item first.
    max_seq_len : int
        Most input items kept of a user.
    next_items : bool
        Whether the last item of a user serves as target only (next-item training) or every
        kept item is an input (evaluation, masked training).
    """

    def __init__(self, items: Tensor, spans: Spans, *, max_seq_len: int, next_items: bool) -> None:
        self._items = items
        self._max_seq_len = max_seq_len
        self._next_items = next_items
        starts = np.asarray(spans.starts, dtype=np.int64)
        ends = np.asarray(spans.ends, dtype=np.int64)
        kept = np.minimum(ends - starts, max_seq_len + int(next_items))
        self._starts = ends - kept
        self._lengths: IntArray = np.maximum(kept - int(next_items), 0)
        self._has_first = (kept > 0) & (kept <= max_seq_len)
        self._host = items.numpy() if items.device.type == "cpu" else None
        self._count: IntArray = np.arange(0)

    @property
    def lengths(self) -> IntArray:
        """Input tokens of each user, shape (num_users,)."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def batch(self, users: IntArray) -> PackedBatch:
        """Pack the sequences of some users.

        Parameters
        ----------
        users : ndarray, shape (B,), int64
            Rows of the set.
        """
        lengths = self._lengths[users]
        order = lengths.argsort(kind="stable")
        users, lengths = users[order], lengths[order]
        starts = self._starts[users]
        firsts = starts[self._has_first[users]] if self._next_items else users[:0]
        empty = int(lengths.searchsorted(0, side="right"))
        starts, lengths = starts[empty:], lengths[empty:]
        gather = self._gather if self._host is None else self._gather_on_host
        items, positions, targets, first_items = gather(starts, lengths, firsts)
        return PackedBatch(
            items=items,
            positions=positions,
            targets=targets,
            lengths=lengths,
            first_items=first_items,
            users=users,
            max_seq_len=self._max_seq_len,
        )

    def _gather_on_host(
        self, starts: IntArray, lengths: IntArray, firsts: IntArray
    ) -> tuple[Tensor, ...]:
        """Tensors of a batch by way of NumPy, whose calls cost a fraction of torch's."""
        assert self._host is not None
        host = self._host
        ends = lengths.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        if total > len(self._count):
            self._count = np.arange(total)
        count = self._count[:total]
        index = (starts - ends + lengths).repeat(lengths)
        index += count
        positions = (self._max_seq_len - ends).repeat(lengths)
        positions += count
        # the index is in range; only `clip` gathers without a second buffer
        items = host.take(index, mode="clip").astype(np.int64)
        targets = items[:0]
        if self._next_items and total:
            # the target of a token is the next token, that of a user's last one a row further
            targets = np.empty_like(items)
            targets[:-1] = items[1:]
            targets[ends - 1] = host[starts + lengths]
        first_items = host[firsts].astype(np.int64)
        return tuple(map(torch.from_numpy, (items, positions, targets, first_items)))

    def _gather(self, starts: IntArray, lengths: IntArray, firsts: IntArray) -> tuple[Tensor, ...]:
        """Tensors of a batch, gathered on a device from one transfer of a few numbers a user."""
        ends = lengths.cumsum()
        size, total = len(ends), int(ends[-1]) if len(ends) else 0
        numbers = np.concatenate(
            [starts - ends + lengths, self._max_seq_len - ends, lengths, firsts]
        )
        moved = torch.from_numpy(numbers).to(self._items.device, non_blocking=True)
        offsets, sizes, rows = moved[: 2 * size], moved[2 * size : 3 * size], moved[3 * size :]
        spread = torch.repeat_interleave(offsets.view(2, -1), sizes, dim=1, output_size=total)
        spread += torch.arange(total, device=moved.device)
        index, positions = spread[0], spread[1]
        items, first_items = (self._items.index_select(0, i).long() for i in (index, rows))
        targets = items[:0]
        if self._next_items and total:
            targets = self._items[1:].index_select(0, index).long()
        return items, positions, targets, first_items


class TrainingBatches:
    """Random batches in which every user with a target comes once per epoch.

    Parameters
    ----------
    sequences : PackedSequences
        Training users.
    batch_size : int
        Users per batch; the last batch of an epoch may be smaller.
    min_tokens : int
        Users with fewer input tokens have nothing to learn from and are left out.
    seed : int
        Seed of the run; the order of an epoch depends on it and on the epoch's number alone.

    Raises
    ------
    DataError
        No user has `min_tokens` input tokens.
    """

    def __init__(
        self, sequences: PackedSequences, *, batch_size: int, min_tokens: int, seed: int
    ) -> None:
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._users = np.flatnonzero(sequences.lengths >= min_tokens)
        if not len(self._users):
            raise DataError(
                f"none of the {len(sequences)} training users has a target; prepare the dataset "
                "with longer sequences"
            )

    @property
    def num_users(self) -> int:
        """Users of an epoch."""
        return len(self._users)

    def __len__(self) -> int:
        return math.ceil(len(self._users) / self._batch_size)

    def epoch_users(self, number: int, first_batch: int = 0) -> Iterator[IntArray]:
        """Users of each batch of an epoch, from one batch on.

        Parameters
        ----------
        number : int
            Epoch, from 0.
        first_batch : int
            Batches to pass over, as a resumed run does.
        """
        generator = np.random.default_rng(derive(self._seed, "order", number))
        order = generator.permutation(self._users)
        for begin in range(first_batch * self._batch_size, len(order), self._batch_size):
            yield order[begin : begin + self._batch_size]

    def pack(self, users: IntArray) -> PackedBatch:
        """Batch of some users."""
        return self._sequences.batch(users)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[PackedBatch]:
        """Batches of an epoch; see `epoch_users`."""
        return map(self.pack, self.epoch_users(number, first_batch))
