"""Models as folders: loading returns the same cells, executes no code, and rejects malformed folders."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import anndata as ad
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from primeflow_perturbench import PRiMeFlow
from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.cli import main
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool, ControlReservoir
from primeflow_perturbench.expression.space import PCASpace
from primeflow_perturbench.expression.statistics import MarginalStatistics
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.gene_patches import GenePatches
from primeflow_perturbench.networks.gene_tokens import GeneTokens
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.residual_mlp import ResidualMLP
from primeflow_perturbench.networks.unet import UNet
from primeflow_perturbench.pretrained.save import clear_leftovers
from primeflow_perturbench.pretrained.settings import to_json
from primeflow_perturbench.sampling.settings import SamplingSettings

GENES = [f"gene{i}" for i in range(9)]
PERTURBATIONS = ["KLF1", "MAP2K6", "TP53"]
CONTEXT = {
    "perturbation_uniques": PERTURBATIONS,
    "covariate_uniques": {"cell_type": ["k562", "a549"], "dose": None},
    "perturbation_key": "condition",
    "covariate_keys": ["cell_type", "dose"],
    "perturbation_combination_delimiter": "+",
    "perturbation_control_value": "control",
    "perturbation_counts": {"KLF1": 7},
}
CONDITIONS = [
    {"perturbation": "KLF1+MAP2K6", "cell_type": "k562", "dose": 1.0},
    {"perturbation": "control", "cell_type": "a549", "dose": 0.0},
]
PATCHES = partial(UNet, channels=8, multipliers=[1], blocks=1, attention=False, genes=partial(GenePatches, patch=4))
SMALL_MLP = partial(MLP, width=8, depth=1, embedding_width=4)
MIDPOINT = ODESolver("midpoint", steps=3)
SETTINGS = {
    "network": PATCHES,
    "objective": Objective(precondition=True),
    "sampler": SamplingSettings(
        solver=MIDPOINT, detection_limit="learned", calibrate="marginals", calibration_cells=64
    ),
}
FROM_CONTROLS = {
    "network": SMALL_MLP,
    "space": partial(PCASpace, n_components=3),
    "objective": Objective(source="control"),
    "sampler": SamplingSettings(solver=MIDPOINT, guidance=1.5),
}
FROZEN = Path(__file__).parents[1] / "files" / "shared_model"
CELLS = "expected_cells.csv"


def build(**settings):
    """A reproducible model with every kind of learned tensor, as if it had been trained."""
    given = {
        "n_genes": len(GENES),
        "n_perts": len(PERTURBATIONS),
        "transform": None,
        "context": CONTEXT,
        "evaluation": None,
        "gene_names": GENES,
        **(SETTINGS | settings if "objective" not in settings else settings),
    }
    model = PRiMeFlow(**given)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for buffer in model.buffers():
            drawn = 0.5 + torch.rand(buffer.shape, generator=draw)
            buffer.copy_(drawn if buffer.is_floating_point() else drawn.argsort())
    learn(model, draw)
    return model.eval()


def learn(model, draw):
    """Set what training would learn from cells of all conditions."""
    n = 400
    perturbations = (torch.rand(n, 3, generator=draw) < 0.3).float()
    lines = torch.nn.functional.one_hot(torch.arange(n) % 2, 2).float()
    condition = model.encoder(perturbations, {"cell_type": lines, "dose": (torch.arange(n) % 4 // 2).float()[:, None]})
    effects = condition.vector() @ torch.randn(7, 9, generator=draw)
    cells = (torch.randn(n, len(GENES), generator=draw) + effects).clamp(min=0)
    if model.sampler.calibrate != "none":
        marginals = MarginalStatistics()
        marginals.add(condition, cells)
        model.marginals = Marginals.fit(model.encoder, marginals)
    if model.objective.source == "control":
        controls = ControlReservoir(20)
        controls.add(condition, cells)
        model.space.fit(cells)
        model.controls = ControlPool.fit(controls, model.space.encode, model.covariates)
    model.learned_detection_limit = 0.1 + 0.2


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy for a test to modify."""
    return shutil.copytree(saved, tmp_path / "model")


def values(adata):
    return adata.X.toarray()


