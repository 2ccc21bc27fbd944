"""A seeded generator of interactions with the structure that sequential recommenders live on.

Items belong to clusters of Zipf-distributed popularity; inside a cluster they have an order, as the
parts of a series have. A user follows a few clusters at a time and mostly moves on from where he
stood in the cluster he turns to, so the next item depends on the last visit to that cluster and not
only on the last item. New items are released over time and are sought after, tastes change, and
some events are exploration.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from db.errors import DataError
from trainer.data.interactions import Chunk, Interactions, ReadReport

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 22
"""Expected rows generated at a time; part of the recipe, since each block has its own stream."""

START_TIME = 1_577_836_800
"""First possible time: 2020-01-01 UTC, in seconds."""


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """The recipe of generated interactions; the same options give the same rows."""

    num_users: int = 3000
    """Users; each has at least three events."""
    num_items: int = 5000
    """Items that may be drawn; rare ones may never be."""
    interactions_per_user: float = 30.0
    """Mean events per user; lengths are log-normal."""
    length_sigma: float = 0.9
    """Standard deviation of the log of the length."""
    num_clusters: int | None = None
    """Clusters of items; None takes the square root of `num_items`."""
    zipf_exponent: float = 1.0
    """Popularity of clusters, and of items within a cluster, falls as rank to this power."""
    tastes_per_user: int = 3
    """Clusters that a user follows at a time."""
    follow_probability: float = 0.7
    """Probability that an event moves on from the user's last item in the cluster."""
    explore_probability: float = 0.1
    """Probability that an event is in a random cluster, by popularity."""
    change_probability: float = 0.02
    """Probability that a user gives up one of the clusters for another after an event."""
    drift: float = 0.3
    """Share of each cluster's items that are released after the start, in order of position."""
    days: float = 1000.0
    """Length of the recorded period in days."""
    seed: int = 42
    """Seed of everything random."""


def generate(
    num_users: int = 3000,
    num_items: int = 5000,
    interactions_per_user: float = 30.0,
    *,
    seed: int = 42,
    **options: Any,
) -> Interactions:
    """All interactions of a recipe, in memory.

    Parameters
    ----------
    num_users, num_items : int
        Users, and items that may be drawn.
    interactions_per_user : float
        Mean events per user.
    seed : int
        Seed of everything random.
    **options
        Other fields of `GeneratorOptions`.

    Raises
    ------
    DataError
        An option outside its range.

    Examples
    --------
    >>> events = generate(100, 200, 20, seed=1)
    >>> len(np.unique(events.users))
    100
    """
    recipe = GeneratorOptions(
        num_users=num_users,
        num_items=num_items,
        interactions_per_user=interactions_per_user,
        seed=seed,
        **options,
    )
    blocks = list(generate_blocks(recipe))
    return Interactions(
        np.concatenate([block.users for block in blocks]),
        np.concatenate([block.items for block in blocks]),
        np.concatenate([block.timestamps for block in blocks]),
    )


def generate_blocks(options: GeneratorOptions) -> Iterator[Interactions]:
    """The same interactions some users at a time, so that memory stays bounded.

    Parameters
    ----------
    options : GeneratorOptions
        The recipe.

    Yields
    ------
    Interactions
        All events of some consecutive users, user by user, oldest first.

    Raises
    ------
    DataError
        An option outside its range.
    """
    _check(options)
    catalog_seed, *block_seeds = np.random.SeedSequence(options.seed).spawn(
        1 + math.ceil(options.num_users / _block_users(options))
    )
    catalog = _Catalog.build(options, np.random.default_rng(catalog_seed))
    first = 0
    for block_seed in block_seeds:
        count = min(_block_users(options), options.num_users - first)
        yield _generate_users(first, count, options, catalog, np.random.default_rng(block_seed))
        first += count


@dataclass(frozen=True)
class GeneratedSource:
    """A recipe as a source of `prepare`, generated block by block."""

    options: GeneratorOptions
    """The recipe."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `dataset.json` records: the recipe."""
        return {"source": "generated", **dataclasses.asdict(self.options)}

    def chunks(self) -> tuple[Iterator[Chunk], ReadReport]:
        """Rows in order, and the report that fills while they are generated."""
        report = ReadReport(time_unit="s")
        return self._iterate(report), report

    def _iterate(self, report: ReadReport) -> Iterator[Chunk]:
        for block in generate_blocks(self.options):
            report.num_raw_rows += len(block)
            report.num_selected_rows += len(block)
            yield Chunk(pa.array(block.users), pa.array(block.items), block.timestamps)


@dataclass(frozen=True)
class _Catalog:
    """Clusters in order of popularity; the items of a cluster in order of release."""

    starts: IntArray
    sizes: IntArray
    item_ids: IntArray

    @classmethod
    def build(cls, options: GeneratorOptions, rng: np.random.Generator) -> "_Catalog":
        count = options.num_clusters or max(1, round(math.sqrt(options.num_items)))
        # Popular clusters are also larger, but less than in proportion.
        weights = np.arange(1, count + 1) ** (-0.5 * options.zipf_exponent)
        bounds = np.round(np.cumsum(weights) / weights.sum() * (options.num_items - count))
        ends = bounds.astype(np.int64) + np.arange(1, count + 1)
        starts = np.concatenate([[0], ends[:-1]])
        # Ids are shuffled, so that they say nothing about cluster or popularity.
        return cls(starts, ends - starts, rng.permutation(options.num_items).astype(np.int64))

    def released(self, clusters: IntArray, moments: FloatArray, drift: float) -> IntArray:
        """Items of each cluster that are out at a moment between 0 and 1; at least one."""
        share = 1 - drift + drift * moments
        return np.maximum(1, (self.sizes[clusters] * share).astype(np.int64))


