"""A training decides what its sampling settings leave open, without changing what it learns."""

from functools import partial

import lightning as L
import pytest
import torch
from builders import Batches, build_model, fit
from torch import nn

from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.sampling import choice
from primeflow_perturbench.sampling.generate import settled

Batch = load("data.types.Batch")
GENES, PERTURBATIONS, LINES = [f"g{i}" for i in range(5)], ["A", "B"], ["x", "y"]
OPEN = {"calibrate": "auto", "control_start": "auto"}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


@pytest.fixture(autouse=True)
def _pilots_with_few_conditions(monkeypatch):
    monkeypatch.setattr(choice, "FEWEST", 3)


CONTEXT = {"perturbation_uniques": PERTURBATIONS, "covariate_uniques": {"line": LINES}}


def build(**settings):
    return build_model(GENES, CONTEXT, **settings)


def batch(*conditions, n=12, seed=0):
    """Cells of conditions such as "Ax"; controls are written "-x"."""
    labels, lines = zip(*[tuple(name) for name in conditions for _ in range(n)], strict=True)
    hot = torch.tensor([[float(name == label) for name in PERTURBATIONS] for label in labels])
    covariates = {"line": nn.functional.one_hot(torch.tensor([LINES.index(line) for line in lines]), 2).float()}
    x = 1.5 + torch.rand(len(labels), len(GENES), generator=torch.Generator().manual_seed(seed))
    return Batch(gene_expression=x, perturbations=hot, covariates=covariates, gene_names=None)


TRAINING = batch("-x", "-y", "Ax", "Ay", "Bx")


class WithValidation(Batches):
    """The training batches, and a validation batch."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader([batch("By", "Ax", "-y", seed=1)], batch_size=None)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_pilot_trainings_decide_and_change_no_weight_of_the_training():
    model, plain = build(**OPEN), build()
    fit(model, TRAINING, steps=4)
    fit(plain, TRAINING, steps=4)
    assert "pilot" in model.choice.held_out_by
    # Ax has another condition of A; Bx is the only one of B.
    assert model.choice.conditions == 1
    assert len(model.choice.energy) == 10
    own, other = weights(model), weights(plain)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_validation_conditions_decide_where_training_lacks_some():
    model, data = build(**OPEN), WithValidation(TRAINING)
    trainer = L.Trainer(
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert model.choice.held_out_by == "validation"
    assert model.choice.conditions == 1
    assert float(trainer.callback_metrics["val_energy"]) == pytest.approx(min(model.choice.energy.values()))


def test_a_checkpoint_keeps_the_choice_even_before_the_first_validation():
    model = build(**OPEN)
    fit(model, TRAINING, steps=1)
    decided, model.choice = model.choice, None
    model.held_out = choice.held_out(*samples(model, "By"), set())
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    assert model.choice.held_out_by == "validation"
    other = build(**OPEN)
    other.on_load_checkpoint(checkpoint)
    assert other.choice == model.choice != decided
    assert settled(other) == settled(model)


def test_a_shared_model_keeps_the_choice(tmp_path):
    model = build(**OPEN, network=partial(MLP, width=16, depth=2, embedding_width=8))
    context = {"perturbation_key": "condition", "perturbation_control_value": "control", "covariate_keys": ["line"]}
    fit(model, TRAINING, steps=1)
    record = {**CONTEXT, **context, "perturbation_combination_delimiter": "+"}
    model.training_record = {"train_context": record, "transform": None}
    model.save_pretrained(tmp_path / "shared")
    assert PRiMeFlow.from_pretrained(tmp_path / "shared").choice == model.choice


def samples(model, name):
    cells = batch(name, seed=2)
    return model.encoder(cells.perturbations, cells.covariates), cells.gene_expression


def test_cells_of_a_context_without_controls_start_from_the_nearest_controls():
    model = build(control_start=0.5)
    fit(model, batch("-x", "Ax", "Ay"), steps=1)
    condition, _ = samples(model, "Ay")
    assert len(model.controls.contexts) == 1
    assert model.generate(condition[:3]).shape == (3, len(GENES))