def rejected(name, **arguments):
    with pytest.raises(InputError) as error:
        PRiMeFlow.from_pretrained(name, **arguments)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


# --- the same cells


def test_a_model_loaded_in_another_process_generates_identical_cells(tmp_path):
    before = {}
    for name, settings in {"marginals": SETTINGS, "controls": FROM_CONTROLS}.items():
        model = build(**settings)
        model.save_pretrained(tmp_path / name)
        before[name] = values(model.sample(CONDITIONS, n=70, seed=5))
    script = (
        "import sys, torch; torch.set_num_threads(1); import numpy as np; from primeflow_perturbench import PRiMeFlow\n"
        "for name in ('marginals', 'controls'):\n"
        f"    cells = PRiMeFlow.from_pretrained(name).sample({CONDITIONS!r}, n=70, seed=5)\n"
        "    np.save(name, cells.X.toarray())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)
    for name, cells in before.items():
        assert cells.shape == (140, len(GENES))
        assert len(np.unique(cells, axis=0)) > 100
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), cells)


def test_the_stored_example_generates_its_expected_cells():
    """This module's `build` wrote it; other processors may round differently."""
    cells = PRiMeFlow.from_pretrained(FROZEN).sample(CONDITIONS, n=4)
    expected = pd.read_csv(FROZEN / CELLS)
    assert cells.var_names.tolist() == expected.columns.tolist()
    assert (expected.to_numpy() > 0).any()
    assert (expected.to_numpy() == 0).any()
    np.testing.assert_allclose(values(cells), expected.to_numpy(), atol=1e-4)


def test_loading_restores_every_setting_and_name(model, saved):
    loaded = PRiMeFlow.from_pretrained(saved)
    assert not loaded.training
    assert loaded.learned_detection_limit == 0.1 + 0.2
    assert (loaded.sampler, loaded.objective) == (model.sampler, model.objective)
    assert (loaded.gene_names, loaded.covariates) == (GENES, CONTEXT["covariate_uniques"])
    context = loaded.training_record["train_context"]
    assert context == {name: value for name, value in CONTEXT.items() if name != "perturbation_counts"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}


def test_saving_keeps_settings_changed_after_training(tmp_path):
    model = build()
    model.sampler = model.sampler.change({"guidance": 3.0, "solver": {"method": "euler", "steps": 2}})
    model.seed = 11
    model.save_pretrained(tmp_path / "model")
    loaded = PRiMeFlow.from_pretrained(tmp_path / "model")
    assert (loaded.sampler, loaded.seed) == (model.sampler, 11)
    assert (values(loaded.sample(CONDITIONS, n=3)) == values(model.sample(CONDITIONS, n=3))).all()


@pytest.mark.parametrize(
    "network",
    [
        partial(ResidualMLP, width=8, depth=2, embedding_width=4),
        partial(UNet, channels=8, multipliers=[1, 2], blocks=1, genes=partial(GeneTokens, gene_embedding=False)),
    ],
)
def test_every_network_can_be_saved_and_loaded(tmp_path, network):
    model = build(network=network)
    model.save_pretrained(tmp_path / "model")
    loaded = PRiMeFlow.from_pretrained(tmp_path / "model")
    assert str(loaded.network) == str(model.network)
    assert (values(loaded.sample(CONDITIONS, n=3)) == values(model.sample(CONDITIONS, n=3))).all()


def test_saving_a_loaded_model_writes_the_same_bytes(saved, tmp_path):
    PRiMeFlow.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


# --- what a folder holds


def test_the_folder_contains_tensors_json_and_a_card(model, tmp_path):
    data, metrics = {"file": "cells.h5ad", "sha256": "ab" * 32, "cells": 400, "genes": 9}, {"cosine_logfc": 0.5}
    model.save_pretrained(tmp_path / "model", license="cc-by-4.0", data=data, metrics=metrics)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["data"], config["metrics"], config["license"]) == (data, metrics, "cc-by-4.0")
    assert config["versions"]["torch"] == torch.__version__
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "| cosine_logfc | 0.5 |" in card
    assert "'perturbation': 'KLF1', 'cell_type': 'k562', 'dose': 1.0" in card


