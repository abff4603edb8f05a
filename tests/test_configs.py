"""Every configuration composes, instantiates and takes a step on the CPU. Found by glob: a new file is tested too."""

from pathlib import Path

import anndata as ad
import hydra
import numpy as np
import pandas as pd
import primeflow_perturbench.configs
import pytest
import yaml
from omegaconf import OmegaConf

from primeflow_perturbench.perturbench.embedded.modelcore.train import train

CONFIGS = Path(primeflow_perturbench.configs.__file__).parent
FILES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
ROOTS = ["predict", "train"]
# No configuration of Hydra: `primeflow sweep` reads it.
ABLATIONS = "ablations"
BASELINES = ["linear_additive", "latent_additive", "decoder_only"]
# Those that show that checkpoints are written.
WITH_CHECKPOINTS = ("callbacks/", "experiment/devel/", "experiment/primeflow/norman19", "experiment/quickstart")
# PyTorch shards on GPUs alone; test_distributed.py composes it.
STEPLESS = (*ROOTS, ABLATIONS, "trainer/fsdp")
# What keeps a step short; the sizes of the networks stay.
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
    assert len(FILES) > 40
    assert {"train", "model/primeflow", "experiment/primeflow/norman19", "data/splitter/transfer"} <= set(FILES)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, screen_path) -> Path:
    """A folder of data where every configuration finds its file: one screen under the names and columns of all."""
    folder = tmp_path_factory.mktemp("data")
    screen = ad.read_h5ad(screen_path)
    labels = screen.obs["condition"].astype(str)
    screen.obs["SMILES"] = labels.replace("control", "C[S+](C)[O-]").astype("category")
    screen.obs["treatment"] = pd.Categorical(np.where(np.arange(screen.n_obs) % 2, "drug", "none"))
    screen.obs["target_gene"] = labels.replace("control", "non-targeting").astype("category")
    third = pd.Series(np.arange(screen.n_obs) % 5, index=screen.obs_names)
    split = third.map({0: "val", 1: "test"}).fillna("train")
    parts = sorted({part for label in labels.unique() for part in label.split("+")})
    pd.DataFrame(np.eye(len(parts)), index=parts).rename(columns=str).to_parquet(folder / "embeddings.parquet")
    entry = {"path": "screen.h5ad", "dataset": "screen", "modality": "CRISPRi", "perturbation_key": "condition"}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"covariates": ["cell_type", "method"], "files": [entry]}))
    names = ["norman19", "sciplex3", "jiang24", "op3", "frangieh21", "mcfaline23_gxe"]
    for name in names:
        (folder / f"{name}_processed.h5ad").symlink_to(screen_file(screen, folder))
        split.to_csv(folder / f"{name}_split.csv", header=False)
    (folder / "mcfaline23_gxe_splits").mkdir()
    split.to_csv(folder / "mcfaline23_gxe_splits" / "full_covariate_split.csv", header=False)
    return folder


def screen_file(screen: ad.AnnData, folder: Path) -> Path:
    """The screen, written once."""
    path = folder / "screen.h5ad"
    if not path.exists():
        screen.write_h5ad(path)
    return path


# Configurations that leave the file of the split open.
SAVED_SPLITS = (
    "data/splitter/saved",
    "experiment/devel/heldout",
    "experiment/ablations",
    "experiment/leaderboard/devel",
)
# Those that make a split of the contexts of other data.
PREPARED_SPLITS = ("experiment/finetune/devel", "experiment/finetune/pretrain_devel")


# Configurations that read a manifest in place of a file of cells.
ATLASES = ("data/atlas", "experiment/atlas/pretrain", "experiment/atlas/small")


def compose(*overrides: str, folder: Path, root: str = "train"):
    """Composed configuration that writes to a folder."""
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        return hydra.compose(root, overrides=[*overrides, f"paths.output_dir={folder}", "run_name=test"])


