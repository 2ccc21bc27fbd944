"""The `search:` block of a grid file."""

import math
import re
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from db.errors import SearchError
from db.measures import MEASURES
from db.spec import suggestion
from sweeper.located import Located
from sweeper.search.space import Constraint, Objective, combine

Sampler = Literal["srsweep", "grid", "random", "tpe", "nsga2", "gp"]
SAMPLERS: Final = get_args(Sampler)
_KEYS = (
    "objectives", "constraints", "sampler", "runs", "device_hours", "wall_hours", "batch", "seed",
    "screen",
)  # fmt: skip
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "s": 1, "min": 60,
          "h": 3600}  # fmt: skip


@dataclass(frozen=True)
class SearchSettings:
    """What a grid file asks a search for."""

    objectives: tuple[Objective, ...]
    """Measures to trade off."""
    constraints: tuple[Constraint, ...] = ()
    sampler: Sampler = "srsweep"
    """`srsweep` (ours), `grid`, `random`, or Optuna's `tpe`, `nsga2`, `gp`."""
    runs: int | None = None
    """Runs to ask for in all."""
    device_hours: float | None = None
    """Measured training hours of the sweep's runs after which nothing more is asked."""
    wall_hours: float | None = None
    """Hours since the sweep was first launched after which nothing more is asked."""
    batch: int = 1
    """Runs asked for together; the next batch waits for the last one to finish."""
    seed: int = 42
    screen: int | None = None
    """Short runs to begin with: points at the lower of the grid's two `max_epochs`. They count in
    the hours, not in `runs`, and are in the database as what they are: runs of fewer epochs."""


def read_search(where: Located) -> SearchSettings:
    """Read the block.

    Raises
    ------
    GridError
        Anything that cannot be searched; the text begins with file and line.
    """
    found = where.mapping("search")
    for name, value in found.items():
        if name not in _KEYS:
            raise value.error(f"unknown key {name!r}{suggestion(name, _KEYS)}")
    if "objectives" not in found:
        raise where.error(
            "search needs 'objectives', such as [ndcg_at_10, peak_train_memory_bytes]"
        )
    limits = {name: _number(found, name) for name in ("runs", "device_hours", "wall_hours")}
    if all(limit is None for limit in limits.values()):
        raise where.error("search needs a budget: runs, device_hours or wall_hours")
    sampler = _sampler(found["sampler"]) if "sampler" in found else "srsweep"
    listed = found["objectives"]
    items = listed.value if isinstance(listed.value, list) else [listed]
    try:
        objectives = tuple(Objective(str(item.scalar("an objective"))) for item in items)
        constraints = _constraints(found["constraints"]) if "constraints" in found else ()
    except SearchError as error:
        raise where.error(str(error)) from None
    return SearchSettings(
        objectives, constraints, sampler, _whole(found, "runs"), limits["device_hours"],
        limits["wall_hours"], _whole(found, "batch") or 1, _whole(found, "seed") or 0
        if "seed" in found else 42, _whole(found, "screen"),
    )  # fmt: skip


def _sampler(where: Located) -> Sampler:
    value = where.scalar("sampler")
    if value not in SAMPLERS:
        raise where.error(f"sampler {value!r} is unknown{suggestion(str(value), SAMPLERS)}")
    return cast(Sampler, value)


def _constraints(where: Located) -> tuple[Constraint, ...]:
    found = []
    for name, value in where.mapping("constraints").items():
        if isinstance(value.value, dict):
            ends = value.mapping(name)
            for key, end in ends.items():
                if key not in ("at_most", "at_least"):
                    raise end.error(
                        f"unknown key {key!r}{suggestion(key, ('at_most', 'at_least'))}"
                    )
            bounds = {key: _quantity(end, name) for key, end in ends.items()}
            found.append(Constraint(name, **bounds))
        else:
            bound = _quantity(value, name)
            more = name in MEASURES and MEASURES[name].maximise
            found.append(Constraint(name, at_least=bound) if more else Constraint(name, bound))
    return combine(found)


def _quantity(where: Located, name: str) -> float:
    """A number, or one with a unit such as `8GiB` or `2h`."""
    value = where.scalar(name)
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", str(value))
    if match is None or match[2] not in _UNITS:
        raise where.error(f"{name}: {value!r} is no number with a unit such as 8GiB or 2h")
    return float(match[1]) * _UNITS[match[2]]


def _number(found: dict[str, Located], name: str) -> float | None:
    if name not in found:
        return None
    value = found[name].scalar(name)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise found[name].error(f"{name}={value!r} must be a number above 0")
    return float(value)


def _whole(found: dict[str, Located], name: str) -> int | None:
    if name not in found:
        return None
    value = found[name].scalar(name)
    least = 0 if name == "seed" else 1
    if type(value) is not int or value < least:
        raise found[name].error(f"{name}={value!r} must be a whole number, {least} or more")
    return value
