# ruff: noqa: E501  (a grid and the message it gets stand on one line)
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.errors import GridError
from db.spec import RunSpec, paper_profile
from sweeper.grid import FIRST_SEED, Resources, load_grid, parse_grid


def fields(grid, *names):
    return [tuple(getattr(spec, name) for name in names) for spec in grid.points]


def test_scalars_make_one_point():
    grid = parse_grid("dataset: demo\nbatch_size: 64\nlearning_rate: 1e-3\n")
    assert grid.points == (RunSpec(dataset="demo", batch_size=64, learning_rate=1e-3),)
    assert grid.name == "grid"
    assert grid.resources == Resources()


def test_lists_multiply_in_the_order_of_the_file():
    grid = parse_grid("dataset: d\nbatch_size: [32, 128]\nmax_seq_len: [16, 64]\n")
    assert fields(grid, "batch_size", "max_seq_len") == [(32, 16), (32, 64), (128, 16), (128, 64)]


def test_product_and_zip_blocks():
    grid = parse_grid(
        "dataset: d\n"
        "product: {max_seq_len: [16, 64]}\n"
        "zip: {embedding_dim: [64, 128], learning_rate: [1e-3, 5e-4]}\n"
    )
    assert fields(grid, "max_seq_len", "embedding_dim", "learning_rate") == [
        (16, 64, 1e-3),
        (16, 128, 5e-4),
        (64, 64, 1e-3),
        (64, 128, 5e-4),
    ]


def test_blocks_are_joined_and_replace_shared_values():
    grid = parse_grid(
        "dataset: d\n"
        "batch_size: [32, 128]\n"
        "blocks:\n"
        "  - {loss: ce}\n"
        "  - {loss: ce_minus, num_negatives: [8, 64], batch_size: 512}\n"
    )
    assert fields(grid, "loss", "batch_size", "num_negatives") == [
        ("ce", 32, None),
        ("ce", 128, None),
        ("ce_minus", 512, 8),
        ("ce_minus", 512, 64),
    ]


def test_null_goes_with_full_losses_and_numbers_with_sampled_ones():
    grid = parse_grid("dataset: d\nloss: [ce, ce_minus, cce, bce]\nnum_negatives: [1, 8, null]\n")
    assert fields(grid, "loss", "num_negatives") == [
        ("ce", None),
        ("ce_minus", 1),
        ("ce_minus", 8),
        ("cce", None),
        ("bce", 1),
    ]
    assert grid.num_conditional == 7


def test_conditional_values_apply_where_their_condition_holds():
    grid = parse_grid(
        "dataset: d\n"
        "loss: [gbce, ce]\n"
        "num_negatives: [4, null]\n"
        "gbce_t: {when: {loss: gbce}, values: [0, 0.5]}\n"
        "batch_size:\n"
        "  - {when: {loss: ce}, values: 32}\n"
        "  - {when: {loss: [gbce, sce]}, values: [64, 128]}\n"
    )
    assert fields(grid, "loss", "num_negatives", "gbce_t", "batch_size") == [
        ("gbce", 4, 0.0, 64),
        ("gbce", 4, 0.0, 128),
        ("gbce", 4, 0.5, 64),
        ("gbce", 4, 0.5, 128),
        ("ce", None, 0.75, 32),
    ]


def test_exclusions_see_defaults_too():
    grid = parse_grid(
        "dataset: d\nmax_seq_len: [16, 64]\nembedding_dim: [64, 128]\n"
        "exclude:\n  - {max_seq_len: [64], embedding_dim: 128, batch_size: 128}\n"
        "  - {max_seq_len: 999}\n"
    )
    assert fields(grid, "max_seq_len", "embedding_dim") == [(16, 64), (16, 128), (64, 64)]
    assert grid.num_excluded == 1
    assert grid.notes == ("grid.yaml:6: this exclusion matches no point",)


