"""The narrowed split; no held-out cell gets into training under any spelling."""

import itertools
import re
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from primeflow_perturbench.cli import main
from primeflow_perturbench.data.atlas.narrowing import canonical_labels, check_leaks, narrow, set_apart
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.embedded.data.datasplitter import read_split_csv

LABELS = ["control", "A", "B", "C", "D", "A+B"]
H1 = {"cell_type": "H1"}


def table(lines=("H1", "K562", "HepG2"), labels=LABELS, cells=4):
    rows = list(itertools.product(lines, labels, range(cells)))
    obs = pd.DataFrame({"cell_type": [row[0] for row in rows], "condition": [row[1] for row in rows]})
    obs["dataset"] = "atlas"
    return obs.set_index(obs.index.map("cell{}".format)).astype("category")


def counts(obs, split):
    """Number of cells by line, label and split."""
    return obs.astype(str).groupby(["cell_type", "condition", split.to_numpy()]).size().to_dict()


def test_canonical_labels_are_sorted_parts_without_control():
    given = pd.Series(["B+A", " a + b ", "control", "Control+A", "A+A", "control+control"])
    assert canonical_labels(given, "control", "+").tolist() == ["a\nb", "a\nb", "", "a", "a", ""]
    assert canonical_labels(pd.Series(["B+A"]), "control", None).tolist() == ["b+a"]


def test_training_has_the_context_and_test_perturbations_elsewhere():
    obs = table()
    split = narrow(obs, context=H1, test=["A", "A+B"], val_fraction=0.3)
    (validated,) = set(obs.condition[split == "val"]) - {"control"}
    assert validated in {"B", "C", "D"}
    found = counts(obs, split)
    for label in LABELS[1:]:
        here = "test" if label in ("A", "A+B") else "val" if label == validated else "train"
        elsewhere = "unused" if here == "train" else "train"
        assert found["H1", label, here] == found["K562", label, elsewhere] == found["HepG2", label, elsewhere] == 4
    assert [found["H1", "control", name] for name in ("train", "val", "test")] == [2, 1, 1]
    assert found["K562", "control", "train"] == 4
    assert sum(found.values()) == len(obs)


def test_validation_perturbations_depend_on_the_seed_and_are_measured_elsewhere():
    obs = table()
    obs = obs[~((obs.cell_type != "H1") & obs.condition.isin(["B", "C"]))]
    draws = {frozenset(obs.condition[narrow(obs, context=H1, test=["A"], seed=s) == "val"]) for s in range(6)}
    assert {name for draw in draws for name in draw} == {"D", "A+B", "control"}
    first, again = (narrow(obs, context=H1, test=["A"], seed=3) for _ in range(2))
    assert first.equals(again)


def test_other_spellings_of_context_and_label_are_held_out():
    obs = table(lines=["H1", "h1 ", "K562"], labels=[*LABELS, "B+A"])
    split = narrow(obs, context=H1, test=["A+B"], val_fraction=0.3)
    swapped = obs.condition == "B+A"
    assert set(split[swapped & (obs.cell_type != "K562")]) == {"test"}
    assert set(split[swapped & (obs.cell_type == "K562")]) == {"train"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"context": {"cell_type": "H9"}}, "no cell of the context cell_type 'H9'"),
        ({"context": {}}, "no cell of the context"),
        ({"context": {"line": "H1"}}, "obs has no column 'line'; its columns are cell_type, condition, dataset"),
        ({"test": ["A", "E"]}, r"of 2 test perturbations 1 are control or in no cell \('E'\)"),
        ({"test": ["control"]}, r"of 1 test perturbations 1 are control or in no cell \('control'\)"),
        ({"test": []}, "none given"),
        ({"test": LABELS[1:]}, "none was measured elsewhere"),
        ({"test": LABELS[2:]}, "has no perturbation left to train on"),
        ({"val_fraction": 0}, "val_fraction must be above 0 and below 1, got 0"),
    ],
)
def test_impossible_narrowing_is_an_error(given, sentence):
    with pytest.raises(InputError, match=sentence):
        narrow(table(), **{"context": H1, "test": ["A"]} | given)


