"""What a manifest may say, and the sentence for what it may not."""

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


def said(path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_said_has_a_default_and_paths_are_relative_to_the_manifest(tmp_path):
    manifest = read_manifest(write(tmp_path, files=[FILE]))
    assert manifest.files == (AtlasFile(path=tmp_path / "a.h5ad", dataset="first"),)
    assert manifest.files[0].control == ("control",)
    assert (manifest.covariates, manifest.genes) == ((), "union")


def test_everything_that_can_be_said_is_read(tmp_path):
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
def test_a_column_or_a_constant_goes_before_the_modality(tmp_path, own):
    path = write(tmp_path, covariates=["method"], files=[{**FILE, "modality": "CRISPRi", **own}])
    (file,) = read_manifest(path).files
    assert "CRISPRi" not in file.constants.values()
    assert {**file.covariates, **file.constants} == {k: v for each in own.values() for k, v in each.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"perturbation_ky": "x"}, "files[0]: found the unknown key 'perturbation_ky', .* mean 'perturbation_key'"),
        ({"cell_suffix": "x"}, "files[0]: found the unknown key 'cell_suffix'"),
        ({"path": None}, "files[0], path: found None, expected a text; give the file's path."),
        ({"dataset": " "}, "files[0], dataset: found ' ', expected a text"),
        ({"x": "raw"}, "files[0], x: found 'raw', expected 'log1p' or 'counts'"),
        ({"duplicate_genes": "sum"}, "duplicate_genes: found 'sum', expected 'refuse' or 'first'"),
        ({"control": False}, "control: found False, expected the label of the control cells, or a list; put a word"),
        ({"control": []}, "control: found [], expected the label"),
        ({"delimiter": ""}, "delimiter: found '', expected a text; write null where no label is a combination"),
        ({"covariates": {"celltype": "x"}}, "covariates: found 'celltype', expected covariates of the atlas, 'cell_ty"),
        ({"covariates": ["cell_type"]}, "covariates: found ['cell_type'], expected a mapping from covariates to col"),
        ({"constants": {"cell_type": True}}, "constants, cell_type: found True, expected a text or a number"),
        (
            {"constants": {"cell_type": "T"}, "covariates": {"cell_type": "line"}},
            "files[0]: found the covariate 'cell_type' under covariates and under constants, expected one of the two",
        ),
    ],
)
def test_a_file_that_is_described_wrongly(tmp_path, change, sentence):
    path = write(tmp_path, covariates=["cell_type"], files=[{**FILE, **change}])
    text = said(path)
    assert text.startswith(str(path))
    assert re.search(re.escape(sentence).replace(re.escape(".*"), ".*"), text), text


def test_a_manifest_that_is_wrong_as_a_whole(tmp_path):
    assert said(write(tmp_path, files=[])).endswith(
        "found [], expected a list of files; give each file's path and dataset."
    )
    assert "files[0]: found 'a.h5ad', expected a mapping" in said(write(tmp_path, files=["a.h5ad"]))
    assert "unknown key 'gene', expected keys among 'files', 'covariates', 'genes'; did you mean 'genes'?" in said(
        write(tmp_path, files=[FILE], gene="union")
    )
    twice = [FILE, {**FILE, "path": "b.h5ad"}]
    assert "files: found the dataset 'first' more than once" in said(write(tmp_path, files=twice))
    assert "covariates: found 'cell_type', expected a list" in said(
        write(tmp_path, files=[FILE], covariates="cell_type")
    )
    assert "covariates: found 'a' more than once" in said(write(tmp_path, files=[FILE], covariates=["a", "a"]))


def test_genes_that_are_asked_for_wrongly(tmp_path):
    assert "genes: found 'all', and no such file, expected union" in said(write(tmp_path, files=[FILE], genes="all"))
    assert "genes: found 'TP53' more than once" in said(write(tmp_path, files=[FILE], genes=["TP53", "TP53"]))
    (tmp_path / "genes.csv").write_text("\n")
    assert "genes.csv: found no names" in said(write(tmp_path, files=[FILE], genes="genes.csv"))


def test_a_manifest_that_is_no_yaml_or_not_there(tmp_path):
    path = write(tmp_path, files=[FILE])
    assert said(tmp_path / "manifets.yaml") == (
        f"{tmp_path / 'manifets.yaml'}: found no such file, expected an atlas manifest (YAML); "
        "did you mean 'manifest.yaml'?."
    )
    assert "found a folder" in said(tmp_path)
    path.write_text("files: [\n  - path: a\n")
    assert "found text that is no YAML in line " in said(path)
    path.write_text("")
    assert "found no keys at all" in said(path)


DESCRIPTION = {
    "_target_": "data.modules.H5LitModule",
    "data": {"filename": ["${paths.data_dir}/one.h5ad", "two.h5ad"], "append_dataset_to_index": True},
    "data_iter_factory": {
        "_target_": "data.datasets.h5.SingleCellPerturbation.from_h5",
        "perturbation_key": "guide",
        "perturbation_combination_delimiter": "|",
        "perturbation_control_value": "NT",
        "covariate_keys": ["cell_type", "dataset"],
        "feature_filter_path": None,
    },
    "splitter": {"split_path": "${nowhere}"},
}


@pytest.mark.parametrize("whole", [False, True])
def test_a_description_of_perturbench_is_a_manifest(tmp_path, monkeypatch, whole):
    monkeypatch.setenv("PRIMEFLOW_DATA", "/cells")
    path = write(tmp_path, **({"data": DESCRIPTION, "seed": 1} if whole else DESCRIPTION))
    manifest = read_manifest(path)
    assert [file.path for file in manifest.files] == [Path("/cells/one.h5ad"), Path("two.h5ad")]
    assert [file.cell_suffix for file in manifest.files] == ["-f0-{dataset}", "-f1-{dataset}"]
    assert {(file.perturbation_key, file.control, file.delimiter) for file in manifest.files} == {
        ("guide", ("NT",), "|")
    }
    assert all(file.covariates == {"dataset": "dataset"} for file in manifest.files)
    assert (manifest.genes, manifest.covariates) == ("intersection", ("cell_type", "dataset"))
    assert manifest.drop_absent_genes


def test_a_description_of_perturbench_can_be_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {**DESCRIPTION, "data": {"filename": ["${paths.nowhere}/one.h5ad"]}}
    assert "manifest.yaml: found a value that cannot be resolved" in said(write(tmp_path, **wrong))
    assert "found no data.filename or no data_iter_factory" in said(write(tmp_path, data={"filename": "a.h5ad"}))
    factory = {**DESCRIPTION["data_iter_factory"], "feature_filter_path": "genes.csv"}
    assert "'" + str(tmp_path / "genes.csv") + "', and no such file" in said(
        write(tmp_path, **{**DESCRIPTION, "data_iter_factory": factory})
    )
