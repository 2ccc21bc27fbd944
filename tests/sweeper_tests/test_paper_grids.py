import csv
import math
import re
import typing
from collections import Counter
from pathlib import Path

import pytest

from db.spec import Loss, paper_profile
from sweeper.grid import load_grid

GRIDS = Path(__file__).parents[2] / "grids" / "paper"
SIX = {"ml-20m", "beauty", "gowalla", "zvuk", "30music", "megamarket"}
POINTS = {
    "table01": {"bce": 6, "ce": 6, "ce_minus": 6, "cce": 6, "cce_minus": 6},
    "table03": {"ce": 6, "ce_minus": 6, "cce": 6, "cce_minus": 6},
    "table04-05": {"cce": 6, "cce_minus": 6},
    "table06-07": {"cce_minus": 9},
    "table08": {"sce": 11},
    "table09": {"sce": 6, "cce_minus": 6},
    "table10": {"sce": 6, "cce": 6},
    "table11": {"bce": 11},
    "table12": {"bce": 6, "cce_minus": 6},
    "table13": {"bce": 6, "cce": 6},
    "table14-15": {"cce": 6, "cce_minus": 6},
    "table16": {"ce": 6},
    "table17": {"ce_minus": 6},
    "figure01": {"ce": 6, "ce_minus": 6, "cce": 6, "cce_minus": 6, "sce": 6},
    "figure05-07": {"ce": 57, "ce_minus": 924},
    "figure08": {"cce": 42},
    "figure09": {"cce": 42, "cce_minus": 6},
}
SMALL = {"losses": (30, 24), "scaling": (54, 18), "filter": (24, 24), "bert4rec": (12, 12)}
"""Runs on MovieTweetings and on Amazon Beauty."""


def test_every_table_and_figure_has_its_grid():
    assert {path.stem for path in GRIDS.glob("*.yaml")} == set(POINTS)
    assert {path.stem for path in (GRIDS / "small").glob("*.yaml")} == set(SMALL)
    covered = set()
    for name in POINTS:
        first, last = re.fullmatch(r"[a-z]+(\d+)(?:-(\d+))?", name).groups()
        numbers = range(int(first), int(last or first) + 1)
        covered |= {f"{re.match('[a-z]+', name).group()} {number}" for number in numbers}
    # Table 2 is the datasets; Figures 2 to 4 are drawings and histograms
    tables = {f"table {n}" for n in range(1, 18) if n != 2}
    assert covered == tables | {f"figure {n}" for n in (1, 5, 6, 7, 8, 9)}


@pytest.mark.parametrize("name", POINTS)
def test_grid_expands_to_the_runs_of_the_paper(name):
    grid = load_grid(GRIDS / f"{name}.yaml")
    assert grid.name == f"paper-{name}"
    assert Counter(point.loss for point in grid.points) == POINTS[name]
    assert str(sum(POINTS[name].values())) in grid.text.split("\nsweep:")[0]
    assert not grid.num_duplicates
    assert not grid.notes
    datasets = {point.dataset for point in grid.points}
    assert datasets == ({"ml-20m", "beauty", "gowalla"} if name == "table06-07" else SIX)


@pytest.mark.parametrize("name", POINTS)
def test_grid_repeats_the_papers_protocol(name):
    for point in load_grid(GRIDS / f"{name}.yaml").points:
        expected = paper_profile(point.model, point.loss)
        if point.negative_sampler != "uniform":
            expected["paper_negatives"] = False
        assert {field: getattr(point, field) for field in expected} == expected
        assert point.model == ("bert4rec" if name[-2:] in ("15", "16", "17") else "sasrec")
        assert (point.embedding_dim, point.num_blocks, point.num_heads) == (256, 2, 2)
        assert (point.precision, point.seed, point.max_epochs) == ("fp16", 42, 20)


def test_scaling_grid_holds_exactly_the_published_settings(shared):
    with (shared / "paper" / "experiments.csv").open(newline="") as file:
        published = {
            (
                row["dataset"].replace("movielens_20m", "ml-20m"),
                int(row["batch_size"]),
                int(row["max_seq_len"]),
                math.inf if row["loss_sample_count"] == "inf" else float(row["loss_sample_count"]),
            )
            for row in csv.DictReader(file)
        }
    points = load_grid(GRIDS / "figure05-07.yaml").points
    ours = {
        (p.dataset, p.batch_size, p.max_seq_len, float(p.num_negatives or math.inf)) for p in points
    }
    assert len(ours) == len(points)
    assert ours == published


def test_pairs_that_a_table_compares_differ_in_the_loss_alone():
    def settings(name, loss, *fields):
        points = load_grid(GRIDS / f"{name}.yaml").points
        return sorted(
            tuple(getattr(point, field) for field in ("dataset", *fields))
            for point in points
            if point.loss == loss
        )

    shape = ("batch_size", "max_seq_len")
    assert settings("table03", "ce", *shape) == settings("table03", "cce", *shape)
    sampled = (*shape, "num_negatives")
    assert settings("table03", "ce_minus", *sampled) == settings("table03", "cce_minus", *sampled)
    assert settings("table04-05", "cce", *shape) == settings("table04-05", "cce_minus", *shape)
    assert settings("table12", "bce", *shape) == settings("table12", "cce_minus", *shape)
    assert settings("table13", "bce", *shape) == settings("table13", "cce", *shape)
    assert settings("table10", "cce", *shape) == settings("table04-05", "cce", *shape)
    # the largest run of the paper
    assert ("megamarket", 5120, 320, 1023) in settings("table04-05", "cce_minus", *sampled)


@pytest.mark.parametrize("name", SMALL)
def test_small_grid_runs_on_two_public_datasets_with_three_seeds(name):
    grid = load_grid(GRIDS / "small" / f"{name}.yaml")
    assert grid.name == f"paper-small-{name}"
    assert not grid.num_duplicates
    counts = Counter(point.dataset for point in grid.points)
    assert (counts["movietweetings"], counts["beauty-5core"]) == SMALL[name]
    assert grid.text.split("\nsweep:")[0].count(f" {sum(SMALL[name])} runs") == 1
    assert {point.seed for point in grid.points} == {42, 43, 44}


def test_quality_grids_hold_every_loss():
    grids = GRIDS.parent
    for name, number in (("quality", 9), ("quality-gowalla", 8)):
        points = load_grid(grids / f"{name}.yaml").points
        losses = {point.loss for point in points}
        assert losses == set(typing.get_args(Loss))
        assert Counter(point.seed for point in points) == dict.fromkeys((42, 43, 44), number)
    (ours, *_) = load_grid(grids / "quality-beauty.yaml").points
    assert (ours.loss, ours.embedding_dim, ours.max_seq_len) == ("cce", 64, 50)
