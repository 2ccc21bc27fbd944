"""`srsweep export-model`: a trained model with its items, to serve or to start from."""

from pathlib import Path
from typing import Annotated

import typer

from sweeper.cli.options import DEFAULT_DATA_DIR, DataDirOption
from sweeper.cli.train import find_dataset


def export_model(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="Made by train --keep-model.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder to write.")],
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where the model's dataset is, if not in --data-dir."),
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
) -> None:
    """Write a trained model as safetensors and JSON, with the original id of every item.

    Scores are hidden states times item vectors: row N of the vectors belongs to entry N of
    items.json.

    Examples
    --------
        srsweep train --dataset movietweetings --keep-model models/movietweetings.model
        srsweep export-model models/movietweetings.model --out served/movietweetings
    """
    from trainer.export import export_model as write_model
    from trainer.export import load_kept_model

    saved = load_kept_model(model)
    write_model(saved, find_dataset(dataset or saved.spec.dataset, data_dir), out)
    print(f"{out}: {saved.spec.model} over {saved.num_items:,} items")
