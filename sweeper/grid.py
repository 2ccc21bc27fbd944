"""Grid files: YAML in, run specifications out, every mistake answered with file and line.

A grid is one block of fields, or several joined under `blocks`. In a block a scalar fixes a field,
a list (bare or under `product`) is an axis of the product, `zip` walks several lists side by side,
and `{when: {...}, values: ...}` gives a field values under a condition only.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from db.errors import GridError, SpecError
from db.spec import SAMPLED_LOSSES, Loss, RunSpec, field_types, paper_profile, suggestion
from sweeper.early_stopping import EarlyStopping, check_early_stopping, read_early_stopping
from sweeper.located import Located, load_located, parse_located
from sweeper.search.settings import SearchSettings, read_search

MAX_POINTS = 100_000
"""Most points of one grid; more is nearly always a slip of the pen."""
FIRST_SEED = 42
"""`seeds: N` stands for N seeds from here on."""

_FIELDS = tuple(field_types())
_BLOCK_KEYS = (*_FIELDS, "profile", "seeds", "product", "zip")
_TOP_KEYS = (
    "sweep", "description", *_BLOCK_KEYS, "blocks", "exclude", "resources", "search",
    "early_stopping",
)  # fmt: skip
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(RunSpec)}


@dataclass(frozen=True)
class Resources:
    """What one run occupies while it trains."""

    cpus: float = 1.0
    """CPU cores; the worker's threads are limited to them."""
    gpus: float | None = None
    """GPUs, a fraction shares one; None means one whole GPU where there are any, else none."""
    time_limit_seconds: float | None = None
    """A run that takes longer is stopped and ends as failed."""
    timing: Literal["exclusive", "shared"] = "exclusive"
    """Whether times are results, so that each run has a GPU to itself, or runs share GPUs."""


@dataclass(frozen=True)
class Grid:
    """A grid file, expanded."""

    name: str
    """Name of the sweep."""
    text: str
    """The file as it was read."""
    points: tuple[RunSpec, ...]
    """Distinct specifications in the order of the file; precision may still be null."""
    resources: Resources
    num_duplicates: int = 0
    """Points that stood in the grid more than once."""
    num_excluded: int = 0
    """Points that `exclude` took out."""
    num_conditional: int = 0
    """Combinations of loss and num_negatives that mean nothing and were left out."""
    notes: tuple[str, ...] = ()
    """What a user may want to look at, one line each."""
    search: SearchSettings | None = None
    """How to choose among the points instead of running them all."""
    early_stopping: EarlyStopping | None = None
    """What may cut runs short; None carries every one to its end."""


@dataclass(frozen=True)
class _Axis:
    names: tuple[str, ...]
    rows: tuple[tuple[Located, ...], ...]


@dataclass(frozen=True)
class _Case:
    name: str
    when: dict[str, tuple[Any, ...]]
    values: tuple[Located, ...]


@dataclass
class _Block:
    line: Located
    axes: list[_Axis] = field(default_factory=list)
    cases: dict[str, list[_Case]] = field(default_factory=dict)

    def names(self) -> set[str]:
        return {name for axis in self.axes for name in axis.names} | set(self.cases)

    def size(self) -> int:
        """Points before anything is left out (an upper bound where there are conditions)."""
        conditional = (max(len(case.values) for case in cases) for cases in self.cases.values())
        return math.prod([len(axis.rows) for axis in self.axes]) * math.prod(conditional)


@dataclass
class _Exclusion:
    where: Located
    fields: dict[str, tuple[Any, ...]]
    hits: int = 0


def load_grid(path: str | Path, *, max_points: int = MAX_POINTS) -> Grid:
    """Read and expand a grid file.

    Parameters
    ----------
    path : str or Path
        YAML file.
    max_points : int
        Refuse a grid that could have more points.

    Returns
    -------
    Grid
        The distinct points and what was left out.

    Raises
    ------
    GridError
        Anything in the file that cannot be carried out; the text begins with file and line.
    """
    path = Path(path)
    root = load_located(path)
    return _expand(root, path.read_text(encoding="utf-8"), path.stem, max_points)


