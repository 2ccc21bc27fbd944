"""Draws of negatives in torch, and the plan that the torch and Triton paths share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.alias import AliasTable
from kernels.negatives import Negatives
from kernels.philox import MASK_32, scale_to_range, words

UNIFORM, ALIAS, LOG_UNIFORM, POOL, IDS = range(5)
"""Kinds of draw: uniform ids, alias table, log-uniform ranks, targets of the batch, given ids."""
KEEP, DROP, ZERO = range(3)
"""A hit counts as any negative; leaves the sums; stays with logit 0 (the paper's code)."""

# (2**x - 1) / x on [0, 1], highest power first, in units of 2**-31 (Chebyshev interpolation, error
# below 4e-9). Log-uniform draws are integer arithmetic throughout, so every device draws the same.
EXP2_COEFFICIENTS = (44521, 313739, 2875277, 20650546, 119194876, 515882451, 1488522236)
LOG_RANGE_BITS = 26
"""Fraction bits of log2(V + 1): 5 integer bits are left, and 32 bits of a word, in an int64."""
_MAX_ITEMS = 2**31


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """`Negatives` resolved for a batch and a catalog: plain numbers and tensors."""

    kind: int
    """One of the kinds of draw."""
    num: int
    """Negatives per set."""
    share: int
    """Consecutive tokens per set."""
    num_items: int
    """Catalog size V."""
    skip_positive: bool
    """Uniform draws over the V - 1 items other than the token's target."""
    stratified: bool
    """One draw per equal stratum."""
    hits: int
    """One of KEEP, DROP, ZERO."""
    conditional: bool
    """Correct for draws conditioned on not being the target: by counting what did not hit."""
    corrected: bool
    """Each draw's own log probability (or stratum size) is subtracted from its logit."""
    base_shift: float
    """Added to every negative's log weight."""
    seed: Tensor
    """Shape (), int64."""
    source: Tensor | None = None
    """Thresholds (alias), ranking (log-uniform), targets (pool) or ids."""
    alias: Tensor | None = None
    """Aliases."""
    log_q: Tensor | None = None
    """Log probabilities per item (alias, ids) or per pool position."""
    pool_size: Tensor | None = None
    """Shape (), int64: how many entries of the pool count; on the device, so nothing waits."""
    log_rest: Tensor | None = None
    """Shape (num_tokens,), float32: log(1 - q(target)), when conditional and not uniform."""
    log_target: Tensor | None = None
    """Shape (num_tokens,), float32: log expected count of the target (`logq="classic"`)."""

    @property
    def words_per_draw(self) -> int:
        """Random words that a draw takes."""
        return 2 if self.kind == ALIAS else 1

    @property
    def range_size(self) -> int:
        """Number of values that a uniform draw chooses from."""
        return self.num_items - 1 if self.skip_positive else self.num_items


def new_seed(device: torch.device) -> Tensor:
    """A fresh key from torch's generator of the device, shape (), int64, without waiting for it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def make_plan(
    negatives: Negatives,
    target: Tensor,
    num_items: int,
    *,
    softmax: bool = True,
    paper_compat: bool = False,
) -> SamplingPlan:
    """Resolve `negatives` for a batch.

    Parameters
    ----------
    negatives : Negatives
        What to draw.
    target : Tensor, shape (num_tokens,), int64
        Positives; negative where a token is ignored.
    num_items : int
        Catalog size.
    softmax : bool
        Whether corrections apply (they do not to binary cross-entropy).
    paper_compat : bool
        The paper's CCE-: uniform over all items, hits keep logit 0, and each negative counts
        (V - 1) / (ns + 1).

    Raises
    ------
    ValueError
        More negatives than there are other items, or tables of another size than the catalog.
    """
    device = target.device
    sampler = negatives.sampler
    num, share = negatives.num, len(target) if negatives.share == "batch" else negatives.share
    share = max(1, min(share, max(1, len(target))))
    if num_items >= _MAX_ITEMS:
        raise ValueError(f"weight has {num_items} rows; samplers draw from fewer than 2**31 items")
    if num > num_items - 1 and not isinstance(sampler, Tensor):
        raise ValueError(
            f"negatives.num={num} exceeds the {num_items - 1} items other than the target; "
            "lower it or use the full softmax"
        )
    seed = negatives.seed
    if seed is None:
        seed = new_seed(device)
    elif not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"negatives.seed={seed} does not fit into 64 bits")
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"negatives.seed has dtype {seed.dtype} and shape {tuple(seed.shape)}; give one int64"
        )
    seed = seed.reshape(()).to(device)

    common: dict[str, int | Tensor] = {
        "num": num,
        "share": share,
        "num_items": num_items,
        "seed": seed,
    }
    if paper_compat:
        return _paper_plan(negatives, target, common)
    kind, tensors = _tables(negatives, target, num_items)
    skip = kind == UNIFORM and share == 1 and negatives.hits == "exclude"
    hits = KEEP if negatives.hits == "keep" or skip else DROP
    conditional = hits == DROP and (negatives.hits == "exclude" or negatives.logq == "refined")
    corrects = softmax and negatives.logq is not False
    conditional = conditional and corrects and not negatives.stratified
    base = 0.0
    log_target = None
    if corrects and not negatives.stratified:
        range_size = num_items - 1 if skip or conditional else num_items
        base = math.log(range_size) if kind == UNIFORM else 0.0
        base -= 0.0 if conditional else math.log(num)
    log_rest = None
    safe = target.clamp(min=0)
    if corrects and kind != UNIFORM and (conditional or negatives.logq == "classic"):
        log_of_target = _log_q_of_target(kind, tensors, safe, target, num_items)
        if conditional:
            log_rest = torch.log1p(-log_of_target.exp().clamp(max=1 - 2**-24))
        if negatives.logq == "classic":
            log_target = log_of_target + math.log(num)
    elif corrects and negatives.logq == "classic":
        log_target = torch.full_like(target, math.log(num / num_items), dtype=torch.float32)
    return SamplingPlan(
        kind=kind,
        skip_positive=skip,
        stratified=negatives.stratified,
        hits=hits,
        conditional=conditional,
        corrected=corrects and (kind != UNIFORM or negatives.stratified),
        base_shift=base,
        log_rest=log_rest,
        log_target=log_target,
        **common,  # type: ignore[arg-type]
        **tensors,  # type: ignore[arg-type]
    )


def log_range(num_items: int) -> int:
    """log2(num_items + 1) in units of 2**-LOG_RANGE_BITS."""
    return round(math.log2(num_items + 1) * (1 << LOG_RANGE_BITS))


def draw(plan: SamplingPlan, sets: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Negatives of some sets.

    Parameters
    ----------
    plan : SamplingPlan
        What to draw.
    sets : Tensor, shape (num_sets,), int64
        Which sets.
    target : Tensor, shape (num_sets,), int64, optional
        Target of each set's only token; read when the plan skips positives.

    Returns
    -------
    ids : Tensor, shape (num_sets, num), int64
    log_count : Tensor, shape (num_sets, num), float32, or None
        To subtract from the logits, when the plan corrects draw by draw.
    """
    if plan.kind == IDS:
        assert plan.source is not None
        ids = plan.source[sets]
        return ids, plan.log_q[ids] if plan.corrected and plan.log_q is not None else None
    word = words(plan.seed, sets, plan.num, plan.words_per_draw)
    first = word[..., 0]
    if plan.kind == UNIFORM:
        return _draw_uniform(plan, first, target)
    assert plan.source is not None
    log_count = None
    if plan.kind == ALIAS:
        assert plan.alias is not None
        cell = scale_to_range(first, plan.num_items)
        keep = word[..., 1] < (plan.source[cell].long() & MASK_32)
        ids = torch.where(keep, cell, plan.alias[cell].long())
        if plan.corrected and plan.log_q is not None:
            log_count = plan.log_q[ids]
    elif plan.kind == POOL:
        assert plan.pool_size is not None
        cell = scale_to_range(first, plan.pool_size)
        ids = plan.source[cell]
        if plan.corrected and plan.log_q is not None:
            log_count = plan.log_q[cell]
    else:
        rank = _log_uniform_rank(first, plan.num_items)
        ids = plan.source[rank]
        if plan.corrected:
            log_count = log_uniform_log_q(rank, plan.num_items)
    return ids, log_count


def log_uniform_log_q(rank: Tensor, num_items: int) -> Tensor:
    """Log probability of a rank, log((rank + 2) / (rank + 1)) / log(V + 1), float32."""
    step = torch.log1p(1.0 / (rank.double() + 1.0))
    return torch.log(step / math.log(num_items + 1)).float()


def _draw_uniform(
    plan: SamplingPlan, word: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    log_count = None
    if plan.stratified:
        edges = torch.arange(plan.num + 1, device=word.device) * plan.range_size // plan.num
        size = edges[1:] - edges[:-1]
        ids = edges[:-1] + scale_to_range(word, size)
        if plan.corrected:
            log_count = -torch.log(size.float()).expand(word.shape)
    else:
        ids = scale_to_range(word, plan.range_size)
    if plan.skip_positive:
        assert target is not None
        ids = ids + (ids >= target.clamp(min=0)[:, None])
    return ids, log_count


def _log_uniform_rank(word: Tensor, num_items: int) -> Tensor:
    """Rank = floor(2**(u log2(V + 1))) - 1 by fixed-point arithmetic."""
    exponent = word * log_range(num_items)
    bits = LOG_RANGE_BITS + 32
    octave = exponent >> bits
    fraction = (exponent >> (bits - 31)) & 0x7FFFFFFF
    mantissa = torch.full_like(fraction, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        mantissa = (mantissa * fraction >> 31) + coefficient
    mantissa = (mantissa * fraction >> 31) + 2**31
    return ((mantissa >> (31 - octave)) - 1).clamp(0, num_items - 1)


def _tables(
    negatives: Negatives, target: Tensor, num_items: int
) -> tuple[int, dict[str, Tensor | None]]:
    """Kind of draw and the tensors it reads."""
    sampler, device = negatives.sampler, target.device
    if isinstance(sampler, AliasTable):
        _check_size("sampler (AliasTable)", sampler.num_items, num_items)
        table = sampler.to(device)
        return ALIAS, {"source": table.threshold, "alias": table.alias, "log_q": table.log_q}
    if isinstance(sampler, Tensor):
        log_q = negatives.log_q
        if log_q is not None:
            _check_size("log_q", len(log_q), num_items)
            log_q = log_q.to(device, torch.float32).contiguous()
        return IDS, {"source": sampler.to(device).contiguous(), "log_q": log_q}
    if sampler == "log_uniform":
        ranking = negatives.ranking
        if ranking is None:
            ranking = torch.arange(num_items, device=device)
        _check_size("ranking", len(ranking), num_items)
        return LOG_UNIFORM, {"source": ranking.to(device, torch.int64).contiguous()}
    if sampler == "in_batch":
        return POOL, _pool(target, num_items)
    return UNIFORM, {}


def _pool(target: Tensor, num_items: int) -> dict[str, Tensor | None]:
    """Valid targets of the batch, first, with the log frequency of each."""
    if len(target) == 0:
        target = target.new_full((1,), -1)
    valid = target >= 0
    size = valid.sum()
    pool = target[torch.argsort(valid.to(torch.int8), descending=True, stable=True)]
    pool = pool.clamp(min=0)
    log_q = _log_frequency(target, num_items)[pool]
    return {"source": pool, "log_q": log_q, "pool_size": size}


def _log_frequency(target: Tensor, num_items: int) -> Tensor:
    """Log share of each item among the valid targets, float32; finite where there is none."""
    count = torch.zeros(num_items, dtype=torch.float32, device=target.device)
    count.index_add_(0, target.clamp(min=0), (target >= 0).float())
    return torch.log(count.clamp(min=1)) - torch.log(count.sum().clamp(min=1))


def _log_q_of_target(
    kind: int, tensors: dict[str, Tensor | None], safe: Tensor, target: Tensor, num_items: int
) -> Tensor:
    """Log probability that a draw is the token's own target, float32, per token."""
    log_q, source = tensors.get("log_q"), tensors.get("source")
    if kind == LOG_UNIFORM:
        assert source is not None
        rank = torch.empty_like(source)
        rank[source] = torch.arange(num_items, device=source.device)
        return log_uniform_log_q(rank[safe], num_items)
    assert log_q is not None
    if kind != POOL:
        return log_q[safe]
    return _log_frequency(target, num_items)[safe]


def _paper_plan(
    negatives: Negatives, target: Tensor, common: dict[str, int | Tensor]
) -> SamplingPlan:
    """CCE- as the paper's code has it, on its own draws or on given ids."""
    sampler = negatives.sampler
    num_items = int(common["num_items"])
    if not isinstance(sampler, Tensor) and sampler != "uniform":
        raise ValueError("paper_compat=True draws uniformly; use sampler='uniform' or ids")
    given = isinstance(sampler, Tensor)
    return SamplingPlan(
        kind=IDS if given else UNIFORM,
        source=sampler.to(target.device).contiguous() if isinstance(sampler, Tensor) else None,
        skip_positive=False,
        stratified=False,
        hits=ZERO,
        conditional=False,
        corrected=False,
        base_shift=math.log(max(num_items - 1, 1)) - math.log(negatives.num + 1),
        **common,  # type: ignore[arg-type]
    )


def _check_size(name: str, got: int, num_items: int) -> None:
    if got != num_items:
        raise ValueError(
            f"negatives.{name} covers {got} items but weight has {num_items} rows; "
            "build it for this catalog"
        )
