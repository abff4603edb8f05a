"""The choice of the backend, and the messages about a PerturBench that does not fit."""

import importlib
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.perturbench.backend import (
    EMBEDDED,
    VARIABLE,
    backend,
    check_data,
    load,
    load_embedded,
    locate,
)

OLD = """
class PerturbationModel:
    def __init__(self, datamodule, lr=None):
        pass
"""
NEW = """
class PerturbationModel:
    def __init__(self, n_genes, n_perts, transform, context, evaluation, **kwargs):
        pass
"""
MODEL = "modelcore.models.PerturbationModel"


@pytest.fixture
def no_package(monkeypatch):
    """No package ``perturbench`` is imported, and no backend is chosen."""
    imported = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "perturbench"}
    for name in imported:
        del sys.modules[name]
    monkeypatch.delenv(VARIABLE, raising=False)
    backend.cache_clear()
    yield monkeypatch
    backend.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "perturbench"]:
        del sys.modules[name]
    sys.modules.update(imported)


@pytest.fixture
def package(tmp_path, no_package):
    """Return a function that writes a package ``perturbench`` with one module of models, and makes it importable."""

    def write(models: str):
        (tmp_path / "perturbench" / "modelcore").mkdir(parents=True)
        for folder in ("perturbench", "perturbench/modelcore"):
            (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "perturbench" / "modelcore" / "models.py").write_text(models)
        no_package.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return tmp_path

    return write


def test_without_perturbench_the_embedded_subset_is_the_backend(no_package):
    assert locate("data.types.Batch") == f"{EMBEDDED}.data.types.Batch"


def test_an_importable_perturbench_is_the_backend(package):
    package(NEW)
    assert backend() == "perturbench"
    assert load(MODEL).__module__ == "perturbench.modelcore.models"


@pytest.mark.parametrize(
    ("choice", "expected"), [("embedded", EMBEDDED), ("perturbench", "perturbench"), ("", "perturbench")]
)
def test_the_variable_forces_a_backend(package, no_package, choice, expected):
    package(NEW)
    no_package.setenv(VARIABLE, choice)
    assert backend() == expected


def test_the_embedded_subset_can_be_loaded_beside_perturbench(package):
    package(NEW)
    assert load_embedded("data.types.Batch").__module__ == f"{EMBEDDED}.data.types"


def test_an_unknown_choice_is_an_error(no_package):
    no_package.setenv(VARIABLE, "both")
    with pytest.raises(InputError, match="PRIMEFLOW_BENCHMARK: found 'both', expected 'embedded' or 'perturbench'"):
        backend()


def test_forcing_a_missing_perturbench_is_an_error(no_package):
    no_package.setenv(VARIABLE, "perturbench")
    with pytest.raises(InputError, match="the package perturbench cannot be imported; install it"):
        backend()


def test_a_mere_folder_named_perturbench_is_not_a_package(tmp_path, no_package):
    (tmp_path / "perturbench" / "src").mkdir(parents=True)
    no_package.syspath_prepend(tmp_path)
    assert backend() == EMBEDDED


def test_a_perturbench_before_the_redesign_is_too_old(package):
    package(OLD)
    with pytest.raises(InputError) as caught:
        load(MODEL)
    assert str(caught.value) == (
        "the installed PerturBench lacks the arguments n_genes, n_perts, transform, context, evaluation of "
        "perturbench.modelcore.models.PerturbationModel; install its commit c84038bc or a later one, or set "
        "PRIMEFLOW_BENCHMARK=embedded to use the embedded subset"
    )


@pytest.mark.parametrize("name", ["modelcore.models.Other", "data.modules.AnnDataLitModule"])
def test_a_perturbench_without_a_name_is_too_old(package, name):
    package(NEW)
    with pytest.raises(InputError, match=f"the installed PerturBench lacks perturbench.{name}; install its commit"):
        load(name)


def test_a_library_that_perturbench_lacks_is_reported_as_it_is(package):
    package("import a_library_that_does_not_exist\n" + NEW)
    with pytest.raises(ModuleNotFoundError, match="'a_library_that_does_not_exist'"):
        load(MODEL)


@pytest.mark.slow
def test_the_command_reports_an_old_perturbench_without_a_traceback(package, tmp_path, screen_path):
    environment = os.environ | {"PYTHONPATH": str(package(OLD)), VARIABLE: "perturbench"}
    command = [sys.executable, "-m", "primeflow_perturbench.cli.train", f"data.data.filename={screen_path}"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the installed PerturBench lacks" in done.stderr
    assert "Traceback" not in done.stderr


DATASETS = """
class SingleCellPerturbation:
    @staticmethod
    def from_anndata(adata, perturbation_key, covariate_keys=None): ...


class CounterfactualWithReference(SingleCellPerturbation): ...
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"filename": "a.h5ad", "backed": True}}, "data.data.backed"),
        ({"data_iter_factory": {"covariate_keys": []}}, "without covariates"),
        ({"data_iter_factory": {"seed": 1}}, r"no setting data.data_iter_factory.seed"),
        ({"evaluation": {"test_data_iter_factory": {"cells": 1}}}, r"data.evaluation.test_data_iter_factory.cells"),
        ({}, None),
    ],
)
def test_data_settings_that_perturbench_cannot_follow_are_refused_before_a_run(package, change, message):
    (package(NEW) / "perturbench" / "datasets.py").write_text(DATASETS)
    names = ("SingleCellPerturbation", "CounterfactualWithReference")
    measured, predicted = ({"_target_": f"perturbench.datasets.{name}.from_anndata"} for name in names)
    settings = {
        "data": {"filename": "a.h5ad"},
        "data_iter_factory": measured
        | {"_partial_": True, "perturbation_key": "condition", "covariate_keys": ["line"]},
        "evaluation": {"test_data_iter_factory": predicted},
    }
    data = OmegaConf.to_container(OmegaConf.merge(settings, change))
    if message is None:
        check_data(data)
        return
    with pytest.raises(InputError, match=message):
        check_data(data)


def test_the_embedded_subset_follows_all_data_settings(no_package):
    no_package.setenv(VARIABLE, "embedded")
    check_data({"data": {"filename": "a.h5ad", "backed": True}, "data_iter_factory": {}})
