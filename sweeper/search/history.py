"""What the run database knows, as observations that a search or an advice can use."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db import query
from db.errors import SearchError
from db.measures import MEASURES
from db.schema import SPEC_COLUMNS, spec_from_values
from db.spec import RunSpec, RunStatus, suggestion
from sweeper.memory_model import Shape
from sweeper.search.space import Observation

_MEASURES = tuple(MEASURES)


@dataclass(frozen=True)
class KnownRun:
    """A run of the database, and where its figures were measured."""

    run_key: str
    observation: Observation
    device_class: str | None
    memory_source: str | None
    fingerprint: str = ""
    """Of the dataset it trained on."""


@dataclass(frozen=True)
class History:
    """All runs of a database, by dataset.

    Attributes
    ----------
    runs : dict of str to list of KnownRun
        In the order in which they entered the database.
    shapes : dict of str to Shape
        Sizes of the datasets that record them.
    """

    runs: Mapping[str, Sequence[KnownRun]]
    shapes: Mapping[str, Shape]

    def only(self, dataset: str) -> "History":
        """Runs of one dataset."""
        return History({dataset: self.runs[dataset]}, self.shapes)

    def on_device(self, device_class: str | None) -> "History":
        """Only runs of one device class, and those without any; None keeps the commonest.

        Memory and time are never compared across device classes.

        Raises
        ------
        SearchError
            No run of that device class.
        """
        counts: dict[str, int] = {}
        for run in (run for runs in self.runs.values() for run in runs):
            if run.device_class is not None:
                counts[run.device_class] = counts.get(run.device_class, 0) + 1
        if device_class is None:
            device_class = max(counts, key=lambda name: counts[name], default=None)
        elif device_class not in counts:
            raise SearchError(
                f"no run on device {device_class!r}{suggestion(device_class, counts)}"
            )
        kept = {
            dataset: [r for r in runs if r.device_class in (None, device_class)]
            for dataset, runs in self.runs.items()
        }
        return History(kept, self.shapes)

    def observations(self, dataset: str) -> list[Observation]:
        """Observations on one dataset, repeats of a specification averaged."""
        by_spec: dict[RunSpec, list[Observation]] = {}
        for run in self.runs.get(dataset, ()):
            by_spec.setdefault(run.observation.spec, []).append(run.observation)
        return [_merged(repeats) for repeats in by_spec.values()]

    def device_classes(self) -> list[str]:
        """Device classes with at least one run."""
        found = {r.device_class for runs in self.runs.values() for r in runs}
        return sorted(name for name in found if name is not None)


def read_history(url: str) -> History:
    """Read every run of a database.

    Parameters
    ----------
    url : str
        Run database.

    Raises
    ------
    StoreError
        The database cannot be read.
    """
    spec_columns = ", ".join(f"r.{name}" for name in SPEC_COLUMNS)
    measures = ", ".join(f"s.{name}" for name in _MEASURES)
    rows = query.rows(
        url,
        f"select r.run_key, r.replicate, coalesce(s.status, r.status) as found_status, "
        f"{spec_columns}, {measures}, s.memory_bound_bytes, s.device_class, s.memory_source, "
        "d.fingerprint from runs r join datasets d on d.id = r.dataset_id "
        "left join run_summary s on s.run_id = r.id order by r.id, s.device_class",
    )
    runs: dict[str, list[KnownRun]] = {}
    for row in rows:
        runs.setdefault(row["dataset"], []).append(_known_run(row))
    shapes = {}
    for row in query.rows(url, "select * from datasets order by id"):
        shape = _shape(row)
        if shape is not None:
            shapes[row["name"]] = shape
    return History(runs, shapes)


def _known_run(row: Mapping[str, Any]) -> KnownRun:
    observation = Observation(
        spec_from_values(row),
        RunStatus(row["found_status"]),
        {name: row[name] for name in _MEASURES if row[name] is not None},
        row["memory_bound_bytes"],
    )
    return KnownRun(
        row["run_key"], observation, row["device_class"], row["memory_source"], row["fingerprint"]
    )


def _shape(row: Mapping[str, Any]) -> Shape | None:
    """Sizes from what was recorded: length quantiles of a prepared dataset, else the mean."""
    if not row["num_items"]:
        return None
    lengths = json.loads(row["details"] or "{}").get("train_sequence_length")
    if lengths and lengths.get("quantiles"):
        return Shape.from_quantiles(row["num_items"], lengths["quantiles"])
    if not row["num_interactions"] or not row["num_users"]:
        return None
    return Shape(row["num_items"], row["num_interactions"] / row["num_users"])


def _merged(repeats: Sequence[Observation]) -> Observation:
    """Means over the repeats that are done; the first one if none is."""
    done = [r for r in repeats if r.status is RunStatus.DONE]
    if len(done) < 2:
        return done[0] if done else repeats[0]
    names = dict.fromkeys(name for r in done for name in r.values)
    values: dict[str, float | None] = {}
    for name in names:
        found = [v for v in (r.value(name) for r in done) if v is not None]
        values[name] = sum(found) / len(found) if found else None
    return Observation(done[0].spec, RunStatus.DONE, values)