def parse_grid(text: str, name: str = "grid", *, max_points: int = MAX_POINTS) -> Grid:
    """Expand a grid given as text; `name` stands for the file in messages."""
    return _expand(parse_located(text, f"{name}.yaml"), text, name, max_points)


def _expand(root: Located, text: str, stem: str, max_points: int) -> Grid:
    top = root.mapping("a grid")
    _check_keys(top, _TOP_KEYS)
    name = _sweep_name(top, stem)
    shared = _read_block(root, {k: v for k, v in top.items() if k in _BLOCK_KEYS})
    blocks = [shared]
    if "blocks" in top:
        blocks = []
        for item in top["blocks"].items("blocks"):
            own = item.mapping("a block")
            _check_keys(own, _BLOCK_KEYS)
            blocks.append(_join(shared, _read_block(item, own)))
    exclusions = _read_exclusions(top)
    size = sum(block.size() for block in blocks)
    if size > max_points:
        raise root.error(
            f"the grid has {size:,} points, at most {max_points:,} are run at once; shorten a "
            "list, split the grid, or raise --max-points"
        )
    points: dict[RunSpec, None] = {}
    counts = {"duplicate": 0, "excluded": 0, "conditional": 0}
    for block in blocks:
        for spec in _block_points(block, exclusions, counts):
            counts["duplicate"] += spec in points
            points[spec] = None
    if not points:
        raise root.error(
            "the grid is empty: " + (f"exclude takes out all {counts['excluded']:,} points"
            if counts["excluded"] else "it lists no points")
        )  # fmt: skip
    notes = tuple(
        f"{item.where.source}:{item.where.line}: this exclusion matches no point"
        for item in exclusions
        if not item.hits
    )
    search = read_search(top["search"]) if "search" in top else None
    early_stopping = None
    if "early_stopping" in top:
        where = top["early_stopping"]
        early_stopping = read_early_stopping(where)
        check_early_stopping(where, early_stopping, list(points), search=search is not None)
    return Grid(
        name, text, tuple(points), _read_resources(top),
        counts["duplicate"], counts["excluded"], counts["conditional"], notes,
        search, early_stopping,
    )  # fmt: skip


def _check_keys(found: Mapping[str, Located], known: tuple[str, ...]) -> None:
    for name, value in found.items():
        if name not in known:
            raise value.error(f"unknown key {name!r}{suggestion(name, known)}")


def _sweep_name(top: Mapping[str, Located], stem: str) -> str:
    if "sweep" not in top:
        return stem
    name = top["sweep"].scalar("sweep")
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\- ]{0,99}", name):
        raise top["sweep"].error(
            f"sweep={name!r} must be a name of up to 100 letters, digits, '-', '_', '.' or spaces"
        )
    return name


def _read_block(where: Located, found: Mapping[str, Located]) -> _Block:
    block = _Block(where)
    for name, value in found.items():
        if name == "product":
            inner = value.mapping("product")
            _check_keys(inner, (*_FIELDS, "profile"))
            for inner_name, inner_value in inner.items():
                _add_field(block, inner_name, inner_value)
        elif name == "zip":
            for item in value.value if isinstance(value.value, list) else [value]:
                _add_zip(block, item)
        elif name == "seeds":
            _add_axis(block, _Axis(("seed",), _seed_rows(value)), value)
        else:
            _add_field(block, name, value)
    return block


def _add_axis(block: _Block, axis: _Axis, where: Located) -> None:
    twice = set(axis.names) & block.names()
    if twice:
        raise where.error(f"{min(twice)!r} stands twice in the same block; keep one")
    block.axes.append(axis)


