import io

import numpy as np
import pandas as pd
import pytest
import torch

from primeflow_perturbench.conditions.table import encode_conditions, read_table
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.backend import load

CONTEXT = {
    "perturbation_uniques": ["G2", "G0", "G1", "TP53"],
    "covariate_uniques": {"line": ["beta", "alpha"], "dose": None},
    "perturbation_key": "condition",
    "covariate_keys": ["line", "dose"],
    "perturbation_combination_delimiter": "+",
    "perturbation_control_value": "control",
}
PLAIN = {**CONTEXT, "covariate_uniques": {"line": ["beta", "alpha"]}, "covariate_keys": ["line"]}
EMBEDDINGS = pd.DataFrame(
    np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), index=["G1", "NEW", "G0", "G2", "TP53"]
)
TABLE = """\
condition,line,dose,note
G0+G1,alpha,0.5,x
control,beta,1,y
G2,beta,2e1,z
"""


def table(text=TABLE):
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)


def of(*labels, **columns):
    """A table of these conditions in line alpha."""
    return pd.DataFrame({"condition": labels, "line": "alpha", **columns})


def encode(rows, context=PLAIN, n_cells=7, **settings):
    return encode_conditions(rows, context, n_cells, **settings)


def refused(rows, context=PLAIN, **settings):
    with pytest.raises(InputError) as error:
        encode(rows, context, where="c.csv", **settings)
    return str(error.value)


# --- tensors


def test_the_columns_of_the_tensors_are_in_the_order_of_the_training_context():
    found = encode(table(), CONTEXT)
    assert found.perturbations.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert found.covariates["line"].tolist() == [[0, 1], [1, 0], [1, 0]]
    assert found.covariates["dose"].tolist() == [[0.5], [1], [20]]
    assert {tensor.dtype for tensor in (found.perturbations, *found.covariates.values())} == {torch.float32}
    assert found.obs.columns.tolist() == ["line", "dose", "condition"]
    assert found.obs["condition"].tolist() == ["G0+G1", "control", "G2"]
    assert found.counts.tolist() == [7, 7, 7]


def test_a_data_frame_of_numbers_and_categories_is_read_like_text():
    rows = table().assign(dose=[0.5, 1.0, 20.0]).astype({"line": "category"})
    for name, tensor in encode(table(), CONTEXT).covariates.items():
        assert torch.equal(encode(rows, CONTEXT).covariates[name], tensor)


@pytest.mark.parametrize("embeddings", [None, EMBEDDINGS])
def test_tensors_are_those_of_the_training_transform(embeddings):
    """What the model saw in training and what it is asked now is one encoding."""
    pipeline = load("data.transforms.pipelines.LinearModelPipeline")(
        PLAIN["perturbation_uniques"], PLAIN["covariate_uniques"], perturbation_embeddings=embeddings
    )
    labels = ["G0+G1", "control", "TP53", "control+G2", "G2+TP53"]
    parts = [("G0", "G1"), (), ("TP53",), ("G2",), ("G2", "TP53")]
    batch = load("data.types.Batch")(np.zeros((5, 1)), parts, {"line": np.array(["alpha"] * 5, dtype=object)})
    found = encode(of(*labels), perturbation_embeddings=embeddings)
    assert torch.equal(found.perturbations, pipeline(batch).perturbations)
    assert torch.equal(found.covariates["line"], pipeline(batch).covariates["line"])


def test_the_order_of_parts_does_not_matter():
    embeddings = EMBEDDINGS * 1e3
    for given in (None, embeddings):
        one = encode(of("G0+G1+G2"), perturbation_embeddings=given).perturbations
        assert torch.equal(encode(of("G2+G0+G1"), perturbation_embeddings=given).perturbations, one)


def test_embeddings_are_the_sum_of_the_parts_rows_and_zero_for_control():
    found = encode(of("G0+NEW", "control", "TP53"), perturbation_embeddings=EMBEDDINGS).perturbations
    expected = [EMBEDDINGS.loc["G0"] + EMBEDDINGS.loc["NEW"], [0, 0, 0], EMBEDDINGS.loc["TP53"]]
    np.testing.assert_allclose(found, np.array(expected, dtype=np.float32), rtol=1e-6)


def test_without_a_delimiter_a_label_is_one_perturbation():
    context = {**PLAIN, "perturbation_combination_delimiter": None, "perturbation_uniques": ["A+B", "A"]}
    assert encode(of("A+B"), context).perturbations.tolist() == [[1, 0]]


def test_a_screen_without_covariates_needs_only_the_perturbation():
    context = {**PLAIN, "covariate_uniques": {}, "covariate_keys": []}
    found = encode(pd.DataFrame({"condition": ["G0", "G1"]}), context, control_cells=3)
    assert found.covariates == {}
    assert found.obs["condition"].tolist() == ["G0", "G1", "control"]
    assert found.counts.tolist() == [7, 7, 3]


# --- numbers of cells


def test_the_column_of_cell_numbers_wins():
    assert encode(of("G0", "G1", n_cells=["3", "10.0"]), n_cells=7).counts.tolist() == [3, 10]
    assert encode(of("G0", "G1", n_cells=[3, 1]), n_cells=7).counts.tolist() == [3, 1]


