"""Splits: equality with the golden files, properties of every split, and messages for invalid input."""

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml

from primeflow_perturbench.perturbench.embedded.data.datasplitter import (
    SPLITS,
    PairTable,
    PerturbationDataSplitter,
    SplitTask,
    combine_inverse_pairs,
    draw_split,
    label_cells,
    read_split_csv,
    split_controls,
    transfer_pairs,
    write_split_csv,
)
from primeflow_perturbench.perturbench.embedded.errors import DataError

ROOT = Path(__file__).parents[4]
SCREEN = ROOT / "tests" / "files" / "screen"
DEVEL = ROOT / ".." / "shared" / "golden" / "devel"
DEVEL_CELLS = ROOT / ".." / "shared" / "data" / "devel.h5ad"
LABELS = ("condition", "+", "control")

GOLDEN_NAMES = [
    f"{task}_seed{seed}_cell_type"
    for task in ("transfer", "transfer2", "combine", "combine_inverse")
    for seed in (7, 42)
]
TASK_CONFIGS = {
    "transfer": {"task": "transfer", "min_train_covariates": 1, "max_heldout_covariates": 2},
    "combine": {"task": "combine"},
    "combine_inverse": {"task": "combine_inverse"},
}


def read_obs(path: Path) -> pd.DataFrame:
    return anndata.read_h5ad(path, backed="r").obs.copy()


@pytest.fixture(scope="module")
def screen() -> pd.DataFrame:
    return read_obs(SCREEN / "screen.h5ad")


@pytest.fixture(scope="module")
def devel() -> pd.DataFrame:
    return read_obs(DEVEL_CELLS)


def make_config(task: str = "transfer", **changes) -> dict:
    config = {"covariate_keys": ["cell_type"], "max_heldout_fraction_per_covariate": 0.4, "splitter_seed": 42}
    return config | TASK_CONFIGS.get(task, {"task": task}) | changes


def make_obs(labels_of_group: dict[str, list[str]], cells_per_pair: int = 4) -> pd.DataFrame:
    rows = [
        (label, group) for _ in range(cells_per_pair) for group, labels in labels_of_group.items() for label in labels
    ]
    obs = pd.DataFrame(rows, columns=["condition", "cell_type"])
    obs.index = [f"cell{number}" for number in range(len(obs))]
    return obs


def read_golden(path: Path) -> pd.Series:
    return pd.read_csv(path, header=None, index_col=0)[1]


def assert_same_split(split: pd.Series, golden: pd.Series) -> None:
    assert list(split.index) == list(golden.index)
    differing = split.index[split.fillna("none") != golden.fillna("none")]
    assert not len(differing), f"{len(differing)} of {len(split)} cells differ, first {differing[0]}"


# The golden files


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_splits_of_the_screen_equal_perturbench(screen, name):
    config = yaml.safe_load((SCREEN / "splits" / f"{name}.yaml").read_text())
    assert_same_split(draw_split(config, screen, *LABELS), read_golden(SCREEN / "splits" / f"{name}.csv"))


@pytest.mark.skipif(not DEVEL_CELLS.exists(), reason="the development data are not here")
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_splits_of_devel_equal_perturbench(devel, name):
    config = yaml.safe_load((DEVEL / "splits" / f"{name}.yaml").read_text())
    assert_same_split(draw_split(config, devel, *LABELS), read_golden(DEVEL / "splits" / f"{name}.csv"))


def test_a_wider_holdout_of_the_screen_equals_perturbench(screen):
    config = yaml.safe_load((SCREEN / "splits" / "transfer2_seed42_cell_type.yaml").read_text())
    config["max_heldout_fraction_per_covariate"] = 0.8
    assert_same_split(draw_split(config, screen, *LABELS), read_golden(SCREEN / "split.csv"))


@pytest.mark.skipif(not DEVEL_CELLS.exists(), reason="the development data are not here")
def test_a_wider_holdout_of_devel_equals_perturbench(devel):
    config = yaml.safe_load((DEVEL / "splits" / "transfer2_seed42_cell_type.yaml").read_text())
    config["max_heldout_fraction_per_covariate"] = 0.8
    assert_same_split(draw_split(config, devel, *LABELS), read_golden(DEVEL / "split.csv"))


# Properties of every split


