"""Adam, with groups of parameters that train at their own rates or not at all."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Adam

from primeflow_perturbench.training.parameter_groups import adam_groups, check_finetuning, freeze
from primeflow_perturbench.training.schedule import build_schedule

# Devices on which PyTorch fuses a step of Adam into one kernel.
FUSED = ("cuda", "cpu")


class GroupedAdam:
    """Adam (Kingma and Ba 2015) for a model whose groups of parameters may train differently.

    Parameters
    ----------
    finetuning
        ``{freeze, lr_factor}``: the groups among ``genes``, ``conditions`` and ``trunk`` that stay fixed, and factors
        of the learning rate by group; ``None`` trains all parameters alike. See `training.parameter_groups`.

    Raises
    ------
    InputError
        If a group is unknown, a factor is negative or nothing is left to train.
    """

    def __init__(self, finetuning: Mapping[str, Any] | None = None):
        self.factors = check_finetuning(finetuning)

    def freeze(self, model: nn.Module) -> None:
        """Exclude frozen groups from the gradient; to be called before a model is distributed."""
        freeze(model, self.factors)

    def configure(self, model: Any, lr: float, wd: float, schedule: Mapping[str, Any] | None) -> Any:
        """What Lightning's ``configure_optimizers`` returns.

        Parameters
        ----------
        model
            A LightningModule with a trainer.
        lr, wd
            Learning rate and weight decay.
        schedule
            PerturBench's configuration of a scheduler, see `build_schedule`; ``None`` keeps the rate constant.
        """
        fused = all(parameter.device.type in FUSED for parameter in model.parameters())
        optimizer = Adam(adam_groups(model, self.factors, lr), lr=lr, weight_decay=wd, fused=fused or None)
        # Lightning does not clip gradients of an optimizer that unscales them itself, which fused Adam claims to do.
        # Without this mark the gradients are unscaled before the step and can be clipped.
        optimizer._step_supports_amp_scaling = False
        if not schedule:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(schedule, optimizer, model.trainer)}
