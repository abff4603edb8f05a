"""Our Hydra plugin shows our configurations to PerturBench's applications and changes no other application."""

import subprocess
import sys

import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins

from hydra_plugins.primeflow_perturbench import PRiMeFlowSearchPath

APP = """
import pkgutil
import sys

if "--hide-plugin" in sys.argv:
    sys.argv.remove("--hide-plugin")
    walk = pkgutil.walk_packages
    pkgutil.walk_packages = lambda *a, **k: (found for found in walk(*a, **k) if "primeflow" not in found.name)
import hydra


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def train(cfg):
    unwanted = {"torch", "lightning", "primeflow_perturbench"} & set(sys.modules)
    print("imported:", sorted(unwanted))


train()
"""


def search_path(main):
    """Search path of an application after our plugin has changed it."""
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    if main is not None:
        path.append("main", main)
    PRiMeFlowSearchPath().manipulate_search_path(path)
    return [(entry.provider, entry.path) for entry in path.get_path()]


OURS = ("primeflow-perturbench", "pkg://primeflow_perturbench.configs")


@pytest.mark.parametrize("main", ["pkg://perturbench.configs", "pkg://perturbench/configs", "pkg://perturbench"])
def test_the_package_perturbench_sees_our_configurations_after_its_own(main):
    assert search_path(main)[1:] == [("main", main), OURS]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_script_in_the_folder_of_perturbench_sees_them_too(tmp_path, scheme):
    (tmp_path / "perturbench" / "modelcore").mkdir(parents=True)
    assert OURS in search_path(f"{scheme}{tmp_path}/perturbench/configs")


@pytest.mark.parametrize(
    "main",
    [
        None,
        "pkg://configs",
        "pkg://mine.perturbench",
        "pkg://perturbench_fork.configs",
        "pkg://perturbench_fork/configs",
        "pkg://primeflow_perturbench.configs",
        "file:///home/me/perturbench/configs",
        "/home/me/perturbench/configs",
        "structured://",
    ],
)
def test_other_applications_do_not_see_them(main):
    assert OURS not in search_path(main)


@pytest.fixture
def app(tmp_path):
    """Runs an unrelated application that is also named train; returns what it prints."""
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "train.yaml").write_text("defaults: [_self_, {model: small}]\nx: 1\n")
    (tmp_path / "configs" / "model" / "small.yaml").write_text("width: 2\n")
    (tmp_path / "train.py").write_text(APP)

    def run(*given):
        command = [sys.executable, str(tmp_path / "train.py"), *given]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    return run


@pytest.mark.parametrize("given", [["--help"], ["--cfg", "all"], ["--info", "searchpath"], ["--hydra-help"]])
def test_the_output_of_an_unrelated_application_does_not_depend_on_our_plugin(app, given):
    output = app(*given)
    assert output == app(*given, "--hide-plugin")
    assert len(output) > 50


def test_our_plugin_is_found_and_imports_nothing_heavy_into_an_unrelated_application(app):
    assert "PRiMeFlowSearchPath" in app("--info", "plugins")
    assert "imported: []" in app()


def test_our_plugin_is_imported_in_less_than_50_ms():
    stats = Plugins.instance().get_stats()
    seconds = stats.modules_import_time["hydra_plugins.primeflow_perturbench"]
    assert seconds < 0.05
