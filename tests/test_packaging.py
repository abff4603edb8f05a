"""The package works from a wheel, an sdist, an editable install and a checkout: configs and Hydra plugins are found."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Prints where the package lies, what the quickstart composes to, and which Hydra plugins are found.
REPORT = """
import json

from hydra import compose, initialize_config_module
from hydra.core.plugins import Plugins

import primeflow_perturbench
from primeflow_perturbench.leaderboard import page

with initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
    cfg = compose("train", ["experiment=quickstart"])
plugins = sorted({plugin.__module__.split(".")[1] for plugin in Plugins.instance().discover()})
print(json.dumps({"file": primeflow_perturbench.__file__, "steps": cfg.trainer.max_steps, "plugins": plugins}))
"""


def environment() -> dict[str, str]:
    """Environment variables of a user, who has no PYTHONPATH to this checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a ``wheel`` or ``sdist`` with setuptools of this environment, so that nothing is downloaded."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    target.mkdir(exist_ok=True)
    run(sys.executable, "-c", code, cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files under version control: builds write beside their source."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Links to everything that is installed here, except this package."""
    folder = tmp_path_factory.mktemp("dependencies")
    (folder / "hydra_plugins").mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        entries = [*Path(site).iterdir(), *Path(site).glob("hydra_plugins/*")]
        for entry in entries:
            link = folder / entry.relative_to(site)
            if "primeflow" not in entry.name and entry.name != "hydra_plugins" and not link.exists():
                link.symlink_to(entry)
    return folder


@pytest.fixture
def python(tmp_path, dependencies) -> Path:
    """Python of a new virtual environment that has the dependencies."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: object, cwd: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


def check(report: str, inside: Path) -> None:
    """The package lies where it should, composes the quickstart, and its Hydra plugin is found beside others."""
    found = json.loads(report.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(inside)
    assert found["steps"] == 600
    assert {"primeflow_perturbench", "hydra_joblib_launcher"} <= set(found["plugins"])


def check_installed(python: Path, inside: Path, cwd: Path) -> None:
    check(run(python, "-c", REPORT, cwd=cwd), inside)
    assert "leaderboard" in run(python.with_name("primeflow"), "--help", cwd=cwd)


def test_a_wheel_holds_all_configurations_and_works_when_installed(checkout, python, tmp_path):
    wheel = build("wheel", checkout, tmp_path / "built")
    names = zipfile.ZipFile(wheel).namelist()
    configs = {path.relative_to(checkout / "configs").as_posix() for path in (checkout / "configs").rglob("*.yaml")}
    assert len(configs) > 60
    assert {f"primeflow_perturbench/configs/{name}" for name in configs} <= set(names)
    assert {"primeflow_perturbench/py.typed", "hydra_plugins/primeflow_perturbench/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("configs/", "tests/", "hydra_plugins/__init__"))]
    install(python, wheel, cwd=tmp_path)
    check_installed(python, tmp_path / "venv", cwd=tmp_path)


def test_an_editable_install_works(checkout, python, tmp_path):
    install(python, "--editable", checkout, cwd=tmp_path)
    check_installed(python, checkout, cwd=tmp_path)


def test_a_wheel_built_from_the_sdist_equals_that_of_the_checkout(checkout, tmp_path):
    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheels = [build("wheel", source, tmp_path / name) for source, name in ((unpacked, "a"), (checkout, "b"))]
    contents = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert contents[0] == contents[1]


def test_a_checkout_works_without_an_installation(checkout, dependencies):
    # Without site-packages, where this package may be installed.
    start = f"import site, sys; site.addsitedir({str(dependencies)!r}); "
    check(run(sys.executable, "-S", "-c", start + REPORT, cwd=checkout), checkout)
    command = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('primeflow_perturbench', run_name='__main__')"
    assert "leaderboard" in run(sys.executable, "-S", "-c", start + command, cwd=checkout)
