"""From a source of interactions to a prepared dataset: filter, split, encode, write."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from db.errors import DataError
from trainer.data.checks import settle_ids
from trainer.data.dataset import (
    FORMAT_VERSION,
    META_FILE,
    Dataset,
    compute_fingerprint,
    load_dataset,
)
from trainer.data.interactions import IdEncoder, InteractionLog, ReadReport, Source
from trainer.data.sequences import SequencePlan, SequenceStatistics, plan_sequences, write_sequences
from trainer.data.split import (
    FilterOptions,
    Split,
    SplitOptions,
    all_rows,
    filter_counts,
    first_appearance,
    split_global_temporal,
    split_leave_one_out,
)
from trainer.data.ties import ordered_by_item

DEFAULT_MEMORY_ROWS = 1 << 25
"""Rows held in memory at once; larger inputs go through files beside the output."""

RULE_VERSIONS = {"filter": 1, "split": 1, "encoding": 1}
"""Raised when a rule changes what comes out of the same input."""

DOMINANT_USER_SHARE = 0.1
"""Share of all rows from which on a single user is worth a warning."""

Progress = Callable[[str], None]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Levels at which sequence lengths are recorded."""


def prepare(
    source: Source,
    out: str | Path,
    *,
    name: str | None = None,
    filters: FilterOptions = FilterOptions(),
    split: SplitOptions = SplitOptions(),
    validation_users: Sequence[int | str] | None = None,
    memory_rows: int = DEFAULT_MEMORY_ROWS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Read a source once, filter, split and encode it, and write memory-mapped arrays.

    The folder appears under its name only when it is complete.

    Parameters
    ----------
    source : Source
        Rows of user, item and time.
    out : str or Path
        Folder to write.
    name : str, optional
        Name of the dataset; the last part of `out` by default.
    filters : FilterOptions
        Which users and items take part.
    split : SplitOptions
        Which events train, validate and test.
    validation_users : sequence of int or str, optional
        Ids of the users to validate on, instead of a draw (global_temporal).
    memory_rows : int
        Rows held in memory at once; changes the memory that is needed, never the result.
    overwrite : bool
        Replace a folder that is there.
    progress : callable, optional
        Told in words what is being done.

    Returns
    -------
    Dataset
        What was written, opened.

    Raises
    ------
    DataError
        The input cannot be used, or the output folder is taken.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists; choose another --out or pass --overwrite")
    if target.exists() and not (target / META_FILE).exists() and any(target.iterdir()):
        raise DataError(
            f"{target} is not a prepared dataset ({META_FILE} is missing) and will not be "
            "replaced; choose another --out"
        )
    work = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        work.mkdir(parents=True)
        meta = _prepare_into(
            work, source, filters, split, validation_users, memory_rows, progress or _silent
        )
        meta = {"format_version": FORMAT_VERSION, "name": name or target.resolve().name, **meta}
        (work / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _replace_folder(work, target)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error}; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_dataset(target)


def _prepare_into(
    folder: Path,
    source: Source,
    filters: FilterOptions,
    options: SplitOptions,
    validation_users: Sequence[int | str] | None,
    memory_rows: int,
    progress: Progress,
) -> dict[str, Any]:
    users, items = IdEncoder(), IdEncoder()
    raw = InteractionLog(folder / "raw", memory_rows)
    chunks, report = source.chunks()
    for chunk in chunks:
        raw.append(users.encode(chunk.users), items.encode(chunk.items), chunk.timestamps)
        progress(f"read {report.num_raw_rows:,} rows")
    if not len(raw):
        raise DataError(f"{report.file} gave no interactions; give more data")
    user_ids = settle_ids(users.table(), report.id_type, f"{report.file}: user column")
    item_ids = settle_ids(items.table(), report.id_type, f"{report.file}: item column")
    counts: dict[str, Any] = {
        "raw_rows": report.num_raw_rows,
        "bad_rows": report.num_bad_rows,
        "selected_rows": len(raw),
        "selected_users": len(users),
        "selected_items": len(items),
    }
    progress(f"filter {len(raw):,} rows")
    log, user_rows, item_rows = _filter(raw, folder, len(users), len(items), filters, memory_rows)
    counts |= {
        "filtered_rows": len(log),
        "filtered_users": int((user_rows > 0).sum()),
        "filtered_items": int((item_rows > 0).sum()),
    }
    if options.tie_order != "row":
        progress(f"order {len(log):,} rows by item")
        if options.tie_order == "item_age":
            order = first_appearance(log, 1, len(items), all_rows)
        else:
            order = pc.sort_indices(item_ids).to_numpy().astype(np.int64)
        by_item = InteractionLog(folder / "by_item", memory_rows)
        log = ordered_by_item(log, order, by_item, memory_rows)
    progress(f"split {len(log):,} rows")
    if options.kind == "global_temporal":
        chosen = _codes_of(validation_users, user_ids)
        roles = split_global_temporal(log, len(users), len(items), options, chosen)
    else:
        roles = split_leave_one_out(log, len(users), len(items))
    plan = plan_sequences(roles, len(items))
    progress(f"sort and write {plan.num_users:,} sequences")
    statistics = write_sequences(log, plan, folder, memory_rows)
    sets = _write_arrays(folder, plan, statistics)
    _write_ids(folder / "user_ids", user_ids, roles.user_order)
    _write_ids(folder / "item_ids", item_ids, roles.item_order)
    counts |= _count_sets(plan, sets, statistics)
    _require_targets(counts, options)
    return {
        "fingerprint": compute_fingerprint(folder, counts["num_test_history_users"]),
        "counts": counts,
        "source": source.settings,
        "filter": asdict(filters),
        "split": _describe_split(options, roles),
        "time_unit": report.time_unit,
        "sequence_length": _describe_lengths(user_rows[user_rows > 0]),
        "train_sequence_length": _describe_lengths(plan.train_counts[plan.train_counts > 0]),
        **_describe_shares(counts, statistics, user_rows),
        "bad_rows": report.bad_rows,
        "warnings": _warnings(report, user_ids, user_rows, counts),
        "rule_versions": RULE_VERSIONS,
    }


def _codes_of(ids: Sequence[int | str] | None, table: Any) -> npt.NDArray[np.int64] | None:
    if ids is None:
        return None
    found = pc.index_in(pa.array(ids, type=table.type), value_set=table)
    if found.null_count:
        missing = ids[found.is_null().to_pylist().index(True)]
        raise DataError(f"validation user {missing!r} is not in the data; name users that are")
    codes: npt.NDArray[np.int64] = found.to_numpy().astype(np.int64)
    return codes


def _filter(
    raw: InteractionLog,
    folder: Path,
    num_users: int,
    num_items: int,
    options: FilterOptions,
    memory_rows: int,
) -> tuple[InteractionLog, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the users and items that pass, and their rows by user and by item."""
    keep_users, keep_items = filter_counts(raw, num_users, num_items, options)
    log = InteractionLog(folder / "filtered", memory_rows)
    user_rows, item_rows = np.zeros(num_users, np.int64), np.zeros(num_items, np.int64)
    for _, (users, items, times) in raw.blocks():
        keep = keep_users[users] & keep_items[items]
        users, items = users[keep], items[keep]
        user_rows += np.bincount(users, minlength=num_users)
        item_rows += np.bincount(items, minlength=num_items)
        log.append(users, items, times[keep])
    num_raw = len(raw)
    raw.clear()
    if not len(log):
        raise DataError(
            f"no interactions are left of {num_raw:,} rows, {num_users:,} users and {num_items:,} "
            f"items after keeping items with at least {options.min_item_count} rows and users with "
            f"at least {options.min_user_count}; lower --min-item-count or --min-user-count, "
            "or give more data"
        )
    return log, user_rows, item_rows


def _write_arrays(
    folder: Path, plan: SequencePlan, statistics: SequenceStatistics
) -> dict[str, npt.NDArray[np.int64]]:
    starts, ends = plan.offsets[:-1], plan.offsets[1:]
    trains = np.flatnonzero(plan.train_counts > 0)
    # A target without any event before it gives nothing to rank from.
    validates = np.flatnonzero(plan.validation_ends > 1)
    tests = np.flatnonzero(plan.is_test & (plan.train_counts > 0) & (ends - starts > 1))
    items = np.load(folder / "items.npy", mmap_mode="r")
    validation_targets = starts[validates] + plan.validation_ends[validates] - 1
    test_targets = ends[tests] - 1
    sets = {
        "train": np.stack([trains, starts[trains], starts[trains] + plan.train_counts[trains]]),
        "validation": np.stack(
            [validates, starts[validates], validation_targets, items[validation_targets]]
        ),
        "test": np.stack([tests, starts[tests], test_targets, items[test_targets]]),
    }
    arrays = {
        **sets,
        "offsets": plan.offsets,
        "item_counts": statistics.item_counts,
        "item_users": statistics.item_users,
        "test_history_item_users": statistics.test_history_item_users,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array, dtype=np.int64))
    return sets


def _write_ids(path: Path, table: Any, order: npt.NDArray[np.int64]) -> None:
    ids = table.take(pa.array(order))
    if pa.types.is_integer(ids.type):
        np.save(path.with_suffix(".npy"), ids.to_numpy(zero_copy_only=False).astype(np.int64))
    else:
        text = json.dumps(ids.to_pylist(), ensure_ascii=False, separators=(",", ":"))
        path.with_suffix(".json").write_text(text, encoding="utf-8")


def _count_sets(
    plan: SequencePlan,
    sets: dict[str, npt.NDArray[np.int64]],
    statistics: SequenceStatistics,
) -> dict[str, Any]:
    lengths = np.diff(plan.offsets)
    return {
        "num_users": plan.num_users,
        "num_items": plan.num_items,
        "num_rows": int(plan.offsets[-1]),
        "train_rows": int(plan.train_counts.sum()),
        "num_train_users": sets["train"].shape[1],
        "num_validation_users": sets["validation"].shape[1],
        "num_test_users": sets["test"].shape[1],
        "num_test_history_users": int((plan.is_test & (lengths > 1)).sum()),
        "num_duplicate_rows": statistics.num_duplicates,
        "num_test_targets_in_train": statistics.num_targets_in_train,
    }


def _require_targets(counts: dict[str, Any], options: SplitOptions) -> None:
    for what, flag in (("test", "--test-fraction"), ("validation", "--validation-fraction")):
        if not counts[f"num_{what}_users"]:
            raise DataError(
                f"the split leaves no {what} users of {counts['filtered_users']:,} users and "
                f"{counts['filtered_rows']:,} interactions; give more data"
                + (f", raise {flag} or use --split leave-one-out" * (options.kind[0] == "g"))
            )


def _describe_split(options: SplitOptions, split: Split) -> dict[str, Any]:
    if options.kind == "leave_one_out":
        return {"kind": options.kind, "tie_order": options.tie_order}
    return {**asdict(options), "cutoff_time": split.cutoff}


def _describe_lengths(lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    values = np.quantile(lengths, QUANTILES) if len(lengths) else [0.0] * len(QUANTILES)
    return {
        "mean": round(float(lengths.mean()), 4) if len(lengths) else 0.0,
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)},
    }


def _describe_shares(
    counts: dict[str, Any], statistics: SequenceStatistics, user_rows: npt.NDArray[np.int64]
) -> dict[str, Any]:
    largest = np.sort(user_rows)[::-1]
    return {
        "tied_target_share": {
            split: round(number / max(1, counts[f"num_{split}_users"]), 6)
            for split, number in statistics.num_tied_targets.items()
        },
        "tied_row_share": round(statistics.num_tied_rows / counts["num_rows"], 6),
        "train_repeat_share": round(
            1 - float(statistics.item_users.sum()) / max(1, counts["train_rows"]), 6
        ),
        "largest_user_share": round(float(largest[0] / largest.sum()), 6),
        "ten_largest_users_share": round(float(largest[:10].sum() / largest.sum()), 6),
    }


def _warnings(
    report: ReadReport, ids: Any, user_rows: npt.NDArray[np.int64], counts: dict[str, Any]
) -> list[str]:
    warnings = list(report.warnings)
    largest = int(user_rows.argmax())
    share = user_rows[largest] / user_rows.sum()
    if share >= DOMINANT_USER_SHARE:
        warnings.append(
            f"user {ids[largest].as_py()!r} has {user_rows[largest]:,} of {user_rows.sum():,} "
            f"interactions ({share:.0%}): a bot or a shared account? Popularity follows it"
        )
    if counts["num_duplicate_rows"]:
        warnings.append(
            f"{counts['num_duplicate_rows']:,} rows repeat another one in user, item and time; "
            "they are kept"
        )
    if counts["num_test_targets_in_train"]:
        warnings.append(
            f"{counts['num_test_targets_in_train']:,} test targets lie before the cutoff and are "
            "training events (their users' later events are all on items without training events)"
        )
    return warnings


def _silent(_: str) -> None:
    """Report progress to nobody."""


def _replace_folder(new: Path, target: Path) -> None:
    if target.exists():
        old = target.parent / f".{target.name}.{os.getpid()}.old"
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(target)