def _add_field(block: _Block, name: str, value: Located) -> None:
    cases = value.value if isinstance(value.value, list) else [value]
    if cases and all(isinstance(case.value, dict) for case in cases):
        if name in block.names():
            raise value.error(f"{name!r} stands twice in the same block; keep one")
        block.cases[name] = [_read_case(name, case) for case in cases]
        return
    _add_axis(block, _Axis((name,), tuple((v,) for v in _read_values(name, value))), value)


def _read_case(name: str, case: Located) -> _Case:
    found = case.mapping(name)
    _check_keys(found, ("when", "values"))
    if set(found) != {"when", "values"}:
        raise case.error(f"a conditional {name} needs both 'when' and 'values'")
    when = _read_matches(found["when"], "when")
    if name in when:
        raise case.error(f"{name} cannot depend on itself")
    return _Case(name, when, tuple(_read_values(name, found["values"])))


def _read_values(name: str, value: Located) -> list[Located]:
    if not isinstance(value.value, list):
        value.scalar(name)
        return [value]
    if not value.value:
        raise value.error(f"{name} is an empty list; give at least one value or leave it out")
    for item in value.value:
        item.scalar(f"each value of {name}")
    return value.value


def _add_zip(block: _Block, where: Located) -> None:
    found = where.mapping("zip")
    _check_keys(found, (*_FIELDS, "profile"))
    if not found:
        raise where.error("zip is empty; give at least one list")
    columns = [_read_values(name, value) for name, value in found.items()]
    lengths = {name: len(column) for name, column in zip(found, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise where.error(f"the lists of a zip must be equally long; {text}")
    _add_axis(block, _Axis(tuple(found), tuple(zip(*columns, strict=True))), where)


def _seed_rows(value: Located) -> tuple[tuple[Located, ...], ...]:
    if isinstance(value.value, list):
        return tuple((item,) for item in _read_values("seeds", value))
    count = value.scalar("seeds")
    if type(count) is not int or not 1 <= count <= 10_000:
        raise value.error(f"seeds={count!r} must be a number of seeds from 1 to 10,000, or a list")
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    return tuple((Located(seed, value.line, value.source),) for seed in seeds)


def _join(shared: _Block, own: _Block) -> _Block:
    """Fields of a block over the shared ones; what a block names replaces the shared value."""
    names = own.names()
    joined = _Block(own.line)
    for axis in shared.axes:
        overlap = names & set(axis.names)
        if not overlap:
            joined.axes.append(axis)
        elif len(axis.names) > 1:
            raise own.line.error(
                f"{min(overlap)!r} belongs to the zip of {', '.join(axis.names)} above; name all "
                "of them in the block or none"
            )
    joined.axes += own.axes
    joined.cases = {n: c for n, c in shared.cases.items() if n not in names} | own.cases
    return joined


def _read_matches(where: Located, what: str) -> dict[str, tuple[Any, ...]]:
    found = where.mapping(what)
    _check_keys(found, (*_FIELDS, "profile"))
    if not found:
        raise where.error(f"{what} is empty; name at least one field")
    return {n: tuple(v.value for v in _read_values(n, value)) for n, value in found.items()}


def _read_exclusions(top: Mapping[str, Located]) -> list[_Exclusion]:
    if "exclude" not in top:
        return []
    items = top["exclude"].items("exclude")
    return [_Exclusion(item, _read_matches(item, "an exclusion")) for item in items]


def _read_resources(top: Mapping[str, Located]) -> Resources:
    if "resources" not in top:
        return Resources()
    found = top["resources"].mapping("resources")
    _check_keys(found, tuple(f.name for f in dataclasses.fields(Resources)))
    values: dict[str, Any] = {}
    for name, located in found.items():
        value = located.scalar(name)
        if name == "timing":
            if value not in ("exclusive", "shared"):
                raise located.error(f"timing={value!r} must be 'exclusive' or 'shared'")
            values[name] = value
            continue
        lowest = 0.0 if name == "gpus" else math.ulp(0.0)
        if type(value) not in (int, float) or not math.isfinite(value) or value < lowest:
            kind = "0 or more" if name == "gpus" else "more than 0"
            raise located.error(f"{name}={value!r} must be a number, {kind}")
        if name == "gpus" and value > 1 and value != int(value):
            raise located.error(f"gpus={value} must be a fraction up to 1 or a whole number")
        values[name] = float(value)
    return Resources(**values)


def _block_points(
    block: _Block, exclusions: list[_Exclusion], counts: dict[str, int]
) -> Iterator[RunSpec]:
    losses: dict[Any, tuple[Located, int]] = {}
    for values in _combinations(block):
        plain = {name: located.value for name, located in values.items()}
        loss = plain.get("loss", _DEFAULTS["loss"])
        where, kept = losses.get(loss, (values.get("loss", block.line), 0))
        conditional = _is_choice(block) and not _negatives_fit(loss, plain.get("num_negatives"))
        losses[loss] = (where, kept + (not conditional))
        if conditional:
            counts["conditional"] += 1
            continue
        profile = plain.pop("profile", "clean")
        if profile not in ("clean", "paper"):
            raise values["profile"].error(
                f"profile={profile!r} is unknown{suggestion(str(profile), ('clean', 'paper'))}"
            )
        if profile == "paper":
            plain = paper_profile(plain.get("model", "sasrec"), loss) | plain
        if _is_excluded(plain | {"profile": profile}, exclusions):
            counts["excluded"] += 1
            continue
        yield _make_spec(plain, values, block)
    for loss, (where, kept) in losses.items():
        if not kept:
            needs = "num_negatives >= 1" if loss in SAMPLED_LOSSES else "num_negatives: null"
            needs = "num_negatives: 1" if loss == "bce" else needs
            raise where.error(f"loss {loss!r} gets no point: it needs {needs} among the values")


def _combinations(block: _Block) -> Iterator[dict[str, Located]]:
    names = [name for axis in block.axes for name in axis.names]
    for rows in itertools.product(*(axis.rows for axis in block.axes)):
        base = dict(zip(names, itertools.chain.from_iterable(rows), strict=True))
        if not block.cases:
            yield base
            continue
        plain = _DEFAULTS | {name: located.value for name, located in base.items()}
        options = [
            [(name, value) for value in case.values]
            for name, cases in block.cases.items()
            for case in itertools.islice((c for c in cases if _matches(plain, c.when)), 1)
        ]
        for extra in itertools.product(*options):
            yield base | dict(extra)


def _matches(values: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(values.get(name) in allowed for name, allowed in wanted.items())


def _is_choice(block: _Block) -> bool:
    """Whether loss or num_negatives is a list, so that some of their pairs mean nothing."""
    return any(len(a.rows) > 1 for a in block.axes if {"loss", "num_negatives"} & set(a.names))


def _negatives_fit(loss: Any, num_negatives: Any) -> bool:
    if loss == "bce":
        return bool(num_negatives == 1)
    if loss not in get_args(Loss):
        return True  # RunSpec refuses it and names the nearest loss
    return (loss in SAMPLED_LOSSES) == (num_negatives is not None)


def _is_excluded(values: Mapping[str, Any], exclusions: list[_Exclusion]) -> bool:
    complete = _DEFAULTS | dict(values)
    hit = False
    for exclusion in exclusions:
        if _matches(complete, exclusion.fields):
            exclusion.hits += 1
            hit = True
    return hit


def _make_spec(plain: dict[str, Any], values: Mapping[str, Located], block: _Block) -> RunSpec:
    try:
        return RunSpec.from_mapping(plain)
    except SpecError as error:
        named = re.match(r"(\w+)=", str(error))
        where = values.get(named.group(1), block.line) if named else block.line
        raise GridError(f"{where.source}:{where.line}: {error}") from None
