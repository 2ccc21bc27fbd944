"""`srsweep generate`: interactions with structure, as a file or as a prepared dataset."""

from pathlib import Path
from typing import Annotated

import typer

from sweeper.cli.options import JsonOption
from trainer.data.generate import GeneratedSource, GeneratorOptions, generate_blocks


def generate(
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="A file in .csv or .parquet, or a folder to prepare a dataset in.",
        ),
    ],
    users: Annotated[int, typer.Option(help="Number of users.")] = GeneratorOptions.num_users,
    items: Annotated[int, typer.Option(help="Number of items that may be drawn.")] = (
        GeneratorOptions.num_items
    ),
    interactions_per_user: Annotated[
        float, typer.Option(help="Mean interactions per user (log-normal lengths).")
    ] = GeneratorOptions.interactions_per_user,
    length_sigma: Annotated[
        float, typer.Option(help="Standard deviation of the log of the length.")
    ] = GeneratorOptions.length_sigma,
    clusters: Annotated[
        int | None, typer.Option(help="Clusters of items; the square root of --items by default.")
    ] = None,
    zipf_exponent: Annotated[float, typer.Option(help="Exponent of the popularity law.")] = (
        GeneratorOptions.zipf_exponent
    ),
    follow_probability: Annotated[
        float, typer.Option(help="Probability of moving on within a cluster: sequence structure.")
    ] = GeneratorOptions.follow_probability,
    drift: Annotated[
        float, typer.Option(help="Share of the items that are released over time.")
    ] = GeneratorOptions.drift,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = (GeneratorOptions.seed),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Generate interactions: Zipf popularity, user tastes, sequence structure, drift.

    The same options give the same rows (with the same numpy). A folder gets a prepared dataset
    with the defaults of `srsweep prepare`; a file can be given to `srsweep prepare`.

    Examples
    --------
        srsweep generate --out data/demo
        srsweep generate --users 100000 --items 750000 --interactions-per-user 300 --out big.parquet
        srsweep prepare --source parquet --input big.parquet --out data/big
    """
    from sweeper.cli.prepare import print_summary
    from trainer.data.prepare import prepare
    from trainer.data.write import write_interactions

    options = GeneratorOptions(
        num_users=users,
        num_items=items,
        interactions_per_user=interactions_per_user,
        length_sigma=length_sigma,
        num_clusters=clusters,
        zipf_exponent=zipf_exponent,
        follow_probability=follow_probability,
        drift=drift,
        seed=seed,
    )
    if out.suffix:
        rows = write_interactions(generate_blocks(options), out)
        print(f"{rows:,} interactions of {users:,} users written to {out}")
        return
    dataset = prepare(GeneratedSource(options), out, overwrite=overwrite)
    print_summary(dataset.meta, dataset.path, as_json=json)