@pytest.mark.parametrize("covariate_keys", [["cell_type"], ["cell_type", "treatment"]])
@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_held_out_pairs_have_no_cells_in_train(screen, task, covariate_keys):
    split = draw_split(make_config(task, covariate_keys=covariate_keys), screen, *LABELS)
    cells = screen.astype(str).assign(split=split)
    perturbed = cells[cells["condition"] != "control"]
    splits_of_pair = perturbed.groupby([*covariate_keys, "condition"])["split"].agg(set)
    assert all(len(splits) == 1 for splits in splits_of_pair)
    for name in SPLITS:
        assert {name} in list(splits_of_pair)

    splits_of_controls = cells[cells["condition"] == "control"].groupby(covariate_keys)["split"].agg(set)
    assert all(splits == set(SPLITS) for splits in splits_of_controls)


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_held_out_labels_respect_task_and_quota(screen, task):
    split = draw_split(make_config(task), screen, *LABELS)
    heldout = screen[(split != "train") & (screen["condition"] != "control")].astype(str)
    labels_of_group = heldout.groupby("cell_type")["condition"].agg(set)
    for group, labels in labels_of_group.items():
        of_group = set(screen.loc[screen["cell_type"] == group, "condition"])
        combinations = {label for label in of_group if "+" in label}
        candidates = {
            "transfer": of_group,
            "combine": combinations,
            "combine_inverse": of_group - combinations,
        }[task]
        assert labels <= candidates
        assert len(labels) <= np.ceil(0.4 * len(candidates))
        if task == "combine_inverse":
            assert all(len(labels & set(combination.split("+"))) <= 1 for combination in combinations)
    if task == "transfer":
        groups_of_label = screen[screen["condition"] != "control"].groupby("condition", observed=True)
        n_heldout = heldout.groupby("condition")["cell_type"].nunique()
        assert n_heldout.max() == 2
        assert (groups_of_label["cell_type"].nunique()[n_heldout.index] - n_heldout).min() >= 1


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_the_split_depends_on_the_seed(screen, task):
    splits = [draw_split(make_config(task, splitter_seed=seed), screen, *LABELS) for seed in (1, 1, 2)]
    pd.testing.assert_series_equal(splits[0], splits[1])
    perturbed = screen["condition"] != "control"
    assert (splits[0] != splits[2])[perturbed].any()
    assert (splits[0] != splits[2])[~perturbed].any()


def test_global_random_states_do_not_change(screen):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for task in TASK_CONFIGS:
        draw_split(make_config(task, downsample_fraction=0.9), screen, *LABELS)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


HASH_SEED_PROGRAM = """
import sys, hashlib, anndata
from primeflow_perturbench.perturbench.embedded.data.datasplitter import draw_split
obs = anndata.read_h5ad(sys.argv[1], backed="r").obs.copy()
for task in ("transfer", "combine_inverse"):
    config = {"task": task, "covariate_keys": ["treatment", "cell_type"], "max_heldout_covariates": 2}
    split = draw_split(config, obs, "condition", "+", "control")
    print(hashlib.sha256(split.to_csv().encode()).hexdigest())
"""


def test_several_covariate_keys_do_not_depend_on_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", HASH_SEED_PROGRAM, str(SCREEN / "screen.h5ad")],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "4")
    }
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 2


# The single steps


def test_the_only_held_out_pair_of_a_group_is_in_no_split():
    obs = make_obs({"a": ["control", "P", "Q"], "b": ["control", "P", "Q"]})
    table = PairTable.from_obs(obs, "condition", ["cell_type"], "control")
    pairs = [("P", 0), ("P", 1), ("Q", 1)]
    split = label_cells(table, pairs, SplitTask("transfer", ("cell_type",)))
    of_pair = pd.Series(split, index=obs.index).groupby([obs["cell_type"], obs["condition"]]).agg(set)
    assert pd.isna(of_pair["a", "P"].pop())
    assert of_pair["a", "Q"] == {"train"}
    assert {of_pair["b", "P"].pop(), of_pair["b", "Q"].pop()} == {"val", "test"}


@pytest.mark.parametrize(
    ("n_controls", "train_fraction", "expected"),
    [
        (8, 0.5, (4, 2, 2)),
        (7, 0.5, (3, 2, 2)),
        (10, 0.7, (7, 2, 1)),
        (4, 1.0, (4, 0, 0)),
        (4, 0.0, (0, 2, 2)),
        (0, 0.5, (0, 0, 0)),
    ],
)
def test_split_controls_divides_by_the_fraction(n_controls, train_fraction, expected):
    split = list(split_controls(n_controls, train_fraction, seed=3))
    assert tuple(split.count(name) for name in SPLITS) == expected


def test_transfer_stops_at_the_number_of_perturbations_per_group(screen):
    table = PairTable.from_obs(screen, "condition", ["cell_type"], "control")
    config = make_config(max_heldout_fraction_per_covariate=1.0)
    heldout_of_group = {
        most: pd.Series(
            group
            for _, group in transfer_pairs(
                table, SplitTask.from_config(config | {"max_heldout_perturbations_per_covariate": most})
            )
        ).value_counts()
        for most in (2, 200)
    }
    assert heldout_of_group[2].to_list() == [2, 2, 2]
    assert heldout_of_group[200].max() > 2