HELDOUT = pd.DataFrame({"cell_type": ["H1", "H1", "H1"], "condition": ["A", "B+C", "control"]})


def planted(line, label, dataset="private"):
    """Cells that may be in training, and three others."""
    fine = pd.DataFrame(
        [("K562", "A"), ("H1", "B"), ("H1", "C"), ("H1", "A+B"), ("H1", "control"), ("K562", "B+C")],
        columns=["cell_type", "condition"],
    ).assign(dataset="public")
    bad = pd.DataFrame({"cell_type": [line] * 3, "condition": [label] * 3, "dataset": [dataset] * 3})
    return pd.concat([fine, bad], ignore_index=True)


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("H1", "A"),
        (" h1", "A"),
        ("H1", " a "),
        ("H1", "C+B"),
        ("H1", "B + C"),
        ("H1", "B+control+C"),
        ("H1", "control+A"),
    ],
)
def test_leaked_cell_is_found_in_any_spelling(line, label):
    sentence = re.escape(f"3 cells of held-out conditions would be trained on: 3 of condition {label!r}, cell_type")
    with pytest.raises(InputError, match=f"{sentence}.*dataset 'private'"):
        check_leaks(planted(line, label), HELDOUT, context_keys=["cell_type"])


@pytest.mark.parametrize(("line", "label"), [("H1", "D"), ("K562", "A"), ("H1", "A+C"), ("H1", "control+B")])
def test_single_parts_other_contexts_and_controls_are_not_leaks(line, label):
    check_leaks(planted(line, label), HELDOUT, context_keys=["cell_type"])


def test_without_context_keys_a_held_out_label_leaks_from_any_context():
    with pytest.raises(InputError, match="4 cells of held-out conditions.*and 1 more"):
        check_leaks(planted("K562", "A"), HELDOUT.iloc[:1], context_keys=[])


def test_set_apart_uses_no_cell_of_the_context():
    obs = table(cells=100)
    split = set_apart(obs, context={"cell_type": "h1"}, heldout_fraction=0.1)
    assert set(split[obs.cell_type == "H1"]) == {"unused"}
    shares = split[obs.cell_type != "H1"].value_counts(normalize=True)
    assert set(shares.index) == {"train", "val", "test"}
    assert shares.val == pytest.approx(0.1, abs=0.03)
    assert shares.test == pytest.approx(0.1, abs=0.03)
    with pytest.raises(InputError, match="all cells belong to the context"):
        set_apart(obs[obs.cell_type == "H1"], context=H1)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["primeflow", "data", "split", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_command_writes_a_split_that_a_run_reads(tmp_path, monkeypatch, capsys):
    obs = table()
    ad.AnnData(np.zeros((len(obs), 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "one_a_line.csv").write_text("A\nA+B\n")
    (tmp_path / "table.csv").write_text("n_cells,condition\n5,A\n6,A+B\n6,A\n")
    expected = narrow(obs, context=H1, test=["A", "A+B"])
    for test in ("one_a_line.csv", "table.csv"):
        given = [tmp_path / "cells.h5ad", tmp_path / "split.csv", "--test-perturbations", tmp_path / test]
        assert call(monkeypatch, *given, "--context", "cell_type=H1") == 0
        assert f"train: {(expected == 'train').sum()} cells" in capsys.readouterr().out
        read = read_split_csv(tmp_path / "split.csv", obs.index)
        assert read.fillna("unused").tolist() == expected.tolist()
    assert call(monkeypatch, *given, "--context", "H1") == 2
    assert "--context 'H1': expected COLUMN=VALUE" in capsys.readouterr().err
    assert call(monkeypatch, *given[:2], "--context", "cell_type=H1") == 2
    assert "found no --test-perturbations" in capsys.readouterr().err
    assert call(monkeypatch, *given[:2], "--context", "cell_type=H1", "--task", "set_apart") == 0
    assert read_split_csv(tmp_path / "split.csv", obs.index)[obs.cell_type == "H1"].isna().all()
