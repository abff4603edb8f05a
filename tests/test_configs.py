"""Every configuration composes, names objects that exist with parameters that they have, and takes a training step.

Files are found by glob, so that a new one is tested too. The step of files that differ only in the data set or the size
is marked slow.
"""

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import hydra
import numpy as np
import pandas as pd
import primeflow_perturbench.configs
import pytest
import yaml
from builders import compose_config
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from primeflow_perturbench.perturbench.embedded.modelcore.train import train
from primeflow_perturbench.sweeps.launch import values
from primeflow_perturbench.training.setting_types import check_types

CONFIGS = Path(primeflow_perturbench.configs.__file__).parent
FILES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
ROOTS = ["predict", "train"]
# Read by `primeflow sweep`, not by Hydra.
ABLATIONS = OmegaConf.to_container(OmegaConf.load(CONFIGS / "ablations.yaml"))
NAMES = [name for name in FILES if name not in (*ROOTS, "ablations") and not name.startswith("hydra/")]
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
BASELINES = ["linear_additive", "latent_additive", "decoder_only"]
# Their steps differ from each other in more than the data set or the size.
QUICK_STEPS = (
    "callbacks/default",
    "data/atlas",
    "data/h5ad",
    "data/splitter/",
    "experiment/ablations",
    "experiment/finetune/",
    "experiment/leaderboard/norman19",
    "experiment/primeflow/frangieh21",
    "experiment/quickstart",
    "experiment/vcc/2026",
    "model/",
)
# Those that show that checkpoints are written: half of a step's time goes into them.
WITH_CHECKPOINTS = ("callbacks/", "experiment/devel/", "experiment/primeflow/norman19", "experiment/quickstart")
# Configurations that leave the file of the split open.
SAVED_SPLITS = (
    "data/splitter/saved",
    "experiment/devel/heldout",
    "experiment/ablations",
    "experiment/leaderboard/devel",
)
# Configurations that make a split from the contexts of other data.
PREPARED_SPLITS = ("experiment/finetune/devel", "experiment/finetune/pretrain_devel")
# Configurations that read a manifest instead of a file of cells.
ATLASES = ("data/atlas", "experiment/atlas/pretrain", "experiment/atlas/small")
# Configurations that simulate their data.
SIMULATED = ("experiment/quickstart", "experiment/leaderboard/simulated")
# What makes a step short; the networks keep their size.
ONE_STEP = [
    "test=false",
    "data.loader.batch_size=16",
    "data.loader.num_workers=0",
    "trainer.max_steps=1",
    "trainer.accumulate_grad_batches=1",
    "trainer.val_check_interval=1",
    "trainer.accelerator=cpu",
    "++trainer.limit_val_batches=1",
]


def test_the_glob_finds_the_files():
    assert len(FILES) > 60
    assert {"train", "model/primeflow", "experiment/primeflow/norman19", "data/splitter/transfer"} <= set(FILES)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, screen_path) -> Path:
    """A folder where every configuration finds its data: one screen with the names and columns of all data sets."""
    folder = tmp_path_factory.mktemp("data")
    screen = ad.read_h5ad(screen_path)[::4].copy()
    labels = screen.obs["condition"].astype(str)
    screen.obs["SMILES"] = labels.replace("control", "C[S+](C)[O-]").astype("category")
    screen.obs["treatment"] = pd.Categorical(np.where(np.arange(screen.n_obs) % 2, "drug", "none"))
    screen.obs["target_gene"] = labels.replace("control", "non-targeting").astype("category")
    screen.write_h5ad(folder / "screen.h5ad")
    part = pd.Series(np.arange(screen.n_obs) % 5, index=screen.obs_names)
    split = part.map({0: "val", 1: "test"}).fillna("train")
    split.to_csv(folder / "split.csv", header=False)
    names = sorted({name for label in labels.unique() for name in label.split("+")})
    pd.DataFrame(np.eye(len(names)), index=names).rename(columns=str).to_parquet(folder / "embeddings.parquet")
    entry = {"path": "screen.h5ad", "dataset": "screen", "modality": "CRISPRi", "perturbation_key": "condition"}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"covariates": ["cell_type", "method"], "files": [entry]}))
    for name in ["norman19", "sciplex3", "jiang24", "op3", "frangieh21", "mcfaline23_gxe"]:
        (folder / f"{name}_processed.h5ad").symlink_to(folder / "screen.h5ad")
        (folder / f"{name}_split.csv").symlink_to(folder / "split.csv")
    (folder / "mcfaline23_gxe_splits").mkdir()
    (folder / "mcfaline23_gxe_splits" / "full_covariate_split.csv").symlink_to(folder / "split.csv")
    return folder


