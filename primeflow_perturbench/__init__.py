"""PRiMeFlow: flow matching of single-cell perturbation responses, a model of the PerturBench benchmark."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from primeflow_perturbench.model import PRiMeFlow

__version__ = "0.1.0"
__all__ = ["PRiMeFlow", "__version__"]


def __getattr__(name: str):
    """Import the model when it is asked for, so that the command line answers at once."""
    if name == "PRiMeFlow":
        from primeflow_perturbench.model import PRiMeFlow

        return PRiMeFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
