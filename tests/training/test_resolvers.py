import primeflow_perturbench.configs  # noqa: F401  (reading them makes the resolvers known)
import pytest
from omegaconf import OmegaConf

from primeflow_perturbench.training.resolvers import accumulation, either


@pytest.mark.parametrize(
    ("batch", "devices", "nodes", "batches"),
    [(48, 1, 1, 16), (48, 4, 1, 4), (48, [0, 1], 1, 8), (48, 4, 2, 2), (54, 4, 1, 4), (1000, 1, 1, 1), (768, 8, 1, 1)],
)
def test_the_effective_batch_stays_on_any_number_of_devices(batch, devices, nodes, batches):
    assert accumulation(768, batch, devices, nodes) == batches


@pytest.mark.parametrize("devices", ["auto", -1])
def test_all_devices_are_the_gpus_or_one(devices, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert accumulation(768, 48, devices) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert accumulation(768, 48, devices) == 16


def test_the_first_choice_that_was_made_counts():
    assert either(None, "null", "unet", "mlp") == "unet"
    assert either(None) is None


def test_the_doorway_answers_in_a_configuration():
    cfg = OmegaConf.create({"a": "${benchmark:data.modules.AnnDataLitModule}", "n": "${accumulation:64,8,2}"})
    assert cfg.a == "primeflow_perturbench.perturbench.embedded.data.modules.AnnDataLitModule"
    assert cfg.n == 4
