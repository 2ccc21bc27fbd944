"""`srsweep stop`: drain a sweep."""

from typing import Annotated

import typer

from db.errors import StoreError
from db.planning import SweepView
from db.spec import RunStatus
from sweeper.cli.options import DEFAULT_DATABASE, DatabaseOption


def stop(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="Name of the sweep.")],
    db: DatabaseOption = DEFAULT_DATABASE,
) -> None:
    """Let the running points of a sweep finish and start no more.

    Every launch of the sweep, on any host, ends when its running points have; the same launch
    line goes on later. To stop at once, press Ctrl-C where the launch runs.

    Examples
    --------
        srsweep stop demo
    """
    view = SweepView(db, sweep)
    statuses = list(view.statuses().values())
    if not statuses:
        raise StoreError(f"no sweep {sweep!r}; `srsweep runs --sweeps` lists them")
    view.request_stop()
    running = statuses.count(RunStatus.RUNNING)
    typer.echo(f"{sweep}: asked to stop; {running} running points finish, no more are started")
