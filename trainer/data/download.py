"""Public datasets by name: where they are, under which terms, and how they get here."""

import hashlib
import http
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from db.errors import DataError

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes of the whole file, None where unknown."""

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 30.0
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_GROUPLENS_TERMS = (
    "MovieLens: research use, no redistribution without permission, cite Harper and Konstan (2015);"
    " the full terms are in the README inside the archive"
)
_MCAULEY_TERMS = "Amazon reviews (McAuley lab): research use; cite the paper named on its page"


@dataclass(frozen=True, kw_only=True)
class PublicDataset:
    """A dataset that a name stands for."""

    source: str
    """Format, a key of `sources.FORMATS`."""
    file: str
    """Name of the file to have."""
    page: str
    """Where a person finds it."""
    terms: str
    """Terms of use in a line."""
    url: str | None = None
    """Direct address; None where its owner asks for a form or an account."""
    checksum_url: str | None = None
    """Address of a file with its MD5, published beside it."""
    rating_above: float | None = None
    """The paper's selection."""


def _movielens(name: str, rating_above: float | None = None) -> PublicDataset:
    return PublicDataset(
        source="movielens",
        file=f"{name}.zip",
        page="https://grouplens.org/datasets/movielens/",
        terms=_GROUPLENS_TERMS,
        url=f"{_GROUPLENS}/{name}.zip",
        checksum_url=f"{_GROUPLENS}/{name}.zip.md5",
        rating_above=rating_above,
    )


PUBLIC_DATASETS: dict[str, PublicDataset] = {
    **{f"ml-{size}": _movielens(f"ml-{size}") for size in ("100k", "1m", "10m", "25m", "32m")},
    "ml-20m": _movielens("ml-20m", rating_above=3.0),
    "amazon2023-beauty": PublicDataset(
        source="amazon2023",
        file="Beauty_and_Personal_Care.csv.gz",
        page="https://amazon-reviews-2023.github.io/",
        terms=_MCAULEY_TERMS,
        url="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/benchmark/5core/"
        "rating_only/Beauty_and_Personal_Care.csv.gz",
    ),
    "gowalla": PublicDataset(
        source="gowalla",
        file="loc-gowalla_totalCheckins.txt.gz",
        page="https://snap.stanford.edu/data/loc-Gowalla.html",
        terms="SNAP: research use; cite Cho, Myers and Leskovec (2011)",
        url="https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz",
    ),
    "zvuk": PublicDataset(
        source="zvuk",
        file="zvuk-interactions.parquet",
        page="https://www.kaggle.com/datasets/alexxl/zvuk-dataset",
        terms="Zvuk: see its page; an account is needed",
    ),
    "megamarket": PublicDataset(
        source="megamarket",
        file="megamarket.parquet",
        page="https://www.kaggle.com/datasets/alexxl/megamarket",
        terms="MegaMarket: see its page; an account is needed",
    ),
    "30music": PublicDataset(
        source="30music",
        file="ThirtyMusic.tar.gz",
        page="http://recsys.deib.polimi.it/datasets/",
        terms="30Music: research use; its owners ask for a form",
    ),
}
"""Name given to `--source` without `--input` -> where the data is."""


def locate(name: str, folder: str | Path, *, progress: Progress | None = None) -> Path:
    """The file of a public dataset: the one in the folder, or else a fresh download.

    A download that was cut off goes on where it stopped, and is checked against the length that
    the server states and the checksum that the publisher offers.

    Parameters
    ----------
    name : str
        One of `PUBLIC_DATASETS`.
    folder : str or Path
        Where raw files are kept.
    progress : callable, optional
        Told about the bytes that have come.

    Raises
    ------
    DataError
        Offline, no direct address, or a file that fails its checksum; says what to fetch and where
        to put it.
    """
    dataset, place = PUBLIC_DATASETS[name], Path(folder) / PUBLIC_DATASETS[name].file
    if place.exists():
        return place
    by_hand = f"fetch {dataset.file} from {dataset.page} and put it at {place}, or give --input"
    if dataset.url is None:
        raise DataError(f"{name} has no direct download; {by_hand}")
    partial = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _fetch(dataset.url, partial, progress)
        expected = _published_md5(dataset.checksum_url)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        reason = getattr(e, "reason", None) or e
        raise DataError(
            f"cannot download {dataset.url} ({reason}); the same line goes on where it stopped, "
            f"or {by_hand}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot write {partial}: {error}; choose another --raw-dir") from None
    found = _md5(partial)
    if expected is not None and found != expected:
        partial.unlink()
        raise DataError(
            f"{dataset.url} came with checksum {found}, its publisher states {expected}; the "
            f"download was thrown away: try again, or {by_hand}"
        )
    partial.rename(place)
    return place


def _fetch(url: str, partial: Path, progress: Progress | None) -> None:
    """Download into a file, after the bytes that are there already."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            # Nothing lies after the bytes that are there: the file is complete.
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                return
            raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with partial.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _published_md5(url: str | None) -> str | None:
    """The MD5 that stands in the publisher's checksum file, in whatever order of words."""
    if url is None:
        return None
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        words = response.read(4096).decode("ascii", errors="replace").split()
    return next((w.lower() for w in words if len(w) == 32 and _is_hex(w)), None)


def _is_hex(word: str) -> bool:
    return all(letter in "0123456789abcdefABCDEF" for letter in word)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