@pytest.mark.parametrize("min_train", [1, 2, 3])
def test_transfer_leaves_perturbations_in_enough_groups(min_train):
    obs = make_obs({group: ["control", *"PQRSTUVW"] for group in "abcd"}, cells_per_pair=1)
    table = PairTable.from_obs(obs, "condition", ["cell_type"], "control")
    n_heldout = set()
    for seed in range(20):
        task = SplitTask("transfer", ("cell_type",), min_train, 4, 0.5, splitter_seed=seed)
        n_heldout |= set(pd.Series(label for label, _ in transfer_pairs(table, task)).value_counts())
    assert n_heldout == set(range(1, 4 - min_train + 1))


def test_combine_inverse_holds_out_one_part_of_a_combination():
    obs = make_obs({"a": ["control", "P", "Q", "P+Q"]}, cells_per_pair=1)
    table = PairTable.from_obs(obs, "condition", ["cell_type"], "control")
    heldout = {
        tuple(sorted(label for label, _ in combine_inverse_pairs(table, task, "+")))
        for seed in range(20)
        for task in [SplitTask("combine_inverse", ("cell_type",), 1, 1, 0.7, splitter_seed=seed)]
    }
    assert heldout == {("P", "control"), ("Q", "control")}


def test_downsampling_keeps_the_held_out_pairs(screen):
    whole = draw_split(make_config(), screen, *LABELS)
    part = draw_split(make_config(downsample_fraction=0.25), screen, *LABELS)
    assert part.notna().sum() == 2820 // 4
    assert (part.dropna() == whole[part.notna()]).all()


def test_a_numeric_covariate_defines_groups(screen):
    obs = screen.assign(dose=screen["cell_type"].cat.codes.astype(float))
    split = draw_split(make_config(covariate_keys="dose"), obs, *LABELS)
    pd.testing.assert_series_equal(split, draw_split(make_config(), screen, *LABELS))


@pytest.mark.parametrize("task", ["combine", "combine_inverse"])
def test_without_covariates_all_cells_form_one_group(screen, task):
    split = draw_split(make_config(task, covariate_keys=[]), screen, *LABELS)
    one_group = draw_split(make_config(task, covariate_keys=["all"]), screen.assign(all="all"), *LABELS)
    pd.testing.assert_series_equal(split, one_group)
    splits_of_label = split.groupby(screen["condition"], observed=True).agg(set)
    assert all(len(splits) == 1 for splits in splits_of_label.drop("control"))
    assert set().union(*splits_of_label.drop("control")) == set(SPLITS)


# Split files and the class


def test_split_dataset_gives_positions_in_file_order(screen):
    config = make_config()
    positions = PerturbationDataSplitter.split_dataset(config, screen, *LABELS)
    split = PerturbationDataSplitter.assign_splits(config, screen, *LABELS)
    assert list(positions) == list(SPLITS)
    for name in SPLITS:
        assert (np.diff(positions[name]) > 0).all()
        assert set(split.iloc[positions[name]]) == {name}
    assert sum(map(len, positions.values())) == split.notna().sum()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_written_split_is_read_back(screen, tmp_path, suffix):
    split = draw_split(make_config(downsample_fraction=0.9), screen, *LABELS)
    path = tmp_path / f"split{suffix}"
    write_split_csv(split, path)
    if suffix.endswith("gz"):
        assert gzip.decompress(path.read_bytes())
    shuffled = screen.sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(read_split_csv(path, shuffled.index), split[shuffled.index])
    from_file = PerturbationDataSplitter.split_dataset({"split_path": str(path)}, screen, *LABELS)
    drawn = PerturbationDataSplitter.split_dataset(
        make_config(downsample_fraction=0.9, split_path=None), screen, *LABELS
    )
    for name in SPLITS:
        np.testing.assert_array_equal(from_file[name], drawn[name])


