"""Manifests: what is read, and the messages for what is invalid."""

import re
from pathlib import Path

import pytest
import yaml

from primeflow_perturbench.data.atlas.manifest import AtlasFile, read_manifest
from primeflow_perturbench.errors import InputError

FILE = {"path": "a.h5ad", "dataset": "first"}


def write(folder, **content) -> Path:
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def error_of(path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_keys_have_defaults_and_paths_are_relative_to_the_manifest(tmp_path):
    manifest = read_manifest(write(tmp_path, files=[FILE]))
    assert manifest.files == (AtlasFile(path=tmp_path / "a.h5ad", dataset="first"),)
    assert manifest.files[0].control == ("control",)
    assert (manifest.covariates, manifest.genes) == ((), "union")


def test_all_keys_are_read(tmp_path):
    (tmp_path / "genes.csv").write_text("TP53,extra\nMYC\n\n")
    full = {
        **FILE,
        "modality": "CRISPRi",
        "perturbation_key": "guide",
        "control": ["NT", "safe"],
        "delimiter": None,
        "covariates": {"cell_type": "line"},
        "constants": {"dose": 0.5},
        "gene_key": "symbol",
        "x": "counts",
        "duplicate_genes": "first",
    }
    path = write(tmp_path, genes="genes.csv", covariates=["cell_type", "method", "dose"], files=[full])
    manifest = read_manifest(path)
    assert manifest.genes == ("TP53", "MYC")
    assert manifest.covariates == ("cell_type", "method", "dose")
    assert manifest.files == (
        AtlasFile(
            path=tmp_path / "a.h5ad",
            dataset="first",
            perturbation_key="guide",
            control=("NT", "safe"),
            delimiter=None,
            covariates={"cell_type": "line"},
            constants={"dose": 0.5, "method": "CRISPRi"},
            gene_key="symbol",
            x="counts",
            duplicate_genes="first",
        ),
    )


@pytest.mark.parametrize("own", [{"covariates": {"method": "assay"}}, {"constants": {"method": "CRISPRa"}}])
def test_column_or_constant_overrides_the_modality(tmp_path, own):
    path = write(tmp_path, covariates=["method"], files=[{**FILE, "modality": "CRISPRi", **own}])
    (file,) = read_manifest(path).files
    assert "CRISPRi" not in file.constants.values()
    assert {**file.covariates, **file.constants} == {k: v for each in own.values() for k, v in each.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"perturbation_ky": "x"}, "files[0]: found the unknown key 'perturbation_ky', .* mean 'perturbation_key'"),
        ({"path": None}, "files[0], path: found None, expected text; give the path of the file."),
        ({"dataset": " "}, "files[0], dataset: found ' ', expected text"),
        ({"x": "raw"}, "files[0], x: found 'raw', expected 'log1p' or 'counts'"),
        ({"duplicate_genes": "sum"}, "duplicate_genes: found 'sum', expected 'error' or 'first'"),
        ({"control": False}, "control: found False, expected the label of the control cells, or a list; put words"),
        ({"control": []}, "control: found [], expected the label"),
        ({"delimiter": ""}, "delimiter: found '', expected text; write null if no label is a combination"),
        ({"covariates": {"celltype": "x"}}, "covariates: found 'celltype', expected covariates of the atlas, 'cell_ty"),
        ({"covariates": ["cell_type"]}, "covariates: found ['cell_type'], expected a mapping from covariates to col"),
        ({"constants": {"cell_type": True}}, "constants, cell_type: found True, expected text or a number"),
        (
            {"constants": {"cell_type": "T"}, "covariates": {"cell_type": "line"}},
            "files[0]: found the covariate 'cell_type' under covariates and under constants, expected one of the two",
        ),
    ],
)
def test_invalid_description_of_a_file_is_an_error(tmp_path, change, sentence):
    path = write(tmp_path, covariates=["cell_type"], files=[{**FILE, **change}])
    text = error_of(path)
    assert text.startswith(str(path))
    assert re.search(re.escape(sentence).replace(re.escape(".*"), ".*"), text), text


def test_invalid_manifest_is_an_error(tmp_path):
    assert error_of(write(tmp_path, files=[])).endswith(
        "found [], expected a list of files; give the path and dataset of each file."
    )
    assert "files[0]: found 'a.h5ad', expected a mapping" in error_of(write(tmp_path, files=["a.h5ad"]))
    assert "unknown key 'gene', expected keys among 'files', 'covariates', 'genes'; did you mean 'genes'?" in error_of(
        write(tmp_path, files=[FILE], gene="union")
    )
    twice = [FILE, {**FILE, "path": "b.h5ad"}]
    assert "files: found the dataset 'first' more than once" in error_of(write(tmp_path, files=twice))
    assert "covariates: found 'cell_type', expected a list" in error_of(
        write(tmp_path, files=[FILE], covariates="cell_type")
    )
    assert "covariates: found 'a' more than once" in error_of(write(tmp_path, files=[FILE], covariates=["a", "a"]))


def test_invalid_choice_of_genes_is_an_error(tmp_path):
    assert "genes: found 'all', and no such file, expected union" in error_of(
        write(tmp_path, files=[FILE], genes="all")
    )
    assert "genes: found 'TP53' more than once" in error_of(write(tmp_path, files=[FILE], genes=["TP53", "TP53"]))
    (tmp_path / "genes.csv").write_text("\n")
    assert "genes.csv: found no names" in error_of(write(tmp_path, files=[FILE], genes="genes.csv"))


def test_missing_or_malformed_yaml_is_an_error(tmp_path):
    path = write(tmp_path, files=[FILE])
    assert error_of(tmp_path / "manifets.yaml") == (
        f"{tmp_path / 'manifets.yaml'}: found no such file, expected an atlas manifest (YAML); "
        "did you mean 'manifest.yaml'?."
    )
    assert "found a folder" in error_of(tmp_path)
    path.write_text("files: [\n  - path: a\n")
    assert "found text that is not YAML in line " in error_of(path)
    path.write_text("")
    assert "found no keys at all" in error_of(path)
