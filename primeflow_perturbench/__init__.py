"""PRiMeFlow: flow matching of single-cell perturbation responses, a model of the PerturBench benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from primeflow_perturbench.model import PRiMeFlow

__version__ = "0.1.0"

# In a checkout `configs/` lies beside the package; an installation has it inside.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "configs" / "train.yaml").is_file():
    __path__.append(str(_checkout))
__all__ = ["PRiMeFlow", "__version__"]


def __getattr__(name: str):
    """Import the model when it is asked for, so that the command line answers at once."""
    if name == "PRiMeFlow":
        from primeflow_perturbench.model import PRiMeFlow

        return PRiMeFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
