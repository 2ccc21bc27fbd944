"""`srsweep audit`: what published runs and the paper's tables say about themselves."""

from typing import Annotated

import typer

from db.errors import SrsweepError
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    output_format,
    print_rows,
)

TABLES = ("repeats", "hidden", "memory", "contradictions", "denominators")


def audit(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="One of " + ", ".join(TABLES))],
    db: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Check imported runs and the paper's printed tables against themselves.

    repeats: points run more than once. hidden: runs in the boxes that the paper's Fig. 5 leaves
    out. memory: runs that take more memory than one that is nowhere smaller. contradictions:
    printed differences that the printed values do not give. denominators: which value each table
    divides by.

    Examples
    --------
        srsweep audit repeats --db sqlite:///paper.db
        srsweep audit contradictions --csv
    """
    if table not in TABLES:
        raise SrsweepError(f"no table {table!r}; there are {', '.join(TABLES)}")
    format = output_format(as_json, as_csv)

    from analysis.audit import hidden_points, memory_out_of_order, repeats
    from analysis.frame import load_runs, records, select
    from analysis.tables import recomputed_differences

    if table in ("contradictions", "denominators"):
        found = recomputed_differences()
        if table == "contradictions":
            found = found[found["agrees"].isin(["neither", "not recomputable"])]
        else:
            found = found.groupby(["table", "agrees"]).size().rename("differences").reset_index()
    else:
        runs = select(load_runs(db), selection="all").frame
        compute = {"repeats": repeats, "hidden": hidden_points, "memory": memory_out_of_order}
        found = compute[table](runs)
    rows = records(found.astype(object).where(found.notna(), None))
    print_rows(rows, format, columns=list(found.columns))
