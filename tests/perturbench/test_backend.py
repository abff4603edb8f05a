"""Which backend answers, and what is said of one that does not fit. Each case in a process: choice and imports stay."""

import os
import subprocess
import sys

import pytest

from primeflow_perturbench.perturbench.backend import EMBEDDED

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


def ask(code, path="", choice=None):
    """What ``code`` prints, and the last line of its errors, with ``path`` importable."""
    environment = {name: value for name, value in os.environ.items() if name != "PRIMEFLOW_BENCHMARK"}
    environment["PYTHONPATH"] = str(path)
    if choice is not None:
        environment["PRIMEFLOW_BENCHMARK"] = choice
    code = "from primeflow_perturbench.perturbench.backend import backend, load, locate\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture
def package(tmp_path):
    """Writes a package ``perturbench`` with one model module."""

    def write(models):
        (tmp_path / "perturbench" / "modelcore").mkdir(parents=True)
        for folder in ("perturbench", "perturbench/modelcore"):
            (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "perturbench" / "modelcore" / "models.py").write_text(models)
        return tmp_path

    return write


def test_without_perturbench_the_embedded_subset_answers():
    assert ask("print(locate('data.types.Batch'))")[0] == f"{EMBEDDED}.data.types.Batch"


def test_perturbench_answers_where_it_can_be_imported(package):
    path = package(NEW)
    assert ask("print(backend())", path)[0] == "perturbench"
    said = ask("print(load('modelcore.models.PerturbationModel').__module__)", path)[0]
    assert said == "perturbench.modelcore.models"


@pytest.mark.parametrize(
    ("choice", "expected"), [("embedded", EMBEDDED), ("perturbench", "perturbench"), ("", "perturbench")]
)
def test_the_variable_forces_one(package, choice, expected):
    assert ask("print(backend())", package(NEW), choice)[0] == expected


def test_a_choice_that_is_none_is_refused():
    assert "PRIMEFLOW_BENCHMARK is 'both'; set it to 'embedded' or 'perturbench'" in ask("backend()", choice="both")[1]


def test_a_forced_perturbench_that_is_not_there_is_named():
    assert "no package perturbench can be imported; install it" in ask("backend()", choice="perturbench")[1]


def test_a_mere_folder_of_the_name_is_no_package(tmp_path):
    (tmp_path / "perturbench" / "src").mkdir(parents=True)
    assert ask("print(backend())", tmp_path)[0] == EMBEDDED


def test_a_perturbench_before_the_redesign_is_too_old(package):
    _, error = ask("load('modelcore.models.PerturbationModel')", package(OLD))
    assert error.endswith(
        "the installed PerturBench lacks the arguments n_genes, n_perts, transform, context, evaluation of "
        "perturbench.modelcore.models.PerturbationModel: install its commit c84038bc or a later one, or set "
        "PRIMEFLOW_BENCHMARK=embedded to use the embedded subset"
    )


@pytest.mark.parametrize("name", ["modelcore.models.Other", "data.modules.AnnDataLitModule"])
def test_a_name_that_it_lacks_is_too_old_as_well(package, name):
    _, error = ask(f"load('{name}')", package(NEW))
    assert f"the installed PerturBench lacks perturbench.{name}: install its commit c84038bc" in error


def test_a_library_that_perturbench_misses_is_no_question_of_age(package):
    path = package("import a_library_that_is_not_there\n" + NEW)
    _, error = ask("load('modelcore.models.PerturbationModel')", path)
    assert error == "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"


def test_the_command_answers_in_one_sentence(package, tmp_path, screen_path):
    environment = os.environ | {"PYTHONPATH": str(package(OLD)), "PRIMEFLOW_BENCHMARK": "perturbench"}
    command = [sys.executable, "-m", "primeflow_perturbench.cli.train", f"data.data.filename={screen_path}"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the installed PerturBench lacks" in done.stderr
    assert "Traceback" not in done.stderr