def compose(*overrides: str, folder: Path, root: str = "train") -> DictConfig:
    """Composed configuration of a run that writes to a folder."""
    return compose_config([*overrides, f"paths.output_dir={folder}", "run_name=test"], root=root)


def selecting(name: str, data: Path) -> list[str]:
    """Overrides that select a configuration file and give it the data that it leaves open."""
    group, _, option = name.rpartition("/")
    is_experiment = name.startswith("experiment/")
    given = [f"experiment={name.removeprefix('experiment/')}" if is_experiment else f"{group}={option}"]
    if not is_experiment and name.removeprefix("model/") not in MODELS:
        given.append("model=primeflow_small")
    if name.startswith(("experiment/primeflow/", "experiment/vcc/")) and option != "norman19":
        # norman19 takes its step at full size; the others share its model.
        given.append("model.network.multipliers=[1]")
    if name in [f"model/{baseline}" for baseline in BASELINES]:
        given.append("data=h5ad_controls")
    given.append(f"paths.data_dir={data}")
    if name in ("model/conditions/external", "model/conditions/mixture"):
        given.append(f"perturbation_embeddings_path={data / 'embeddings.parquet'}")
    named = name.endswith("_no_controls") or (name.startswith("experiment/primeflow/") and option != "base")
    if name in ATLASES:
        given.append(f"data.data.filename={data / 'manifest.yaml'}")
    elif not named and name not in SIMULATED:
        given.append(f"data.data.filename={data / 'screen.h5ad'}")
    if name in PREPARED_SPLITS:
        given += ["prepare.context={cell_type: alpha}"] + ["prepare.test=[G0]"] * name.endswith("finetune/devel")
    if name in SAVED_SPLITS:
        given.append(f"data.splitter.split_path={data / 'split.csv'}")
    return given


