"""The next round of a search, from the run database alone.

A round is asked for when the one before has finished, and it depends on nothing but finished runs
and the settings: a search that was killed asks for what it would have asked for.
"""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence

from db import query
from db.errors import SearchError
from db.spec import RunSpec
from sweeper.search.ask import Search
from sweeper.search.history import History, read_history
from sweeper.search.settings import SearchSettings
from sweeper.search.space import Observation, SearchSpace


def next_round(
    url: str,
    sweep: str,
    settings: SearchSettings,
    candidates: Mapping[str, RunSpec],
    fingerprint: str,
) -> list[str]:
    """Keys of the runs to carry out next; none when the budget or the space is used up.

    Parameters
    ----------
    url : str
        Run database, in which the sweep's own runs are final.
    sweep : str
        Name of the sweep.
    settings : SearchSettings
        Objectives, budget and sampler.
    candidates : mapping of str to RunSpec
        Every point of the grid, with its precision resolved, by run key.
    fingerprint : str
        Of the dataset that they train on.

    Raises
    ------
    SearchError
        What is asked for cannot be searched.
    """
    asked = _asked(url, sweep, set(candidates))
    candidates, most = _stage(settings, candidates, asked)
    count = settings.batch
    if most is not None:
        count = min(count, most - sum(key in candidates for key in asked))
    if count <= 0 or _is_late(url, sweep, settings):
        return []
    space = SearchSpace(tuple(candidates.values()))
    history = read_history(url)
    own, spent = _own(history, fingerprint, asked)
    if settings.device_hours is not None and spent >= settings.device_hours * 3600:
        return []
    related = {name: history.only(name).on_device(None).observations(name) for name in history.runs}
    search = Search(
        space, settings.objectives, settings.constraints, settings.sampler, settings.seed,
        related, history.shapes,
    )  # fmt: skip
    keys = {spec: key for key, spec in candidates.items()}
    return [keys[spec] for spec in search.propose(own, count)]


def _stage(
    settings: SearchSettings, candidates: Mapping[str, RunSpec], asked: Sequence[str]
) -> tuple[dict[str, RunSpec], int | None]:
    """Points that this stage chooses from, and how many it may ask for in all."""
    if settings.screen is None:
        return dict(candidates), settings.runs
    levels = sorted({spec.max_epochs for spec in candidates.values()})
    if len(levels) != 2:
        raise SearchError(
            f"'screen' needs a grid with two values of max_epochs, the short runs' and the full "
            f"ones'; this one has {', '.join(map(str, levels))}"
        )
    short, full = (
        {key: spec for key, spec in candidates.items() if spec.max_epochs == level}
        for level in levels
    )
    screened = sum(key in short for key in asked)
    if screened < min(settings.screen, len(short)):
        return short, settings.screen
    return full, settings.runs


def _asked(url: str, sweep: str, candidates: set[str]) -> list[str]:
    rows = query.rows(
        url,
        "select r.run_key from sweeps s join sweep_runs m on m.sweep_id = s.id "
        "join runs r on r.id = m.run_id where s.name = :sweep order by m.position, r.id",
        {"sweep": sweep},
    )
    return [row["run_key"] for row in rows if row["run_key"] in candidates]


def _is_late(url: str, sweep: str, settings: SearchSettings) -> bool:
    if settings.wall_hours is None:
        return False
    rows = query.rows(url, "select created_at from sweeps where name = :sweep", {"sweep": sweep})
    if not rows:
        return False
    begun = rows[0]["created_at"]
    if isinstance(begun, str):
        begun = datetime.datetime.fromisoformat(begun)
    if begun.tzinfo is None:
        begun = begun.replace(tzinfo=datetime.UTC)
    hours = (datetime.datetime.now(datetime.UTC) - begun).total_seconds() / 3600
    return bool(hours >= settings.wall_hours)


def _own(history: History, fingerprint: str, asked: list[str]) -> tuple[list[Observation], float]:
    """Runs on the dataset on the sweep's device class, and training seconds of the sweep's own.

    Runs are listed in the order in which they entered the database, the sweep's own among them.
    """
    runs = [r for found in history.runs.values() for r in found if r.fingerprint == fingerprint]
    mine = set(asked)
    classes = Counter(r.device_class for r in runs if r.run_key in mine and r.device_class)
    classes = classes or Counter(r.device_class for r in runs if r.device_class)
    device = classes.most_common(1)[0][0] if classes else None
    kept = [r for r in runs if r.device_class in (None, device)]
    spent = sum(r.observation.value("train_seconds") or 0.0 for r in kept if r.run_key in mine)
    return [r.observation for r in kept], spent