def test_paths_of_the_training_machine_are_not_saved():
    genes = partial(GeneTokens, initial_vectors="/home/someone/esm2.parquet")
    assert "parquet" not in json.dumps(to_json("network", partial(UNet, genes=genes)))


def test_a_model_that_cannot_be_shared_is_rejected_and_nothing_is_written(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self, n_genes, condition_width, width=8):
            super().__init__()

    for settings, message in (
        ({"network": partial(Own, width=8)}, "network is .*Own.* cannot be shared"),
        ({"network": SMALL_MLP, "gene_names": None}, "does not name its genes"),
    ):
        with pytest.raises(InputError, match=message):
            build(**settings).save_pretrained(tmp_path / "model")
    model = build()
    with pytest.raises(InputError, match="license must be an identifier"):
        model.save_pretrained(tmp_path / "model", license="mit\n---\n")
    with torch.no_grad():
        model.network.mean[0] = float("nan")
    with pytest.raises(InputError, match="network.mean' has NaN"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_only_a_shared_model_can_be_overwritten_and_only_on_request(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="exists; give another folder, or overwrite"):
        model.save_pretrained(folder)
    model.save_pretrained(folder, overwrite=True, license="mit")
    assert json.loads((folder / "config.json").read_text())["license"] == "mit"
    (folder / "thesis.txt").write_text("unrelated")
    with pytest.raises(InputError, match="files that are no part of a shared model"):
        model.save_pretrained(folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "unrelated"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- malformed folders


def change(path, value):
    """Modify an entry of ``config.json``."""

    def modify(folder):
        config = json.loads((folder / "config.json").read_text())
        entry = config
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return modify


def remove(*path):
    def modify(folder):
        config = json.loads((folder / "config.json").read_text())
        entry = config
        for key in path[:-1]:
            entry = entry[key]
        del entry[path[-1]]
        (folder / "config.json").write_text(json.dumps(config))

    return modify


def text(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def set_weights(folder, content):
    """Write other bytes, and their hash to ``config.json``."""
    (folder / "model.safetensors").write_bytes(content)
    change(("sha256",), hashlib.sha256(content).hexdigest())(folder)


def tensors(edit):
    """Modify the tensors by a function of their mapping."""

    def modify(folder):
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "other")
        set_weights(folder, (folder / "other").read_bytes())

    return modify


def set_tensor(name, function):
    return tensors(lambda found: found.update({name: function(found[name])}))


def with_bytes(function):
    return lambda folder: set_weights(folder, function((folder / "model.safetensors").read_bytes()))


def lying_header(content):
    """Make the header claim more bytes for the last tensor than there are."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    header[name]["data_offsets"][1] += 400
    header[name]["shape"] = [header[name]["shape"][0] + 100, *header[name]["shape"][1:]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def link(name):
    """Replace a file by a link to a good one outside of the folder."""

    def modify(folder):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return modify


def with_nan(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


MODEL, NETWORK, SAMPLER = ("model",), ("model", "network"), ("model", "sampler")
TOO_LARGE = "model.network has the size 1000000000000, but model.safetensors has"
READ_IN = "model.network.network.genes.read_in"
CENTER = "learned.marginals.means.center"
NO_CONDITIONS = {"energy": {}, "held_out_by": "nothing", "conditions": 0}
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no file config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no file model.safetensors"),
    "config a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "has no file config.json",
    ),
    "empty config": (text(b""), "is not JSON"),
    "cut config": (text(b'{"format": "primeflow", "ver'), "is not JSON"),
    "no unicode": (text(b"\xff\xfe\x00"), "is not JSON"),
    "a pickle as config": (text(pickle.dumps({"format": "primeflow"})), "is not JSON"),
    "deep config": (text(b"[" * 100_000), "is not JSON"),
    "a list as config": (text(b"[1, 2]"), "does not have the format"),
    "another's config": (text(b'{"architectures": ["Bert"]}'), "does not have the format"),
    "unknown version": (change(("version",), 2), "has version 2 of the format"),
    "missing entry": (remove("genes"), "lacks or should not have genes"),
    "extra entry": (change(("auto_map",), {"AutoModel": "evil.py"}), "lacks or should not have auto_map"),
    "wrong type of entry": (change(("genes",), "TP53"), "genes is empty or has the wrong type, str"),
    "wrong kind of width": (
        change(("perturbation_embedding_width",), True),
        "perturbation_embedding_width is empty or has the wrong type, bool",
    ),
    "width of nothing": (change(("perturbation_embedding_width",), 0), "perturbation_embedding_width must be at least"),
    "forbidden target": (
        change((*NETWORK, "_target_"), "os.system"),
        "'os.system', which is not a class of a shared model",
    ),
    "target of another place": (
        change(NETWORK, {"_target_": "primeflow_perturbench.flow.solver.ODESolver"}),
        "model: .*not callable",
    ),
    "target no text": (change((*NETWORK, "_target_"), ["os.system"]), "which is not a class of a shared model"),
    "nested forbidden target": (change((*NETWORK, "genes", "_target_"), "builtins.eval"), "network.genes names"),
    "no target": (change((*NETWORK, "genes"), 4), "network.genes must be .*, got 4"),
    "no network": (remove("model", "network"), "model lacks or should not have network"),
    "null network": (change(NETWORK, None), "model.network is empty or has the wrong type, NoneType"),
    "injected setting": (
        change((*MODEL, "evaluation"), {"save_dir": "/"}),
        "model lacks or should not have evaluation",
    ),
    "unknown setting": (change((*NETWORK, "wdith"), 3), "unknown setting 'wdith'; known settings are channels"),
    "path to a file": (
        change((*NETWORK, "genes", "initial_vectors"), "/etc/passwd"),
        "unknown setting 'initial_vectors'",
    ),
    "text for a number": (change((*SAMPLER, "guidance"), "strong"), "model.sampler.guidance must be a finite number"),
    "boolean for a number": (change((*SAMPLER, "calibration_cells"), True), "calibration_cells must be a whole number"),
    "infinite": (
        change(("model", "objective", "source_noise"), float("inf")),
        "source_noise must be a finite number, got inf",
    ),
    "enormous": (change((*SAMPLER, "guidance"), 10**400), "guidance must be a finite number"),
    "no choice": (
        change((*SAMPLER, "calibrate"), "magic"),
        "calibrate must be a finite number or 'none' or 'marginals' or 'auto'",
    ),
    "out of range": (
        change((*SAMPLER, "guidance"), -1),
        "config.json, model.sampler: guidance must be at least 0, got -1",
    ),
    "solver out of range": (
        change((*SAMPLER, "solver", "steps"), 0),
        "model.sampler.solver: a solver needs at least one step",
    ),
    "network impossible": (change((*NETWORK, "channels"), 0), "model: a U-Net needs positive sizes"),
    "network too wide": (change((*NETWORK, "channels"), 10**12), TOO_LARGE),
    "network too deep": (change((*NETWORK, "blocks"), 500), "has 500 layers, but"),
    "another width": (change((*NETWORK, "channels"), 16), "size mismatch for network"),
    "gene twice": (change(("genes",), [*GENES[:-1], "gene0"]), "genes has the name 'gene0' more than once"),
    "too few genes": (change(("genes",), GENES[:-1]), "does not fit the settings and names of config.json"),
    "gene without name": (change(("genes",), [*GENES[:-1], ""]), "genes must be a list of names"),
    "gene a number": (change(("genes",), [*GENES[:-1], 7]), "genes must be a list of names"),
    "no genes": (change(("genes",), []), "genes must be a list of names"),
    "larger vocabulary": (
        change(("context", "perturbation_uniques"), [*PERTURBATIONS, "MYC"]),
        "does not fit the settings and names of config.json: size mismatch",
    ),
    "perturbation twice": (change(("context", "perturbation_uniques"), ["A", "B", "A"]), "name 'A' more than once"),
    "vocabulary no list": (
        change(("context", "perturbation_uniques"), "KLF1"),
        "perturbation_uniques is empty or has the wrong",
    ),
    "covariate lost": (change(("context", "covariate_keys"), ["cell_type"]), "categories of each of covariate_keys"),
    "categories no list": (
        change(("context", "covariate_uniques", "cell_type"), {"k562": 0}),
        "covariate_uniques.cell_type must be a list of names",
    ),
    "context lost": (remove("context", "perturbation_key"), "context lacks or should not have perturbation_key"),
    "negative limit": (change(("learned", "detection_limit"), -1.0), "detection_limit must be a number"),
    "undecided choice": (
        change(("learned", "choice"), {"calibrate": "auto", "control_start": None, **NO_CONDITIONS}),
        "choice.calibrate must be a number",
    ),
    "choice out of range": (
        change(("learned", "choice"), {"calibrate": 2.0, "control_start": None, **NO_CONDITIONS}),
        "calibrate must be",
    ),
    "learned something else": (change(("learned", "code"), "print()"), "unknown entry 'code'"),
    "marginals half": (
        remove("learned", "marginals", "rates"),
        "learned: does not fit the model",
    ),
    "layout of others": (
        change(("learned", "marginals", "means", "layout", "covariates"), [5, 1]),
        "learned: does not fit the model",
    ),
    "scale zero": (
        change(("learned", "marginals", "means", "layout", "scales"), [1.0, 0.0]),
        "learned: does not fit the model",
    ),
    "controls without tensors": (change(("learned", "controls"), {}), "learned: does not fit the model"),
    "link to weights": (link("model.safetensors"), "model.safetensors is a link that leads out of its folder"),
    "link to config": (link("config.json"), "config.json is a link that leads out of its folder"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-40]),
        "does not have the SHA-256",
    ),
    "other weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "does not have the SHA-256",
    ),
    "cut and vouched for": (with_bytes(lambda content: content[:-40]), "is not a complete safetensors file"),
    "cut in the header": (with_bytes(lambda content: content[:100]), "is not a complete safetensors file"),
    "empty weights": (with_bytes(lambda content: b""), "is not a complete safetensors file"),
    "enormous header": (with_bytes(lambda content: b"\xff" * 8 + content[8:]), "is not a complete safetensors file"),
    "lying header": (with_bytes(lying_header), "is not a complete safetensors file"),
    "trailing bytes": (with_bytes(lambda content: content + b"more"), "is not a complete safetensors file"),
    "missing tensor": (tensors(lambda found: found.pop(READ_IN)), "Missing key.*genes.read_in"),
    "extra tensor": (tensors(lambda found: found.update(x=torch.ones(2))), "unknown tensor 'x'"),
    "another shape": (
        set_tensor(READ_IN, lambda tensor: tensor[:-1]),
        "size mismatch for network.network.genes.read_in",
    ),
    "another type": (set_tensor(READ_IN, torch.Tensor.double), "has type torch.float64, expected torch.float32"),
    "strange type": (set_tensor(READ_IN, torch.Tensor.half), "has type torch.float16, expected one of"),
    "short marginals": (set_tensor(CENTER, lambda tensor: tensor[:-1]), "learned: does not fit the model"),
    "NaN weights": (set_tensor(READ_IN, with_nan), f"tensor '{READ_IN}' has NaN"),
    "NaN means": (set_tensor(CENTER, with_nan), f"tensor '{CENTER}' has NaN"),
    "order of other genes": (
        tensors(lambda found: found.update({"model.network.network.genes.order": torch.arange(1, 10)})),
        "genes.order does not give each of 9 genes one place",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_malformed_folder_is_rejected_with_one_sentence(folder, kind):
    modify, message = BROKEN[kind]
    modify(folder)
    sentence = rejected(folder)
    assert re.search(message, sentence), sentence
    assert str(folder) in sentence


def test_controls_with_wrong_ends_are_rejected(tmp_path):
    build(**FROM_CONTROLS).save_pretrained(tmp_path / "model")
    set_tensor("learned.controls.ends", lambda ends: ends + 1)(tmp_path / "model")
    assert "controls do not have cells of the model" in rejected(tmp_path / "model")


def test_an_enormous_config_is_not_read(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**30)
    assert "has 1,073,741,824 bytes, expected at most" in rejected(folder)


def test_a_planted_pickle_is_never_opened(folder, tmp_path):
    """Neither under names that other libraries load, nor in place of our files."""
    opened = tmp_path / "opened"

    class Evil:
        def __reduce__(self):
            return Path.touch, (opened,)

    planted = pickle.dumps(Evil())
    for name in ("model.ckpt", "pytorch_model.bin", "model.pkl", "config.pkl", "model.safetensors.pkl"):
        (folder / name).write_bytes(planted)
    loaded = PRiMeFlow.from_pretrained(folder)
    assert values(loaded.sample(CONDITIONS, n=1)).any()
    set_weights(folder, planted)
    assert "is not a complete safetensors file" in rejected(folder)
    torch.save({"weights": Evil()}, tmp_path / "torch")
    set_weights(folder, (tmp_path / "torch").read_bytes())
    assert "is not a complete safetensors file" in rejected(folder)
    assert not opened.exists()
    pickle.loads(planted)
    assert opened.exists()


# --- the hub


def hub_cache(saved, root):
    """A cache like that of the Hub: files, and a snapshot of links to them."""
    repository = root / "models--lab--screen"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, repository / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_only_our_files_are_fetched_from_the_hub(monkeypatch, model, saved, tmp_path):
    snapshot, asked = hub_cache(saved, tmp_path / "cache"), []

    def snapshot_download(name, **settings):
        asked.append((name, settings["revision"], settings["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    loaded = PRiMeFlow.from_pretrained("lab/screen", revision="v1")
    assert asked == [("lab/screen", "v1", ["config.json", "model.safetensors"])]
    assert (values(loaded.sample(CONDITIONS, n=3)) == values(model.sample(CONDITIONS, n=3))).all()
    outside = tmp_path / "outside.json"
    shutil.move((snapshot / "config.json").resolve(), outside)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    assert "link that leads out of its folder" in rejected("lab/screen")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../lab/screen", "lab/..", "/lab/screen", "lab/scr een", ".a/b"])
def test_an_invalid_hub_name_is_never_requested(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    assert "is neither a folder nor owner/name of a model on the Hub" in rejected(name)


def test_an_unreachable_hub_and_a_revision_of_a_folder_are_errors(monkeypatch, folder):
    def unreachable(*_, **__):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "lab/screen is no folder, and it could not be fetched" in rejected("lab/screen")
    assert "is for models on the Hub" in rejected(folder, revision="main")


# --- sampling


def test_sampling_conditions_returns_an_anndata(model):
    cells = model.sample(CONDITIONS, n=5)
    assert cells.var_names.tolist() == GENES
    assert cells.obs["condition"].tolist() == ["KLF1+MAP2K6"] * 5 + ["control"] * 5
    assert cells.obs["cell_type"].tolist() == ["k562"] * 5 + ["a549"] * 5
    assert cells.obs["dose"].tolist() == [1.0] * 5 + [0.0] * 5
    perturbations = torch.tensor([[1.0, 1, 0], [0, 0, 0]]).repeat_interleave(5, 0)
    covariates = {
        "cell_type": torch.eye(2).repeat_interleave(5, 0),
        "dose": torch.tensor([[1.0], [0.0]]).repeat_interleave(5, 0),
    }
    expected = model.generate(model.encoder(perturbations, covariates))
    np.testing.assert_array_equal(values(cells), expected.numpy())


def test_the_seed_applies_to_one_call(model):
    first, other, again = (values(model.sample(CONDITIONS, n=5, seed=seed)) for seed in (None, 1, None))
    assert (first == again).all()
    assert (first != other).any()
    seeded = build()
    seeded.seed = 1
    assert (values(seeded.sample(CONDITIONS, n=5)) == other).all()


def test_conditions_can_be_a_table_with_cell_numbers(model):
    table = pd.DataFrame(CONDITIONS).rename(columns={"perturbation": "condition"}).assign(n_cells=[2, 3])
    cells = model.sample(table)
    assert cells.obs["condition"].tolist() == ["KLF1+MAP2K6"] * 2 + ["control"] * 3
    assert (values(cells)[:2] == values(model.sample(CONDITIONS, n=2))[:2]).all()


def test_an_invalid_condition_is_explained(model):
    good = CONDITIONS[0]
    for conditions, message in (
        ([{**good, "perturbation": "KLF2"}], "not seen in training, 'KLF2' \\(did you mean 'KLF1'\\?\\)"),
        ([{**good, "cell_type": "k652"}], "'k652' \\(did you mean 'k562'\\?\\)"),
        ([{"perturbation": "KLF1", "dose": 1}], "the conditions has no column 'cell_type'"),
        ([good, {"perturbation": "KLF1", "dose": 1}], "row 2 has no value in column 'cell_type'"),
        ([], "no column"),
        (good, "conditions must be a list of mappings"),
        (["KLF1"], "conditions must be a list of mappings"),
    ):
        with pytest.raises(InputError, match=message):
            model.sample(conditions)


def test_perturbation_embeddings_are_required_and_allow_new_perturbations():
    embeddings = pd.DataFrame(np.eye(4, 2, dtype=np.float32), index=[*PERTURBATIONS, "MYC"])
    settings = {"network": SMALL_MLP, "perturbation_embedding_width": 2}
    model = PRiMeFlow(3 * 3, 3, None, CONTEXT, None, gene_names=GENES, **settings)
    with pytest.raises(InputError, match="embeddings of width 2"):
        model.sample(CONDITIONS)
    unseen = [{**CONDITIONS[0], "perturbation": "MYC"}]
    assert model.sample(unseen, n=2, perturbation_embeddings=embeddings).shape == (2, 9)


# --- commands


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["primeflow", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def run(tmp_path_factory, screen_path):
    """Folder of a finished tiny run with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    settings = "references=[] trainer.max_steps=4 trainer.val_check_interval=2 trainer.precision=32-true "
    settings += "~callbacks.progress_bar experiment=devel/transfer model=primeflow_mlp model.network.width=16 "
    settings += "model.network.depth=1 model.network.embedding_width=8 "
    settings += "model.sampler.solver.steps=2 model.sampler.cells_per_condition=8"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, "train", *settings.split(), f"data.data.filename={screen_path}", f"hydra.run.dir={folder}")
    return folder


def test_sharing_a_checkpoint_keeps_averaged_weights_and_predictions(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = run / "checkpoints" / "last.ckpt"
    call(monkeypatch, "share", checkpoint, "--output", "shared", "--license", "mit")
    held = torch.load(checkpoint, weights_only=False)
    loaded = PRiMeFlow.from_pretrained("shared")
    trained = {name.removeprefix("module."): tensor for name, tensor in held["current_model_state"].items()}
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())
    for name, tensor in held["state_dict"].items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    config = json.loads(Path("shared/config.json").read_text())
    summary = pd.read_csv(run / "summary.csv", index_col=0).iloc[:, 0].dropna()
    assert config["metrics"] == pytest.approx(summary.to_dict())
    assert config["data"]["file"] == "screen.h5ad"
    assert len(config["data"]["sha256"]) == 64
    conditions = [{"condition": "G0+G7", "cell_type": line} for line in ("alpha", "gamma")]
    pd.DataFrame(conditions).to_csv("table.csv", index=False)
    common = ["prediction_dataframe_path=table.csv", "n_cells=8", "precision=32-true", "model.sampler.guidance=2"]
    for ckpt_path in (checkpoint, "shared"):
        call(monkeypatch, "predict", f"ckpt_path={ckpt_path}", f"output_path={Path(ckpt_path).name}.h5ad", *common)
    first, second = ad.read_h5ad("last.ckpt.h5ad"), ad.read_h5ad("shared.h5ad")
    assert (values(first) == values(second)).all()
    loaded.sampler = loaded.sampler.change({"guidance": 2.0})
    assert (values(loaded.sample(conditions, n=8)) == values(first)).all()


def test_only_primeflow_checkpoints_can_be_shared(tmp_path, monkeypatch, capsys):
    record = {"train_context": {"perturbation_uniques": [], "covariate_uniques": {}}}
    torch.save({"training_record": record, "hyper_parameters": {}, "state_dict": {}}, tmp_path / "other.ckpt")
    for path, message in (
        (tmp_path / "other.ckpt", "is not a PRiMeFlow model"),
        (tmp_path, "is a folder"),
        ("no", "there is no"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, "share", path, "--output", tmp_path / "shared")
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "shared").exists()


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    folder = tmp_path / "model"
    for kind in ("old", "part"):
        leftover = tmp_path / f".model.{killed.pid}.{kind}"
        leftover.mkdir()
        (leftover / "config.json").write_text(kind)
    (tmp_path / f".model.{os.getpid()}.part").mkdir()
    clear_leftovers(folder)
    assert (folder / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".model.{os.getpid()}.part", "model"]
