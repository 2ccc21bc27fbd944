"""Negatives: how the sampled losses draw the items that a target competes with."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kernels.alias import AliasTable

Sampler = Literal["uniform", "popularity", "log_uniform", "in_batch"]
Hits = Literal["exclude", "mask", "keep"]
LogQ = bool | Literal["refined", "classic"]
_SAMPLERS = ("uniform", "popularity", "log_uniform", "in_batch")


@dataclass(frozen=True, eq=False)
class Negatives:
    """How many negatives each token gets, from which distribution, shared how widely.

    Nothing of size (tokens, negatives) is kept: ids are functions of the seed and are drawn again
    in the backward pass.

    Raises
    ------
    ValueError
        A value out of range or a combination without meaning; the text names the argument.

    References
    ----------
    .. [1] Khrylchenko et al., "Correcting the LogQ Correction: Revisiting Sampled Softmax for
       Large-Scale Retrieval", RecSys 2025, arXiv 2507.09331.
    .. [2] Yi et al., "Sampling-bias-corrected neural modeling for large corpus item
       recommendations", RecSys 2019.

    Examples
    --------
    >>> Negatives(256, share=128, seed=7).num
    256
    """

    num: int
    """Negatives per set (ns)."""
    _: KW_ONLY
    sampler: Sampler | AliasTable | Tensor = "uniform"
    """`uniform`; `popularity` (with `item_counts`) or an `AliasTable`; `log_uniform` over ranks;
    `in_batch` (targets of the batch); or ids, int64 of shape (num_sets, num), drawn elsewhere."""
    share: int | Literal["batch"] = 1
    """Consecutive tokens that share one set of negatives: 1, a block length, or `batch`."""
    stratified: bool = False
    """Draw the k-th uniform negative from the k-th of `num` equal strata of the catalog."""
    logq: LogQ = True
    """Subtract from each negative's logit the log of its expected count, so that the partition
    function is estimated without bias. `refined` conditions the counts on the negative not being
    the positive [1]_; `classic` corrects the positive as well [2]_; False corrects nothing."""
    hits: Hits = "exclude"
    """A negative equal to the token's target is never drawn, or is masked, or kept.

    `exclude` draws from the distribution without the target: exactly for uniform draws per token;
    elsewhere what hits is dropped and the rest is corrected as draws of that distribution, which
    is what `logq="refined"` means. `mask` drops it and corrects by the unconditional counts."""
    seed: int | Tensor | None = None
    """64-bit key of the draws; None takes one from torch's generator at every call. Derive it from
    step and rank, and never use one twice: equal seeds draw equal negatives."""
    item_counts: Tensor | None = None
    """Shape (num_items,): weights of the `popularity` sampler, made into an alias table once."""
    ranking: Tensor | None = None
    """Shape (num_items,), int64: item at each popularity rank, for `log_uniform`; None takes item
    ids for ranks."""
    log_q: Tensor | None = None
    """Shape (num_items,), float32: log probability of each item, for ids drawn elsewhere."""

    def __post_init__(self) -> None:
        if type(self.num) is not int or self.num < 1:
            raise ValueError(f"num={self.num!r} must be an integer of 1 or more")
        if self.share != "batch" and (type(self.share) is not int or self.share < 1):
            raise ValueError(f"share={self.share!r} must be 1, a block length, or 'batch'")
        if self.hits not in ("exclude", "mask", "keep"):
            raise ValueError(f"hits={self.hits!r} must be 'exclude', 'mask' or 'keep'")
        if self.logq not in (True, False, "refined", "classic"):
            raise ValueError(f"logq={self.logq!r} must be True, False, 'refined' or 'classic'")
        self._check_sampler()
        if self.sampler == "popularity":
            assert self.item_counts is not None
            object.__setattr__(self, "sampler", AliasTable.from_counts(self.item_counts))
            object.__setattr__(self, "item_counts", None)

    def with_seed(self, seed: int | Tensor) -> Self:
        """Copy that draws from another key; tables are shared, not rebuilt."""
        return dataclasses.replace(self, seed=seed)

    def _check_sampler(self) -> None:
        sampler = self.sampler
        if isinstance(sampler, Tensor):
            if sampler.dim() != 2 or sampler.shape[1] != self.num:
                raise ValueError(
                    f"sampler holds ids of shape {tuple(sampler.shape)}; give (num_sets, num) "
                    f"with num={self.num}"
                )
            if sampler.dtype != torch.int64:
                raise ValueError(f"sampler holds ids of dtype {sampler.dtype}; give torch.int64")
            if self.logq is not False and self.log_q is None:
                raise ValueError(
                    "log_q is missing: ids drawn elsewhere carry no probabilities; give log_q of "
                    "shape (num_items,), or logq=False"
                )
        elif not isinstance(sampler, AliasTable) and sampler not in _SAMPLERS:
            raise ValueError(
                f"sampler={sampler!r} must be one of {', '.join(_SAMPLERS)}, an AliasTable or ids"
            )
        if sampler == "popularity" and self.item_counts is None:
            raise ValueError(
                "item_counts is missing: sampler='popularity' needs one weight per item"
            )
        if self.stratified and sampler != "uniform":
            raise ValueError(f"stratified=True needs sampler='uniform', not {self._name()!r}")
        for name, needed in (("ranking", "log_uniform"), ("item_counts", "popularity")):
            if getattr(self, name) is not None and sampler != needed:
                raise ValueError(
                    f"{name} has no effect with sampler {self._name()!r}; it needs {needed!r}"
                )

    def _name(self) -> str:
        if isinstance(self.sampler, Tensor):
            return "ids"
        return "popularity" if isinstance(self.sampler, AliasTable) else self.sampler