def objects(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node of a configuration that names a ``_target_``, with its dotted key."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in node:
            yield from objects(node[name], f"{key}.{name}".strip("."))
    elif isinstance(node, ListConfig):
        for i, each in enumerate(node):
            yield from objects(each, f"{key}.{i}")


def unknown_parameters(cfg: DictConfig) -> list[str]:
    """Parameters in a configuration that the objects which it names do not have."""
    found = []
    for key, node in objects(cfg):
        parameters = inspect.signature(hydra.utils.get_object(node._target_)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            found += [f"{key}.{name}" for name in node if not name.startswith("_") and name not in parameters]
    return found


def test_an_unknown_parameter_of_an_object_is_found(tmp_path, data_folder):
    cfg = compose(*selecting("model/primeflow", data_folder), "+model.network.chanels=3", folder=tmp_path)
    assert unknown_parameters(cfg) == ["model.network.chanels"]


def take_step(name: str, folder: Path, data: Path) -> None:
    """Train a configuration for one step."""
    given = [*selecting(name, data), *ONE_STEP]
    if not name.startswith(WITH_CHECKPOINTS):
        given += ["~callbacks.model_checkpoint", "++trainer.enable_checkpointing=false"]
    cfg = compose(*given, folder=folder)
    check_complete(cfg)
    if cfg.prepare is not None:
        hydra.utils.instantiate(cfg.prepare)
    done = train(cfg)
    assert done["trainer"].global_step == 1
    assert np.isfinite(float(done["metrics"]["train_loss"]))
    assert (folder / "checkpoints").exists() == ("model_checkpoint" in cfg.callbacks)


def check_complete(cfg: DictConfig) -> None:
    assert not OmegaConf.missing_keys(cfg)
    check_types(cfg)
    assert unknown_parameters(cfg) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_complete_and_some_take_a_step(name, tmp_path, data_folder):
    if name.startswith(QUICK_STEPS) and name.removeprefix("model/") not in MODELS:
        take_step(name, tmp_path, data_folder)
    else:
        check_complete(compose(*selecting(name, data_folder), folder=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(QUICK_STEPS)])
def test_every_other_configuration_takes_a_step(name, tmp_path, data_folder):
    take_step(name, tmp_path, data_folder)


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_leaves_open_only_what_a_user_must_give(root, tmp_path):
    cfg = compose(folder=tmp_path, root=root)
    expected = {"train": {"data.data.filename"}, "predict": {"ckpt_path", "prediction_dataframe_path"}}
    assert OmegaConf.missing_keys(cfg) == expected[root]


@pytest.mark.parametrize(
    "override",
    [
        "challenge.counts=true",
        "challenge=null",
        "finetune=true",
        "label=name",
        "objective={rmse_average: 1}",
        "finetuning.freeze=[genes]",
        "finetuning.lr_factor={genes: 0.1}",
        "model.conditions.continuous={dose: log1p}",
    ],
)
def test_settings_without_a_default_need_no_plus_sign(override, tmp_path):
    check_types(compose(override, "data.data.filename=x.h5ad", folder=tmp_path))


def test_a_manifests_heldout_pairs_need_no_plus_sign(tmp_path):
    check_types(compose("data=atlas", "data.heldout=x.csv", "data.data.filename=x.yaml", folder=tmp_path))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_a_step_and_is_tested(model, tmp_path, data_folder):
    overrides = [
        f"data={'h5ad_controls' if model in BASELINES else 'h5ad'}",
        f"model={model}",
        f"data.data.filename={data_folder / 'screen.h5ad'}",
        "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=2",
        "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: false}]",
        "~callbacks.model_checkpoint",
        "++trainer.enable_checkpointing=false",
        *ONE_STEP,
        "test=true",
    ]
    if model == "primeflow":
        # The paper's network takes its step at full size in an experiment.
        overrides.append("model.network.channels=8")
    if model not in BASELINES:
        overrides += ["model.sampler.solver.steps=1", "model.sampler.calibration_cells=32"]
    done = train(compose(*overrides, folder=tmp_path))
    assert done["model"].summary_metrics.notna().all().all()


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_value_of_an_ablation_builds_a_model(ablation, tmp_path, data_folder):
    params = {key: str(value) for key, value in ABLATIONS[ablation]["params"].items()}
    assert ABLATIONS[ablation]["question"].endswith("?")
    parser = OverridesParser.create()
    axes = [values(parser.parse_override(f"{key}={value}")) for key, value in params.items()]
    combinations = list(itertools.product(*axes))
    assert len(combinations) > 1
    for combination in combinations:
        given = [f"{key}={value}" for key, value in zip(params, combination, strict=True)]
        cfg = compose(*selecting("experiment/ablations", data_folder), *given, folder=tmp_path)
        assert unknown_parameters(cfg) == []
        hydra.utils.instantiate(cfg.model, _partial_=True)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/primeflow/")])
def test_the_recipe_on_the_benchmarks_data_is_the_papers(name, tmp_path, data_folder):
    """One GPU makes the effective batch of the paper's many, and the pipelines print the paper's metrics."""
    cfg = compose(*selecting(name, data_folder), folder=tmp_path)
    assert cfg.data.loader.batch_size * cfg.trainer.accumulate_grad_batches == 768
    assert cfg.model.sampler.cells_per_condition == 1000
    assert (cfg.model.sampler.solver.method, cfg.model.sampler.solver.steps) == ("euler", 100)
    assert cfg.model.objective.condition_dropout == 0.2
    assert cfg.model.network.channels == 64
    pipelines = {(each.aggregation, each.metric) for each in cfg.data.evaluation.evaluation_pipelines}
    assert pipelines == {
        ("none", "mmd"),
        ("pca", "mmd"),
        ("scores", "top_k_recall"),
        ("logfc", "cosine"),
        ("average", "rmse"),
    }
    four = compose(*selecting(name, data_folder), "trainer=ddp", "trainer.devices=4", folder=tmp_path)
    assert four.trainer.strategy == "ddp"
    assert four.trainer.accumulate_grad_batches * 4 * four.data.loader.batch_size == 768
