"""The commands, Python examples, links and settings of README and docs/ work.

Each page runs in a folder of its own that holds small simulated data under the names that the pages use. Trainings take
two steps. In the Markdown source, a comment before a block changes how it is treated:

- ``<!-- not run: REASON -->``: the block needs a GPU, Slurm, the internet or PerturBench. Its settings are composed and
  its options parsed, but nothing runs.
- ``<!-- setup: COMMAND -->``: a command that runs before the block and that readers do not see.
"""

import argparse
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from primeflow_perturbench.cli import main
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.sampling.settings import SamplingSettings
from primeflow_perturbench.simulation.atlas import simulate_atlas
from primeflow_perturbench.simulation.screen import Screen
from primeflow_perturbench.simulation.settings import ScreenSpec

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
# Pages whose commands take longer than 20 s.
SLOW = ("finetuning.md", "leaderboards.md", "sweeps.md", "training.md")
CONFIGS = "primeflow_perturbench.configs"

SMALL_TRAINING = [
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.loader.batch_size=32",
    "data.loader.num_workers=0",
    "model.lr_scheduler.conf.warmup_steps=1",
    "model.sampler.cells_per_condition=8",
    "model.sampler.calibration_cells=8",
    "model.sampler.solver.steps=1",
]
LINES = ("K562", "A172", "U87MG")
GENES = ("KLF1", "MAP2K6", "MAP2K3", "MAP4K3", "PLK4", "TGFBR2", "SGK1", "MAPK1")


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    not_run: bool = False
    setup: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, each with the comments that stand right before it."""
    found, block, not_run, setup = [], None, False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if block is not None:
            if line.startswith("```"):
                found.append(block)
                block = None
            else:
                block.text += line + "\n"
        elif fence := re.match(r"```(\w+)", line):
            block = Block(fence[1], "", number, not_run, setup)
            not_run, setup = False, []
        elif comment := re.fullmatch(r"<!-- (not run|setup): (.+) -->", line):
            not_run |= comment[1] == "not run"
            setup += [comment[2]] if comment[1] == "setup" else []
        elif line.strip():
            comments = [*setup, "not run"] if not_run else setup
            assert not comments, f"{page.name}:{number}: a comment for a block must stand right before it"
    return found


def commands(text: str) -> list[list[str]]:
    """Words of each command of a shell script: lines, continued by a backslash, or joined by &&."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = [[]]
        for word in shlex.split(line, comments=True):
            if word == "&&":
                words.append([])
            else:
                words[-1].append(word)
        found += [command for command in words if command]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    screen = Screen(
        ScreenSpec(n_genes=60, n_perturbations=len(GENES), n_pairs=4, cell_lines=LINES, cells_per_condition=12)
    )
    names = dict(zip(screen.perturbations, GENES, strict=True))
    screen.write(folder / "cells.h5ad")
    cells = ad.read_h5ad(folder / "cells.h5ad")
    labels = ["+".join(names.get(part, part) for part in label.split("+")) for label in cells.obs["condition"]]
    cells.obs["condition"] = labels
    cells.var_names = [names.get(gene, gene) for gene in cells.var_names]
    cells.uns.clear()
    cells.write_h5ad(folder / "cells.h5ad")

    counts = cells.copy()
    counts.X = counts.layers["counts"] if "counts" in counts.layers else sp.csr_matrix(cells.X.expm1().round())
    counts.write_h5ad(folder / "counts.h5ad")

    control, heldout = cells.obs["condition"] == "control", cells.obs["condition"].isin(["PLK4", "SGK1"])
    split = pd.Series("train", index=cells.obs_names)
    split[heldout & (cells.obs["cell_type"] == "K562")] = "test"
    split[heldout & (cells.obs["cell_type"] == "A172")] = "val"
    controls = control.to_numpy().nonzero()[0]
    split.iloc[controls[::4]], split.iloc[controls[1::4]] = "val", "test"
    split.to_csv(folder / "split.csv", header=False)

    of_k562 = cells.obs["cell_type"] == "K562"
    cells[(control | heldout) & of_k562].copy().write_h5ad(folder / "measured.h5ad")
    table = pd.DataFrame({"condition": ["PLK4", "SGK1"], "cell_type": "K562"})
    table.to_csv(folder / "measured.csv", index=False)
    table = pd.DataFrame({"condition": ["KLF1", "KLF1+MAP2K6"], "cell_type": ["A172", "K562"], "n_cells": [5, 3]})
    table.to_csv(folder / "conditions.csv", index=False)
    table = pd.DataFrame({"condition": ["NEW1"], "cell_type": ["K562"], "n_cells": [5]})
    table.to_csv(folder / "new.csv", index=False)
    (folder / "list.csv").write_text("PLK4\nSGK1\n")
    embeddings = pd.DataFrame([[float(i), float(i % 3), 1.0] for i in range(len(GENES) + 1)], [*GENES, "NEW1"])
    embeddings.columns = [f"e{i}" for i in range(3)]
    embeddings.to_parquet(folder / "esm2.parquet")

    simulate_atlas(folder, n_files=2, cells=800, n_genes=60, n_perturbations=6, n_pairs=0)
    return folder


def call(monkeypatch, arguments: list[str]) -> None:
    """Run ``primeflow`` in this process."""
    monkeypatch.setattr(sys, "argv", ["primeflow", *arguments])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    assert not status, f"primeflow {shlex.join(arguments)} ended with status {status}"