def asking_for(name: str, data_folder: Path) -> list[str]:
    """Overrides that ask for a configuration file, and give it the data that it leaves open."""
    group, _, option = name.rpartition("/")
    if name.startswith("experiment/"):
        given = [f"experiment={name.removeprefix('experiment/')}"]
    else:
        given = [f"{group}={option}"]
    if not name.startswith(("experiment/", "model/")):
        given.append("model=primeflow_mlp")
    if name.startswith(("experiment/primeflow/", "experiment/vcc/")) and option != "norman19":
        # One of these experiments takes its step at full size; the others share its model.
        given.append("model.network.multipliers=[1]")
    if name in [f"model/{baseline}" for baseline in BASELINES]:
        given.append("data=h5ad_controls")
    named = name.endswith("_no_controls") or (name.startswith("experiment/primeflow/") and option != "base")
    given += [f"paths.data_dir={data_folder}"]
    if name in ("model/conditions/external", "model/conditions/mixture"):
        given.append(f"perturbation_embeddings_path={data_folder / 'embeddings.parquet'}")
    if name in ATLASES:
        given.append(f"data.data.filename={data_folder / 'manifest.yaml'}")
    elif not named and name not in ("experiment/quickstart", "experiment/leaderboard/simulated"):
        given.append(f"data.data.filename={data_folder / 'screen.h5ad'}")
    if name in PREPARED_SPLITS:
        given += ["prepare.context={cell_type: alpha}"] + ["prepare.test=[G0]"] * name.endswith("finetune/devel")
    if name in SAVED_SPLITS:
        given.append(f"data.splitter.split_path={data_folder / 'op3_split.csv'}")
    return given


@pytest.mark.parametrize("name", [name for name in FILES if name not in STEPLESS and not name.startswith("hydra/")])
def test_every_configuration_composes_instantiates_and_takes_a_step(name, tmp_path, data_folder):
    given = [*asking_for(name, data_folder), *ONE_STEP]
    if not name.startswith(WITH_CHECKPOINTS):
        # Half of a step's time goes into its checkpoints.
        given += ["~callbacks.model_checkpoint", "++trainer.enable_checkpointing=false"]
    cfg = compose(*given, folder=tmp_path)
    assert not OmegaConf.missing_keys(cfg)
    if cfg.prepare is not None:
        hydra.utils.instantiate(cfg.prepare)
    done = train(cfg)
    assert done["trainer"].global_step == 1
    assert np.isfinite(float(done["metrics"]["train_loss"]))
    assert (tmp_path / "checkpoints").exists() == ("model_checkpoint" in cfg.callbacks)


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_composes_but_for_what_a_user_must_give(root, tmp_path):
    cfg = compose(folder=tmp_path, root=root)
    expected = {"train": {"data.data.filename"}, "predict": {"ckpt_path", "prediction_dataframe_path"}}
    assert OmegaConf.missing_keys(cfg) == expected[root]


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_every_model_is_tested(model, tmp_path, screen_path):
    overrides = [
        f"data={'h5ad_controls' if model in BASELINES else 'h5ad'}",
        f"model={model}",
        f"data.data.filename={screen_path}",
        "data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=2",
        "data.evaluation.evaluation_pipelines=[{aggregation: average, metric: rmse, rank: false}]",
        *ONE_STEP,
        "test=true",
    ]
    if model not in BASELINES:
        overrides += ["model.solver.steps=1", "model.calibration_cells=32"]
    done = train(compose(*overrides, folder=tmp_path))
    assert done["model"].summary_metrics.notna().all().all()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/primeflow/")])
def test_the_recipe_on_the_benchmarks_data_is_the_papers(name, tmp_path, data_folder):
    """One GPU makes the effective batch of the paper's many, and the pipelines print the paper's metrics."""
    cfg = compose(*asking_for(name, data_folder), folder=tmp_path)
    assert cfg.data.loader.batch_size * cfg.trainer.accumulate_grad_batches == 768
    assert cfg.model.cells_per_condition == 1000
    assert (cfg.model.solver.method, cfg.model.solver.steps) == ("euler", 100)
    assert cfg.model.condition_dropout == 0.2
    assert cfg.model.network.channels == 64
    pipelines = {(each.aggregation, each.metric) for each in cfg.data.evaluation.evaluation_pipelines}
    assert pipelines == {
        ("none", "mmd"),
        ("pca", "mmd"),
        ("scores", "top_k_recall"),
        ("logfc", "cosine"),
        ("average", "rmse"),
    }
    four = compose(*asking_for(name, data_folder), "trainer=ddp", "trainer.devices=4", folder=tmp_path)
    assert four.trainer.strategy == "ddp"
    assert four.trainer.accumulate_grad_batches * 4 * four.data.loader.batch_size == 768
