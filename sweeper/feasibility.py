"""Which points can be run at all: against the data, the machines and what ran out of memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from db.errors import LaunchError, SpecError
from db.spec import FULL_LOSSES, RunSpec, field_types
from sweeper.grid import Resources


@dataclass(frozen=True)
class CatalogSize:
    """Item counts of a prepared dataset."""

    name: str
    num_items: int
    """Catalog V, over which softmax and ranking run."""


def check_negatives(points: Iterable[RunSpec], catalogs: Mapping[str, CatalogSize]) -> None:
    """Refuse more negatives than a dataset has items, before anything is started.

    Parameters
    ----------
    points : iterable of RunSpec
        Points of a grid.
    catalogs : mapping
        Item counts by dataset name.

    Raises
    ------
    SpecError
        `num_negatives` is not below the catalog of its dataset.
    """
    for spec in points:
        catalog = catalogs[spec.dataset]
        if spec.num_negatives is not None and spec.num_negatives >= catalog.num_items:
            raise SpecError(
                f"num_negatives={spec.num_negatives} exceeds the {catalog.num_items:,} items of "
                f"{spec.dataset!r}; lower it or use null for the full softmax"
            )


def check_resources(
    resources: Resources, *, cpus: float, gpus: float, where: str = "this machine"
) -> None:
    """Refuse resources that no machine has; Ray would wait for them for ever.

    Parameters
    ----------
    resources : Resources
        What one run asks for.
    cpus, gpus : float
        What the largest node has.
    where : str
        Name of the place in messages.

    Raises
    ------
    LaunchError
        More CPUs or GPUs are asked for than there are.
    """
    if resources.gpus and resources.gpus > gpus:
        remedy = "set 'gpus: 0' to train on CPUs" if gpus == 0 else f"ask for {gpus:g} at most"
        raise LaunchError(
            f"each run asks for gpus={resources.gpus:g} but {where} has {gpus:g} GPUs; {remedy}"
        )
    if resources.cpus > cpus:
        raise LaunchError(
            f"each run asks for cpus={resources.cpus:g} but {where} has {cpus:g}; "
            "lower 'cpus' in the grid's resources or --cpus-per-run"
        )


def dominates(larger: RunSpec, smaller: RunSpec) -> bool:
    """Whether a run needs at least the memory of another: same kind, every size as large.

    Same dataset, model, loss and everything else that shapes memory; batch size, sequence length
    and negatives all at least as large. A null `num_negatives` is the whole catalog.
    """
    return (
        at_least(larger, smaller)
        and larger != smaller
        and shape_of_memory(larger) == shape_of_memory(smaller)
    )


def at_least(larger: RunSpec, smaller: RunSpec) -> bool:
    """Whether every size of a run is at least that of another of the same `shape_of_memory`."""
    return (
        larger.batch_size >= smaller.batch_size
        and larger.max_seq_len >= smaller.max_seq_len
        and _negatives(larger) >= _negatives(smaller)
    )


def _negatives(spec: RunSpec) -> float:
    if spec.loss in FULL_LOSSES or spec.num_negatives is None:
        return float("inf")
    return spec.num_negatives


_SIZES = {"batch_size", "max_seq_len", "num_negatives"}
_NO_MEMORY = {
    "seed",
    "learning_rate",
    "max_epochs",
    "patience",
    "evaluate_every_steps",
    "max_validation_users",
    "mask_seen",
    "metric_frame",
    "gbce_t",
    "logq_correction",
    "mask_probability",
}
"""Fields that no training step's memory depends on."""
_KIND = tuple(name for name in field_types() if name not in _SIZES | _NO_MEMORY)


def same_sizes(one: RunSpec, other: RunSpec) -> bool:
    """Whether two runs of the same `shape_of_memory` have the same sizes too."""
    return all(getattr(one, name) == getattr(other, name) for name in _SIZES)


def shape_of_memory(spec: RunSpec) -> tuple[object, ...]:
    """Everything but the three sizes that memory depends on; runs compare within one only."""
    return tuple(getattr(spec, name) for name in _KIND)


def dominated(
    pending: Sequence[tuple[str, RunSpec]], infeasible: Sequence[tuple[str, RunSpec]]
) -> dict[str, str]:
    """Pending runs that cannot fit because a smaller one did not.

    Parameters
    ----------
    pending : sequence of (str, RunSpec)
        Keys and specifications of runs not yet tried.
    infeasible : sequence of (str, RunSpec)
        Runs whose out of memory was confirmed on a whole device of the class at hand.

    Returns
    -------
    dict of str to str
        Key of each dominated run -> key of the run that proves it.
    """
    by_kind: dict[tuple[object, ...], list[tuple[str, RunSpec]]] = {}
    for key, spec in infeasible:
        by_kind.setdefault(shape_of_memory(spec), []).append((key, spec))
    found: dict[str, str] = {}
    if not by_kind:
        return found
    for key, spec in pending:
        for proof_key, proof in by_kind.get(shape_of_memory(spec), ()):
            if dominates(spec, proof):
                found[key] = proof_key
                break
    return found