def run(monkeypatch, command: list[str]) -> None:
    """Run a ``primeflow`` command in small; check what else a page may ask a reader to type."""
    match command:
        case ["primeflow", "train" | "sweep", *_]:
            call(monkeypatch, [*command[1:], *SMALL_TRAINING])
        case ["primeflow", *arguments]:
            call(monkeypatch, arguments)
        case ["pip", "install", target]:
            check_extra(target)
        case ["pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths if not path.startswith("-"))
        case ["python3", "-m", "venv", ".venv"] | ["source", ".venv/bin/activate"]:
            pass
        case _:
            pytest.fail(f"mark the block as not run, or teach this test to run: {shlex.join(command)}")


def check_extra(target: str) -> None:
    """Check that ``.[extra]`` names an extra of the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\w+", target.removeprefix("."))) <= set(extras), target


class Parsed(BaseException):
    """A command line was accepted."""


def check(monkeypatch, command: list[str]) -> None:
    """Check settings and options of a command that is not run."""
    if command[:2] == ["pip", "install"]:
        if command[2].startswith("."):
            check_extra(command[2])
        return
    # What follows our own name: `srun primeflow train ...`, `torchrun -m primeflow_perturbench train ...`, or
    # PerturBench's own `train ...`.
    ours = [i for i, word in enumerate(command) if word in ("primeflow", "primeflow_perturbench")]
    name, *arguments = command[ours[0] + 1 :] if ours else command
    without_optuna = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None
    search = name == "sweep" and any(argument.startswith("experiment=search/") for argument in arguments)
    if name in ("train", "predict") or (search and without_optuna):
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        if "-m" in arguments:  # the first value of each sweep
            overrides = [re.sub(r"=([^\['{,]+),.*", r"=\1", override) for override in overrides]
        if name == "predict" and not ours:  # PerturBench's command, which the conformance suite runs
            name, overrides = "train", [override for override in overrides if override.startswith("model")]
        with initialize_config_module(CONFIGS, version_base="1.3"):
            compose("predict" if name == "predict" else "train", overrides)
    elif name == "sweep":
        call(monkeypatch, ["sweep", *arguments, "--dry-run"])
    else:
        parse(monkeypatch, [name, *arguments])


def parse(monkeypatch, arguments: list[str]) -> None:
    """Parse the arguments of a ``primeflow`` command without running it."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *given, **named):
        if parser.prog == "primeflow":  # chooses the command, whose own parser comes next
            return parse_args(parser, *given, **named)
        parse_args(parser, *given, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            call(patch, arguments)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=page.name)
        for page in PAGES
        if any(block.language in ("bash", "python") for block in blocks(page))
    ],
)
def test_examples_of_a_page_run(page, data, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    shutil.copytree(data, folder)
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks(page):
        print(f"{page.name}:{block.line}")
        for command in commands("\n".join(block.setup)):
            run(monkeypatch, command)
        if block.language == "bash":
            for command in commands(block.text):
                (check if block.not_run else run)(monkeypatch, command)
        elif block.language == "python":
            code = compile(block.text, f"{page.name}:{block.line}", "exec")
            if not block.not_run:
                exec(code, names)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def slug(heading: str) -> str:
    """Anchor of a heading on GitHub and in MkDocs."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{file.name} has no heading {anchor}"


def inline_code(page: Path) -> list[str]:
    """Code between single backticks, outside of fenced blocks."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_named_in_text_exist(page):
    folders = (ROOT, ROOT / "primeflow_perturbench", page.parent)
    files = [code for code in inline_code(page) if re.fullmatch(r"[a-z_]+/[\w/]+\.(py|yaml|json|md|toml)", code)]
    missing = [file for file in files if "NAME" not in file and not any((folder / file).exists() for folder in folders)]
    assert not missing, f"{page.name} names files that do not exist: {missing}"


@pytest.fixture(scope="module")
def settings() -> list:
    """Composed configs in which a setting named by a page may occur."""
    choices = [
        ("train", []),
        ("train", ["model=primeflow"]),
        ("train", ["model/network=unet_patches", "model/space=pca", "model/conditions=external"]),
        ("train", ["data=atlas"]),
        ("train", ["data/splitter=saved", "trainer=slurm"]),
        ("predict", []),
    ]
    with initialize_config_module(CONFIGS, version_base="1.3"):
        return [OmegaConf.to_container(compose(name, overrides), resolve=False) for name, overrides in choices]


def has(config: dict, path: list[str]) -> bool:
    """Whether a nested dictionary has this path; below a null, anything may stand."""
    for key in path:
        if config is None:
            return True
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_options_named_in_text_exist(page, settings):
    wrong = []
    for code in inline_code(page):
        if option := re.fullmatch(r"\+?([a-z_/]+)=([\w/]+)", code):
            group, name = option.groups()
            folder = ROOT / "configs" / group
            if name != "NAME" and folder.is_dir() and not (folder / f"{name}.yaml").exists():
                wrong.append(code)
            continue
        setting = re.fullmatch(r"((?:model|data|trainer|challenge|finetuning|callbacks)(?:\.\w+)+)(=\S+)?", code)
        if not setting or code == "model.safetensors":
            continue
        if not any(has(config, setting[1].split(".")) for config in settings):
            wrong.append(code)
    assert not wrong, f"{page.name} names what does not exist: {wrong}"


@pytest.mark.parametrize("settings_class", [SamplingSettings, Objective])
def test_every_setting_of_training_and_sampling_is_documented(settings_class):
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [setting.name for setting in fields(settings_class) if not re.search(rf"[`.]{setting.name}\b", text)]
    assert not missing


def test_the_readme_is_short_and_has_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "\npip install '.[test]' && pytest\n" in text
    assert "\nprimeflow train experiment=quickstart\n" in text