@pytest.mark.parametrize("bad", ["", "ten", "0", "-4", "2.5", "inf", None])
def test_a_bad_number_of_cells_names_its_row(bad):
    sentence = refused(of("G0", "G1", n_cells=["5", bad]))
    assert sentence == f"c.csv, row 2: n_cells must be a positive whole number, got {str(bad)!r}"


def test_a_bad_setting_of_cells_is_refused():
    assert refused(of("G0"), n_cells=0) == "n_cells must be a positive whole number, got '0'"
    assert "control_cells must be" in refused(of("G0"), control_cells=-1)


# --- controls


def test_controls_are_added_once_for_each_combination_of_covariates_that_lacks_them():
    rows = pd.DataFrame(
        {"condition": ["G0", "G1", "control", "G2"], "line": ["beta", "alpha", "beta", "alpha"], "n_cells": 5}
    )
    found = encode(rows, control_cells=9)
    assert found.obs.iloc[4:].to_numpy().tolist() == [["alpha", "control"]]
    assert found.counts.tolist() == [5, 5, 5, 5, 9]
    assert found.perturbations[4].tolist() == [0, 0, 0, 0]
    assert found.covariates["line"][4].tolist() == [0, 1]
    assert len(encode(rows)) == 4


def test_a_continuous_covariate_parts_the_controls():
    found = encode(table("condition,line,dose\nG0,alpha,1\nG1,alpha,2\nG2,alpha,1.0\n"), CONTEXT, control_cells=1)
    assert found.obs.loc[3:, "dose"].tolist() == [1.0, 2.0]


# --- bad tables


def test_unknown_perturbations_are_listed_with_the_nearest_known_name():
    sentence = refused(of("TP53+NOVEL", "tp5 3", "TP35", "G0"))
    assert sentence.startswith("c.csv, column 'condition' has 3 perturbations not seen in training, 'NOVEL', 'tp5 3'")
    assert "'TP35' (did you mean 'TP53'?)" in sentence
    many = refused(of(*[f"new{i}" for i in range(13)]))
    assert "'new9' and 3 more" in many
    assert "new10" not in many


def test_an_unseen_pair_of_seen_perturbations_is_fine():
    assert encode(of("G2+TP53")).perturbations.tolist() == [[1, 0, 0, 1]]


def test_missing_embeddings_are_listed():
    sentence = refused(of("G0", "NEWER"), perturbation_embeddings=EMBEDDINGS)
    assert "1 perturbation without a row in the perturbation embeddings, 'NEWER'" in sentence


def test_an_unknown_category_names_column_value_and_known_values():
    sentence = refused(of("G0").assign(line="alhpa"))
    assert "c.csv, column 'line' has 1 value not seen in training, 'alhpa' (did you mean 'alpha'?)" in sentence
    assert "known values are 'beta', 'alpha'" in sentence


@pytest.mark.parametrize("bad", ["high", "inf"])
def test_a_continuous_covariate_must_be_a_number(bad):
    sentence = refused(table().assign(dose=["1", "2", bad]), CONTEXT)
    assert f"row 3 has '{bad}' in column 'dose'" in sentence


def test_missing_columns_are_named_beside_those_that_are_there():
    sentence = refused(pd.DataFrame({"perturbation": ["G0"], "line": ["alpha"]}))
    assert "c.csv has no column 'condition'; its columns are 'perturbation', 'line'" in sentence


@pytest.mark.parametrize("blank", ["", "  ", None, np.nan])
def test_a_missing_value_names_row_and_column(blank):
    assert "c.csv, row 2 has no value in column 'line'" in refused(of("G0", "G1").assign(line=["alpha", blank]))
    assert "c.csv, row 1 has no value in column 'condition'" in refused(of(blank, "G1"))


@pytest.mark.parametrize("again", ["G0+G1", "G1+G0", "G1+control+G0"])
def test_a_repeated_condition_is_refused(again):
    sentence = refused(of("G0+G1", "G2", again))
    assert f"rows 1 and 3 are the same condition (alpha, {again}); merge them" in sentence
    other = of("G0+G1", "G2", again).assign(line=["alpha", "alpha", "beta"])
    assert len(encode(other)) == 3


def test_an_empty_table_is_refused():
    assert "c.csv has no row" in refused(of())


# --- files


def test_a_file_is_read_as_text(tmp_path):
    (tmp_path / "c.csv").write_text("condition,line\nNA,1\n007,nan\n")
    assert read_table(tmp_path / "c.csv").to_numpy().tolist() == [["NA", "1"], ["007", "nan"]]


def test_bad_files_are_named(tmp_path):
    for name, content, expected in [
        ("empty.csv", b"", "is empty"),
        ("ragged.csv", b"condition\nG0\nG0,1,2\n", "cannot be read as a CSV table"),
        ("binary.csv", b"\x89HDF\xff\xfe\x00", "cannot be read as a CSV table"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.*{expected}"):
            read_table(tmp_path / name)
    with pytest.raises(InputError, match="there is no table of conditions .*absent.csv"):
        read_table(tmp_path / "absent.csv")
