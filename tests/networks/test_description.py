"""A network that no other module knows is grouped, finetuned, saved and loaded by its own description."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.model import PRiMeFlow
from primeflow_perturbench.networks.description import (
    Axes,
    DescribedModule,
    describe,
    from_gene_rows,
    shareable_modules,
    to_gene_rows,
)
from primeflow_perturbench.training.optimizer import GroupedAdam
from primeflow_perturbench.training.parameter_groups import parameters_by_group

GENES = ["A", "B", "C", "D"]


class ToyNetwork(DescribedModule):
    """``v_g = s_g h(t) x_g + <w_g, condition layer>``, with weights of genes along the last axis of ``table``."""

    condition_parameters = ("read_condition.",)
    condition_layer = "read_condition"

    def __init__(self, n_genes: int, condition_width: int, width: int = 3):
        super().__init__()
        self.table = nn.Parameter(torch.randn(width, 2, n_genes))
        self.time = nn.Linear(1, width)
        self.read_condition = nn.Linear(condition_width, width)

    def gene_axes(self) -> Mapping[str, Axes]:
        return {"table": (2,)}

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * (self.time(t[:, None]) @ self.table[:, 0]) + self.read_condition(condition) @ self.table[:, 1]


def build(genes=GENES, perturbations=("P", "Q"), **settings):
    context = {
        "perturbation_uniques": list(perturbations),
        "covariate_uniques": {},
        "perturbation_key": "condition",
        "covariate_keys": [],
        "perturbation_combination_delimiter": "+",
        "perturbation_control_value": "control",
    }
    given = {"network": partial(ToyNetwork, width=5), "gene_names": genes, **settings}
    return PRiMeFlow(len(genes), len(perturbations), None, context, None, **given)


def test_parameters_of_a_new_network_are_grouped():
    model = build(optimizer=GroupedAdam({"freeze": ["genes"]}))
    groups = parameters_by_group(model)
    assert groups["genes"] == [model.network.table]
    assert groups["conditions"] == list(model.network.read_condition.parameters())
    assert groups["trunk"] == list(model.network.time.parameters())
    assert not model.network.table.requires_grad
    assert model.network.time.weight.requires_grad


def test_a_new_network_is_finetuned_by_name():
    old, new = build(), build(["D", "new", "B"], ["Q", "R"], seed=1)
    fresh = new.network.table.detach().clone()
    new.take_over(
        {
            "state_dict": old.state_dict(),
            "training_record": old.training_record,
            "hyper_parameters": dict(old.hparams),
        }
    )
    assert torch.equal(new.network.table[..., [0, 2]], old.network.table[..., [3, 1]])
    assert torch.equal(new.network.table[..., 1], fresh[..., 1])
    was, now = old.network.read_condition.weight, new.network.read_condition.weight
    torch.testing.assert_close(now, torch.stack([was[:, 1], was[:, :2].mean(1), was[:, 2]], dim=1))
    assert torch.equal(new.network.time.weight, old.network.time.weight)


def test_a_new_network_is_saved_and_loaded(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path / "model")
    loaded = PRiMeFlow.from_pretrained(tmp_path / "model")
    assert type(loaded.network) is ToyNetwork
    conditions = [{"perturbation": "P+Q"}]
    assert (loaded.sample(conditions, n=3).X != model.sample(conditions, n=3).X).nnz == 0


def test_a_network_without_description_cannot_be_saved(tmp_path):
    class Plain(nn.Module):
        def __init__(self, n_genes: int, condition_width: int):
            super().__init__()

    with pytest.raises(InputError, match="derive a network from networks.description.DescribedModule"):
        build(network=Plain).save_pretrained(tmp_path / "model")


def test_a_description_has_full_names():
    description = describe(build())
    assert description.gene_axes == {"network.table": (2,)}
    assert description.condition_layers == ["network.read_condition"]
    assert description.group("network.read_condition.bias") == "conditions"


def test_rows_of_genes_can_be_taken_apart_and_put_back():
    parameter = torch.randn(2, 5, 3)
    rows = to_gene_rows(parameter, (0, 2))
    assert rows.shape == (6, 5)
    assert torch.equal(rows[4], parameter[1, :, 1])
    assert torch.equal(from_gene_rows(rows, parameter, (0, 2)), parameter)


def test_every_network_of_the_package_can_be_shared():
    names = {name.rpartition(".")[2] for name in shareable_modules()}
    assert {"MLP", "ResidualMLP", "UNet", "GeneTokens", "GenePatches", "MultiHot", "External", "Mixture"} <= names