def test_seeds_count_from_the_first_or_are_listed():
    assert fields(parse_grid("dataset: d\nseeds: 2\n"), "seed") == [
        (FIRST_SEED,),
        (FIRST_SEED + 1,),
    ]
    assert fields(parse_grid("dataset: d\nseeds: [7, 9]\n"), "seed") == [(7,), (9,)]


def test_duplicates_are_removed_and_counted():
    grid = parse_grid(
        "dataset: d\nblocks:\n  - {batch_size: [32, 64]}\n  - {batch_size: [64, 128]}\n"
    )
    assert fields(grid, "batch_size") == [(32,), (64,), (128,)]
    assert grid.num_duplicates == 1


def test_paper_profile_is_a_default_that_the_grid_may_override():
    text = (
        "dataset: d\nprofile: [paper, clean]\nloss: [cce, cce_minus]\nnum_negatives: [8, null]\n"
        "metric_frame: train\n"
    )
    by_profile = parse_grid(text).points
    assert len(by_profile) == 4
    expected = paper_profile("sasrec", "cce") | {"metric_frame": "train"}
    assert by_profile[0] == RunSpec(dataset="d", loss="cce", **expected)
    assert RunSpec(dataset="d", loss="cce") in by_profile


def test_resources_and_name():
    grid = parse_grid(
        "sweep: movies\ndataset: d\nresources: {cpus: 2, gpus: 0.5, time_limit_seconds: 60}\n"
    )
    assert grid.name == "movies"
    assert grid.resources == Resources(cpus=2.0, gpus=0.5, time_limit_seconds=60.0)