def _generate_users(
    first: int,
    count: int,
    options: GeneratorOptions,
    catalog: _Catalog,
    rng: np.random.Generator,
) -> Interactions:
    """Events of `count` users, one step of all users that still have one at a time."""
    sigma = options.length_sigma
    mu = math.log(options.interactions_per_user) - sigma**2 / 2
    drawn = np.round(rng.lognormal(mu, sigma, count))
    drawn = np.clip(drawn, 3, 40 * options.interactions_per_user + 3)
    # Longest first: those that still have an event are then always a prefix.
    lengths: IntArray = np.sort(drawn)[::-1].astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    items = np.empty(ends[-1], dtype=np.int64)
    moments = np.empty(ends[-1], dtype=np.float64)

    joined = rng.random(count) ** 0.7 * 0.95
    stay = (1 - joined) * rng.random(count) ** 0.5
    state = _UserState.draw(count, options, catalog, rng)
    active = count
    for step in range(int(lengths[0])):
        while lengths[active - 1] <= step:
            active -= 1
        now = joined[:active] + stay[:active] * (step + rng.random(active)) / lengths[:active]
        moments[starts[:active] + step] = now
        items[starts[:active] + step] = state.advance(now, options, catalog, rng)
    # A random order of the users: their numbers shall not tell their lengths.
    names = first + rng.permutation(count)
    seconds = (moments * options.days * 86_400).astype(np.int64)
    return Interactions(np.repeat(names, lengths), catalog.item_ids[items], START_TIME + seconds)


@dataclass
class _UserState:
    """The clusters each user follows, how much, and his place in each."""

    clusters: IntArray
    weights: FloatArray
    places: IntArray

    @classmethod
    def draw(
        cls, count: int, options: GeneratorOptions, catalog: _Catalog, rng: np.random.Generator
    ) -> "_UserState":
        shape = (count, options.tastes_per_user)
        sizes = np.full(shape, len(catalog.sizes), dtype=np.int64)
        weights = np.cumsum(rng.dirichlet(np.full(shape[1], 2.0), count), axis=1)
        return cls(
            clusters=_zipf(sizes, options.zipf_exponent, rng),
            weights=weights,
            places=np.full(shape, -1, dtype=np.int64),
        )

    def advance(
        self,
        now: FloatArray,
        options: GeneratorOptions,
        catalog: _Catalog,
        rng: np.random.Generator,
    ) -> IntArray:
        """Next item, by place in the catalog, of the first `len(now)` users."""
        active = len(now)
        users = np.arange(active)
        everything = np.full(active, len(catalog.sizes), dtype=np.int64)
        draw = rng.random(active)[:, None]
        taste = np.minimum((self.weights[:active] < draw).sum(axis=1), self.weights.shape[1] - 1)
        explores = rng.random(active) < options.explore_probability
        changes = rng.random(active) < options.change_probability
        other = _zipf(everything, options.zipf_exponent, rng)
        self.places[users[changes], taste[changes]] = -1
        self.clusters[users[changes], taste[changes]] = other[changes]

        cluster = np.where(explores, other, self.clusters[users, taste])
        released = catalog.released(cluster, now, options.drift)
        fresh = _zipf(released, options.zipf_exponent, rng)
        # Half of the fresh starts go to what is new, the others to what was always popular.
        is_new = rng.random(active) < 0.5 * (options.drift > 0)
        fresh = np.where(is_new, released - 1 - fresh, fresh)
        place = self.places[users, taste]
        follows = ~explores & (place >= 0) & (rng.random(active) < options.follow_probability)
        ahead = place + 1 + (rng.random(active) < 0.25)
        follows &= ahead < released
        place = np.where(follows, ahead, fresh)
        self.places[users[~explores], taste[~explores]] = place[~explores]
        return catalog.starts[cluster] + place


def _zipf(sizes: IntArray, exponent: float, rng: np.random.Generator) -> IntArray:
    """Ranks from 0 below `sizes`, falling as (rank + 1) to the power -exponent (continuous)."""
    uniform = rng.random(sizes.shape)
    top = sizes + 1.0
    if abs(exponent - 1) < 1e-9:
        value = np.exp(uniform * np.log(top))
    else:
        power = 1 - exponent
        value = (1 + uniform * (top**power - 1)) ** (1 / power)
    ranks: IntArray = np.minimum(value.astype(np.int64) - 1, sizes - 1)
    return ranks


def _block_users(options: GeneratorOptions) -> int:
    return max(1, int(BLOCK_ROWS / options.interactions_per_user))


def _check(options: GeneratorOptions) -> None:
    for name in ("num_users", "num_items", "tastes_per_user"):
        if getattr(options, name) < 1:
            raise DataError(f"{name}={getattr(options, name)} is below 1; give a positive number")
    clusters = options.num_clusters
    if clusters is not None and not 1 <= clusters <= options.num_items:
        raise DataError(
            f"num_clusters={clusters} is not between 1 and num_items={options.num_items}"
        )
    if not 3 <= options.interactions_per_user < math.inf:
        raise DataError(
            f"interactions_per_user={options.interactions_per_user} is below 3, the least that "
            "training, validation and test need; raise it"
        )
    for name in ("follow_probability", "explore_probability", "change_probability", "drift"):
        if not 0 <= getattr(options, name) <= 1:
            raise DataError(f"{name}={getattr(options, name)} is not between 0 and 1")
    for name in ("zipf_exponent", "length_sigma", "days"):
        if not 0 < getattr(options, name) < math.inf:
            raise DataError(f"{name}={getattr(options, name)} is not a positive number")
