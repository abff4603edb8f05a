import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from primeflow_perturbench.training.optimizer import GroupedAdam


def test_steps_are_those_of_adam():
    """Two steps written out: m, v, their corrections, and weight decay added to the gradient."""
    model, lr, wd = nn.Linear(2, 1, bias=False, dtype=torch.float64), 0.1, 0.01
    weight = model.weight
    optimizer = GroupedAdam().configure(model, lr, wd, None)
    expected, m, v = weight.detach().clone(), torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for step, gradient in enumerate(([0.3, -1.0], [0.1, 2.0]), start=1):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        g = torch.tensor([gradient], dtype=torch.float64) + wd * expected
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = expected - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_adam_is_fused_only_where_the_device_can():
    assert GroupedAdam().configure(nn.Linear(2, 2), 0.1, 0.0, None).defaults["fused"]
    assert not GroupedAdam().configure(nn.Linear(2, 2, device="meta"), 0.1, 0.0, None).defaults["fused"]


class Line(L.LightningModule):
    """One weight, a gradient of 100, and the optimizer under test."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return 100 * self.weight.sum()

    def configure_optimizers(self):
        return GroupedAdam().configure(self, 0.1, 0.0, None)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradients_can_be_clipped_with_it(tmp_path, precision):
    """Lightning refuses to clip for a fused optimizer under mixed precision."""
    seen = []

    class Clipped(Line):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            seen.append(float(self.weight.grad))

    settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=2, precision=precision, gradient_clip_val=1.0, default_root_dir=tmp_path, **settings)
    trainer.fit(Clipped(), DataLoader(torch.zeros(4, 1)))
    assert seen == pytest.approx([1.0, 1.0], rel=1e-4)
    assert trainer.global_step == 2
