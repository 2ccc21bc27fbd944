"""`srsweep`: the table of commands and the one place where errors become exit codes.

Only the module of the command that was typed is imported, so help and listings never wait for
torch, Ray or pandas.
"""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from db.errors import SrsweepError

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("sweeper.cli.generate:generate", "Generate a dataset of interactions."),
    "prepare": ("sweeper.cli.prepare:prepare", "Turn a ratings file into a training dataset."),
    "data": ("sweeper.cli.data:app", "List, describe and check prepared datasets."),
    "train": ("sweeper.cli.train:train", "Train one run, without Ray."),
    "baselines": ("sweeper.cli.baselines:baselines", "Rank with baselines that do not train."),
    "launch": ("sweeper.cli.launch:launch", "Run every point of a grid; the same line resumes."),
    "stop": ("sweeper.cli.stop:stop", "Let the running points finish and start no more."),
    "cluster": ("sweeper.cli.cluster:app", "Check a Ray cluster before a sweep."),
    "runs": ("sweeper.cli.runs:runs", "List, filter and sort runs."),
    "advise": ("sweeper.cli.advise:advise", "Choose a setting for a memory and time budget."),
    "query": ("sweeper.cli.query:query", "Ask the run database in read-only SQL."),
    "report": ("sweeper.cli.report:report", "Draw trade-offs, importances and findings."),
    "import": ("sweeper.cli.import_:app", "Take other people's runs into the database."),
    "audit": ("sweeper.cli.audit:audit", "Check published runs and tables against themselves."),
    "export": ("sweeper.cli.export:export", "Write runs to CSV or Parquet."),
    "export-model": ("sweeper.cli.export_model:export_model", "Write a model with its item ids."),
    "db": ("sweeper.cli.db:app", "Create, upgrade, check and copy the run database."),
}
"""Name of each command -> where it is defined, and its line in `srsweep --help`."""

_INTERNAL_SECTIONS = re.compile(
    r"^(Parameters|Returns|Raises|Notes|References|Yields)\n-+$", re.MULTILINE
)


class LazyGroup(TyperGroup):
    """Shows every command of the table, imports only the one that is invoked."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, help_line) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=help_line, callback=lambda: None))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Replace the placeholder of the command typed by the real one."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = load_command(name)
        return name, command, rest


def load_command(name: str) -> Any:
    """Import the module of one command and return its click command.

    Raises
    ------
    SrsweepError
        The command's module is not part of this installation.
    """
    module_name, _, attribute = COMMANDS[name][0].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise SrsweepError(
            f"command {name!r} is not part of this installation ({module_name} is missing); "
            "'srsweep --help' lists the others"
        ) from None
    target = getattr(module, attribute)
    app = target if isinstance(target, typer.Typer) else _single(target)
    app.rich_markup_mode = None
    command = typer.main.get_command(app)
    command.name = name
    _keep_examples(command)
    return command


def _single(function: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    return app


def _keep_examples(command: Any) -> None:
    """Keep the line breaks of examples, and leave out sections meant for readers of the code."""
    text = command.help or ""
    cut = _INTERNAL_SECTIONS.search(text)
    text = re.sub(
        r"^Examples\n-+\n", "Examples:\n", text[: cut.start()] if cut else text, flags=re.M
    )
    paragraphs = re.split(r"\n\s*\n", text)
    command.help = "\n\n".join(
        f"\b\n{paragraph}"
        if re.search(r"^(    |srsweep |\$ )", paragraph, re.MULTILINE)
        else paragraph
        for paragraph in paragraphs
    )
    for child in getattr(command, "commands", {}).values():
        _keep_examples(child)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"srsweep {version('srsweep')}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def srsweep(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Sweep sequential recommenders over loss, batch size, sequence length and negatives.

    Every run's memory, time and ranking quality land in one run database that answers in SQL.

    Examples
    --------
        srsweep generate --out data/demo
        srsweep launch grids/demo.yaml
        srsweep runs --sweep demo --sort ndcg_at_10
        srsweep report --out report/
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error that is the user's to mend is one line and exit code 2.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after `srsweep`; the process's own by default.

    Returns
    -------
    int
        Exit code (typer leaves the process by SystemExit before that in most cases).
    """
    command = typer.main.get_command(app)
    _keep_examples(command)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="srsweep")
    except SrsweepError as error:
        print("srsweep: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