def test_file_gives_name_and_text(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("dataset: d\n")
    grid = load_grid(path)
    assert (grid.name, grid.text) == ("small", "dataset: d\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "grid.yaml:1: the file is empty"),
        ("dataset: d\nbatchsize: 3\n", "grid.yaml:2: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("dataset: d\nloss:\n  - ce\n  - ce_minsu\n", "grid.yaml:4: loss='ce_minsu' is unknown; did you mean 'ce_minus'?"),
        ("dataset: d\n\nmax_seq_len: [16, 0]\n", "grid.yaml:3: max_seq_len=0 must be 1 or more"),
        ("batch_size: 3\n", "grid.yaml:1: dataset is missing"),
        ("dataset: d\nbatch_size: []\n", "grid.yaml:2: batch_size is an empty list"),
        ("dataset: d\nblocks: []\n", "grid.yaml:1: the grid is empty: it lists no points"),
        ("dataset: d\nexclude: [{dataset: d}]\n", "grid.yaml:1: the grid is empty: exclude takes out all 1 points"),
        ("dataset: d\nblocks: [{losss: ce}]\n", "grid.yaml:2: unknown key 'losss'; did you mean 'loss'?"),
        ("dataset: d\nexclude: [{sl: 3}]\n", "grid.yaml:2: unknown key 'sl'"),
        ("dataset: d\nzip: {batch_size: [1, 2], max_seq_len: [3]}\n", "grid.yaml:2: the lists of a zip must be equally long; batch_size has 2, max_seq_len has 1"),
        ("dataset: d\nbatch_size: 3\nproduct: {batch_size: [4]}\n", "grid.yaml:3: 'batch_size' stands twice"),
        ("dataset: d\nbatch_size: 3\nbatch_size: 4\n", "grid.yaml:3: key 'batch_size' stands twice (first on line 2)"),
        ("dataset: d\nseed: 1\nseeds: 2\n", "grid.yaml:3: 'seed' stands twice"),
        ("dataset: d\nseeds: 0\n", "grid.yaml:2: seeds=0 must be a number of seeds from 1"),
        ("dataset: d\nprofile: papper\n", "grid.yaml:2: profile='papper' is unknown; did you mean 'paper'?"),
        ("dataset: d\nloss: [ce, ce_minus]\nnum_negatives: [8]\n", "grid.yaml:2: loss 'ce' gets no point: it needs num_negatives: null"),
        ("dataset: d\nloss: ce\nnum_negatives: 8\n", "grid.yaml:3: num_negatives=8 has no meaning with loss='ce'"),
        ("dataset: d\nresources: {cpu: 3}\n", "grid.yaml:2: unknown key 'cpu'; did you mean 'cpus'?"),
        ("dataset: d\nresources: {gpus: 1.5}\n", "grid.yaml:2: gpus=1.5 must be a fraction up to 1"),
        ("dataset: d\nresources: {cpus: 0}\n", "grid.yaml:2: cpus=0 must be a number, more than 0"),
        ("dataset: d\nbatch_size: [[1, 2]]\n", "grid.yaml:2: each value of batch_size must be a single value"),
        ("dataset: d\nbatch_size: {when: {loss: ce}}\n", "grid.yaml:2: a conditional batch_size needs both 'when' and 'values'"),
        ("dataset: d\nbatch_size: {when: {batch_size: 1}, values: 3}\n", "grid.yaml:2: batch_size cannot depend on itself"),
        ("dataset: d\nzip: {batch_size: [1, 2], max_seq_len: [3, 4]}\nblocks: [{batch_size: 5}]\n", "grid.yaml:3: 'batch_size' belongs to the zip of batch_size, max_seq_len"),
        ("dataset: d\nbatch_size: [1\n", "grid.yaml:3: not valid YAML"),
        ("dataset: d\nsweep: ../x\n", "grid.yaml:2: sweep='../x' must be a name"),
        ("- 1\n", "grid.yaml:1: a grid must be a mapping"),
        ("dataset: !!python/object:os.system d\n", "grid.yaml:1: not valid YAML"),
        ("dataset: d\nbatch_size: '64'\n", "grid.yaml:2: batch_size='64' must be an integer"),
    ],
)  # fmt: skip
def test_mistakes_name_file_line_and_remedy(text, message):
    with pytest.raises(GridError, match="^" + re.escape(message)):
        parse_grid(text)


def test_million_points_are_refused_before_they_are_made():
    text = f"dataset: d\nbatch_size: {list(range(1, 1001))}\nmax_seq_len: {list(range(1, 1001))}\n"
    with pytest.raises(GridError, match=r"the grid has 1,000,000 points, at most 100,000 are run"):
        parse_grid(text)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(GridError, match=r"none\.yaml: there is no such grid file"):
        load_grid(tmp_path / "none.yaml")


AXES = {
    "batch_size": st.integers(1, 4096),
    "max_seq_len": st.integers(1, 512),
    "dropout_rate": st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    "learning_rate": st.floats(1e-5, 1.0),
    "seed": st.integers(0, 2**40),
    "mask_seen": st.booleans(),
}


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries(
        {}, optional={n: st.lists(v, min_size=1, max_size=4, unique=True) for n, v in AXES.items()}
    )
)
def test_size_is_the_product_and_every_combination_is_there_once(axes):
    import yaml

    grid = parse_grid(yaml.safe_dump({"dataset": "d", **axes}))
    assert len(grid.points) == math.prod(len(values) for values in axes.values())
    assert len(set(grid.points)) == len(grid.points)
    expected = {
        RunSpec(dataset="d", **dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    }
    assert set(grid.points) == expected


def test_when_everything_is_conditional_the_count_is_an_upper_bound():
    text = "dataset: d\nbatch_size: {when: {loss: cce}, values: [1, 2, 3]}\n"
    assert len(parse_grid(text).points) == 1
    with pytest.raises(GridError, match="has 3 points, at most 2"):
        parse_grid(text, max_points=2)


def test_whether_times_are_results():
    text = "dataset: d\nresources: {{timing: {}}}\n"
    assert parse_grid(text.format("shared")).resources.timing == "shared"
    assert parse_grid("dataset: d\n").resources.timing == "exclusive"
    with pytest.raises(GridError, match=r"grid.yaml:2: timing='often' must be 'exclusive' or"):
        parse_grid(text.format("often"))
