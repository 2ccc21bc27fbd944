"""Write interactions to CSV or Parquet, block by block."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from db.errors import DataError
from trainer.data.interactions import Interactions

SUFFIXES = (".csv", ".parquet")
"""Endings of the files that can be written."""

SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])
"""Columns, with the names that `prepare` looks for by default."""


def write_interactions(blocks: Iterable[Interactions], path: str | Path) -> int:
    """Write blocks of interactions to one file that appears only when it is complete.

    Parameters
    ----------
    blocks : iterable of Interactions
        Written in turn, so memory holds one at a time.
    path : str or Path
        File that ends in .csv or .parquet.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    DataError
        Another ending, or a place that cannot be written to.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file} ends in {file.suffix!r}; give a name in {' or '.join(SUFFIXES)}")
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    rows = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = (
            pyarrow.csv.CSVWriter(partial, SCHEMA)
            if file.suffix == ".csv"
            else pyarrow.parquet.ParquetWriter(partial, SCHEMA)
        )
        with writer:
            for block in blocks:
                columns = (block.users, block.items, block.timestamps)
                writer.write_table(pa.table([pa.array(c) for c in columns], schema=SCHEMA))
                rows += len(block)
        partial.rename(file)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error}; choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)
    return rows
