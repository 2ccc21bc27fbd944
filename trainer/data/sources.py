"""Named sources: the formats in which interactions are published, each with its selection."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from db.errors import DataError
from trainer.data.checks import DEFAULT_MAX_BAD_ROWS, IdType, RowRules
from trainer.data.interactions import Source
from trainer.data.readers import ParquetSource, TextLayout, TextSource, probe_text


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a user may say about an input file; None is the source's own."""

    user_column: str | None = None
    """Name of the users' column; its number from 1 where there is no header."""
    item_column: str | None = None
    """Name of the items' column; its number from 1 where there is no header."""
    time_column: str | None = None
    """Name of the times' column; its number from 1 where there is no header."""
    rating_column: str | None = None
    """Name of the ratings' column; its number from 1 where there is no header."""
    rating_above: float | None = None
    """Keep rows rated higher than this."""
    delimiter: str | None = None
    """Separator of fields: one character, `tab` or `::` (csv)."""
    header: bool = True
    """Whether the first line names the columns (csv)."""
    event: int | None = None
    """Kind of event to keep (megamarket)."""
    id_type: IdType | None = None
    """Type of ids in text: auto, int or string."""
    max_bad_rows: int = DEFAULT_MAX_BAD_ROWS
    """Bad rows left out before the file is refused."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A published format and the selection that goes with it."""

    description: str
    """What the file is, in words."""
    reader: Literal["text", "parquet", "movielens", "csv"]
    """How it is read."""
    columns: Mapping[str, str | int] = field(default_factory=dict)
    """Role to column name, or to position from 0."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `TextLayout`."""
    id_type: IdType = "auto"
    """Type of ids in text."""
    rating_above: float | None = None
    """Selection by rating."""
    event: int | None = None
    """Selection by kind of event."""


_IDOMAAR_ID = r'"type":\s*"{}",\s*"id":\s*"?(\d+)'

FORMATS: dict[str, Format] = {
    "movielens": Format(
        description="MovieLens ratings: ratings.dat with '::', ratings.csv or u.data",
        reader="movielens",
        columns={"user": 0, "item": 1, "rating": 2, "time": 3},
        id_type="int",
    ),
    "csv": Format(
        description="CSV or TSV; columns named by --user-column, --item-column, --time-column",
        reader="csv",
        columns={"user": "user_id", "item": "item_id", "time": "timestamp"},
    ),
    "parquet": Format(
        description="Parquet; columns named by --user-column, --item-column, --time-column",
        reader="parquet",
        columns={"user": "user_id", "item": "item_id", "time": "timestamp"},
    ),
    "amazon2014": Format(
        description="Amazon 2014 ratings_<Category>.csv: user,item,rating,seconds, no header",
        reader="text",
        columns={"user": 0, "item": 1, "rating": 2, "time": 3},
        layout={"delimiter": ",", "header": False},
        id_type="string",
    ),
    "amazon2018": Format(
        description="Amazon 2018 <Category>.csv: item,user,rating,seconds, no header",
        reader="text",
        columns={"user": 1, "item": 0, "rating": 2, "time": 3},
        layout={"delimiter": ",", "header": False},
        id_type="string",
    ),
    "amazon2023": Format(
        description="Amazon 2023 rating_only <Category>.csv.gz, milliseconds; rating > 3",
        reader="text",
        columns={"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"},
        layout={"delimiter": ",", "header": True},
        id_type="string",
        rating_above=3.0,
    ),
    "gowalla": Format(
        description="Gowalla loc-gowalla_totalCheckins.txt.gz of SNAP",
        reader="text",
        columns={"user": 0, "time": 1, "item": 4},
        layout={"delimiter": "\t", "header": False},
        id_type="int",
    ),
    "zvuk": Format(
        description="Zvuk zvuk-interactions.parquet",
        reader="parquet",
        columns={"user": "user_id", "item": "track_id", "time": "datetime"},
    ),
    "30music": Format(
        description="30Music ThirtyMusic.tar.gz, or relations/events.idomaar from it",
        reader="text",
        columns={"user": 4, "item": 4, "time": 2},
        layout={
            "delimiter": "\t",
            "header": False,
            "member": "relations/events.idomaar",
            "extract": {"user": _IDOMAAR_ID.format("user"), "item": _IDOMAAR_ID.format("track")},
        },
        id_type="int",
    ),
    "megamarket": Format(
        description="MegaMarket megamarket.parquet; event == 2",
        reader="parquet",
        columns={"user": "user_id", "item": "item_id", "time": "datetime", "event": "event"},
        event=2,
    ),
    "recbole": Format(
        description="RecBole atomic file *.inter",
        reader="text",
        columns={"user": "user_id", "item": "item_id", "time": "timestamp"},
        layout={"delimiter": "\t", "header": True, "typed_header": True},
    ),
}
"""Name given to `--source` -> its format."""