def test_a_split_file_may_have_more_cells_than_the_data(tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("NA,train\nother,val\nnan,\n")
    split = read_split_csv(path, ["nan", "NA"])
    assert pd.isna(split["nan"])
    assert split["NA"] == "train"


# Invalid input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "tranfer"}, "'tranfer': set it to one of transfer, combine, combine_inverse"),
        ({"task": None}, r"lacks \['task'\]"),
        ({"covariate_keys": []}, "task transfer .* covariate_keys of the splitter is empty: .*combine_inverse"),
        ({"covariate_keys": None}, "task transfer .* covariate_keys of the splitter is empty"),
        ({"splitter_sed": 1}, r"unknown keys \['splitter_sed'\].*'splitter_seed'"),
        (
            {"covariate_keys": ["tissue"]},
            r"no covariate column 'tissue'.*\['condition', 'cell_type', 'treatment'\]",
        ),
        ({"train_control_fraction": 1.5}, "train_control_fraction is 1.5: .* between 0 and 1"),
        ({"downsample_fraction": -0.1}, "downsample_fraction is -0.1: .* between 0 and 1"),
        ({"max_heldout_fraction_per_covariate": 2}, "max_heldout_fraction_per_covariate is 2: .* 0 and 1"),
        ({"min_train_covariates": -1}, "min_train_covariates is -1: set it to 0 or more"),
        (
            {"max_heldout_fraction_per_covariate": 0},
            "no perturbed cell in val: task transfer held out 0 pairs.*raise max_heldout_fraction_per_cov",
        ),
        ({"max_heldout_covariates": 0}, "no perturbed cell in val: .*max_heldout_covariates"),
        ({"min_train_covariates": 3}, "no perturbed cell in val: .*lower min_train_covariates"),
        (
            {"max_heldout_perturbations_per_covariate": 1},
            r"no perturbed cell in val: task transfer held out 3 pairs.*\(3 left out",
        ),
        ({"downsample_fraction": 0}, "no perturbed cell in train: .*raise downsample_fraction"),
    ],
)
def test_invalid_configs_are_errors(screen, changes, message):
    with pytest.raises(DataError, match=message):
        draw_split(make_config(**changes), screen, *LABELS)


def test_an_empty_train_split_is_an_error():
    obs = make_obs({"a": ["control", "P+Q", "R+S"]})
    config = make_config("combine", max_heldout_fraction_per_covariate=1.0)
    with pytest.raises(DataError, match=r"no perturbed cell in train: .*lower max_heldout_fraction"):
        draw_split(config, obs, *LABELS)


def test_a_missing_perturbation_column_is_an_error(screen):
    with pytest.raises(DataError, match=r"no perturbation column 'gene'.*\['condition'"):
        draw_split(make_config(), screen, "gene", "+", "control")


@pytest.mark.parametrize("column", ["condition", "cell_type"])
def test_missing_values_of_a_column_are_an_error(screen, column):
    values = screen[column].astype(object)
    values.iloc[[3, 8]] = None
    with pytest.raises(DataError, match=f"column '{column}' is empty for 2 of 2820 cells"):
        draw_split(make_config(), screen.assign(**{column: values}), *LABELS)


def test_missing_controls_are_an_error(screen):
    with pytest.raises(DataError, match="no label is 'DMSO'; set perturbation_control_value"):
        draw_split(make_config(), screen, "condition", "+", "DMSO")


@pytest.mark.parametrize("task", ["combine", "combine_inverse"])
@pytest.mark.parametrize("delimiter", ["_", None])
def test_tasks_on_combinations_need_combinations(screen, task, delimiter):
    with pytest.raises(DataError, match=f"no combination for task {task}: .* delimiter {delimiter!r}"):
        draw_split(make_config(task), screen, "condition", delimiter, "control")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x,train\ny,val\nz,test\n",
            "names no cell of the data: it starts with x, y, z, the data with a, b, c",
        ),
        (
            "a,train\nb,validation\nc,test\nd,train\n",
            r"1 unknown splits \(validation\): use train, val, test",
        ),
        ("cell,split\na,train\nb,val\nc,test\nd,train\n", r"unknown splits \(split\).*no header line"),
        ("a,train\nb,val\n", r"lacks 2 of 4 cells of the data \(c, d\): add them"),
        ("a,train\nb,val\nc,test\nd,train\na,val\n", r"names 1 cells more than once \(a\)"),
        ("a\nb\nc\nd\n", "has 1 columns: give it two"),
        ("", "is no headerless CSV of cell and split"),
        (None, "does not exist: set split_path"),
    ],
)
def test_invalid_split_files_are_errors(tmp_path, text, message):
    path = tmp_path / "split.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_split_csv(path, list("abcd"))


@pytest.mark.parametrize(("labels", "empty"), [("train,train,val,val", "test"), ("val,val,val,test", "train")])
def test_a_split_file_with_an_empty_split_is_an_error(tmp_path, labels, empty):
    obs = pd.DataFrame({"condition": ["control", "P", "Q", "R"]}, index=list("abcd"))
    path = tmp_path / "split.csv"
    path.write_text("".join(f"{cell},{name}\n" for cell, name in zip("abcd", labels.split(","), strict=True)))
    with pytest.raises(DataError, match=f"no perturbed cell in {empty}: see .*split.csv"):
        PerturbationDataSplitter.split_dataset({"split_path": path}, obs, *LABELS)
    with pytest.raises(DataError, match="no perturbation column 'gene'"):
        PerturbationDataSplitter.split_dataset({"split_path": path}, obs, "gene", "+", "control")