_MOVIELENS_HEADER = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
_MOVIELENS_MEMBERS = "ratings.dat|ratings.csv|u.data"


def open_source(
    name: str,
    path: str | Path,
    options: SourceOptions = SourceOptions(),
    *,
    rating_above: float | None = None,
) -> Source:
    """A file of a named format as a source of interactions; nothing is read yet.

    Parameters
    ----------
    name : str
        One of `FORMATS`.
    path : str or Path
        File to read.
    options : SourceOptions
        What the user says about the file.
    rating_above : float, optional
        Rating threshold that comes with a published dataset; the user's own goes before it.

    Raises
    ------
    DataError
        Unknown format, or an option that the format cannot take.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise DataError(
            f"unknown source {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"known are {', '.join(FORMATS)}"
        )
    form, file = FORMATS[name], Path(path)
    columns = _columns(form, options)
    default = form.rating_above if rating_above is None else rating_above
    rules = RowRules(
        id_type=options.id_type or form.id_type,
        max_bad_rows=options.max_bad_rows,
        rating_above=default if options.rating_above is None else options.rating_above,
        event_equals=form.event if options.event is None else options.event,
    )
    if rules.rating_above is not None and "rating" not in columns:
        raise DataError(
            f"rating_above={rules.rating_above:g} needs a rating; name it with --rating-column"
        )
    if rules.rating_above is None:
        columns.pop("rating", None)
    settings = {
        "source": name,
        "file": file.name,
        "bytes": file.stat().st_size if file.is_file() else None,
        "columns": columns,
        "rating_above": rules.rating_above,
        "event": rules.event_equals,
        "id_type": rules.id_type,
    }
    if form.reader == "parquet":
        return ParquetSource(file, {r: str(c) for r, c in columns.items()}, rules, settings)
    layout = _text_layout(form, file, columns, options)
    return TextSource(file, layout, rules, settings)


def _columns(form: Format, options: SourceOptions) -> dict[str, str | int]:
    columns = dict(form.columns)
    for role in ("user", "item", "time", "rating"):
        given = getattr(options, f"{role}_column")
        if given is None:
            continue
        if form.reader == "csv" and not options.header:
            if not given.isdigit() or int(given) < 1:
                raise DataError(
                    f"--{role}-column {given!r} is not a number from 1, which a file without a "
                    "header needs"
                )
            columns[role] = int(given) - 1
        else:
            columns[role] = given
    if form.reader == "csv" and not options.header:
        named = [role for role, column in columns.items() if isinstance(column, str)]
        if named:
            raise DataError(
                f"a file without a header needs numbers from 1 in --{named[0]}-column and the "
                "other column options"
            )
    return columns


def _text_layout(
    form: Format, path: Path, columns: Mapping[str, str | int], options: SourceOptions
) -> TextLayout:
    if form.reader == "text":
        return TextLayout(columns=columns, **form.layout)
    if form.reader == "movielens":
        return _movielens_layout(path, columns, options)
    delimiter = options.delimiter
    if delimiter is None:
        first = path.name.removesuffix(".gz").rpartition(".")[2]
        delimiter = "\t" if first in ("tsv", "tab") else ","
    delimiter = {"tab": "\t", "\\t": "\t", "space": " "}.get(delimiter, delimiter)
    if len(delimiter) != 1 and delimiter != "::":
        raise DataError(f"delimiter {delimiter!r} is neither one character nor '::' nor 'tab'")
    return TextLayout(
        delimiter=delimiter, header=options.header, columns=columns, quoted=delimiter != "::"
    )


def _movielens_layout(
    path: Path, columns: Mapping[str, str | int], options: SourceOptions
) -> TextLayout:
    """Of the three layouts of MovieLens, the one that the first line shows."""
    line = probe_text(path, _MOVIELENS_MEMBERS)
    common: dict[str, Any] = {"member": _MOVIELENS_MEMBERS}
    if "::" in line:
        return TextLayout(delimiter="::", header=False, columns=columns, **common)
    if "\t" in line:
        return TextLayout(delimiter="\t", header=False, columns=columns, **common)
    if line.lower().startswith('"userid"') or line.lower().startswith("userid"):
        named = {
            role: column if isinstance(column, str) else _MOVIELENS_HEADER[role]
            for role, column in columns.items()
        }
        return TextLayout(delimiter=",", header=True, columns=named, quoted=True, **common)
    raise DataError(
        f"{path}, line 1: {line[:80]!r} is none of MovieLens' layouts (user::item::rating::time, "
        "a header userId,movieId,rating,timestamp, or four fields separated by TAB); use "
        "--source csv with --user-column, --item-column and --time-column"
    )
