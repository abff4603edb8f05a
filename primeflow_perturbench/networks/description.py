"""What a model's modules say about their parameters, so that finetuning and sharing need not know the networks.

A module that owns parameters of genes or conditions derives from `DescribedModule` and declares them; `describe`
collects the declarations of a whole model.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

Axes = tuple[int, ...]


class DescribedModule(nn.Module):
    """A module that declares which of its parameters belong to genes and which to conditions.

    All names are relative to the module.

    Attributes
    ----------
    condition_parameters
        Names, or beginnings of names, of the parameters that read conditions.
    condition_layer
        Name of the `nn.Linear` whose inputs are the features of a condition; empty for none.
    perturbation_parameters
        Names of the parameters whose first axis runs over the perturbations of the vocabulary.
    cell_statistics
        Names of the buffers that are computed from the training cells; finetuning computes them again.
    """

    # Subclasses by import path: the only classes that a shared model may name.
    subclasses: ClassVar[dict[str, type["DescribedModule"]]] = {}
    condition_parameters: Sequence[str] = ()
    condition_layer: str = ""
    perturbation_parameters: Sequence[str] = ()
    cell_statistics: Sequence[str] = ()

    def __init_subclass__(cls, **settings: object) -> None:
        super().__init_subclass__(**settings)
        DescribedModule.subclasses[f"{cls.__module__}.{cls.__qualname__}"] = cls

    def gene_axes(self) -> Mapping[str, Axes]:
        """Parameters that belong to genes, with the axes that run over genes, or over the places of a `GeneLayout`.

        Several axes are flattened in their order. Genes come first along them; what follows belongs to no gene. No
        axis at all means that genes share the parameter.
        """
        return {}


@dataclass
class Description:
    """The declarations of all modules of a model, by full name.

    Attributes
    ----------
    gene_axes
        Axes of each parameter of genes, see `DescribedModule.gene_axes`.
    layout_of
        Name of the `GeneLayout` that places the genes of a parameter; parameters of genes in file order are missing.
    condition_parameters, condition_layers, perturbation_parameters, cell_statistics
        See `DescribedModule`.
    """

    gene_axes: dict[str, Axes] = field(default_factory=dict)
    layout_of: dict[str, str] = field(default_factory=dict)
    condition_parameters: list[str] = field(default_factory=list)
    condition_layers: list[str] = field(default_factory=list)
    perturbation_parameters: list[str] = field(default_factory=list)
    cell_statistics: list[str] = field(default_factory=list)

    def group(self, name: str) -> str:
        """Group of a parameter for finetuning: ``genes``, ``conditions`` or ``trunk``."""
        if name in self.gene_axes:
            return "genes"
        return "conditions" if name.startswith(tuple(self.condition_parameters)) else "trunk"


def describe(model: nn.Module) -> Description:
    """Collect what the modules of a model declare."""
    found = Description()
    for prefix, module in model.named_modules():
        if not isinstance(module, DescribedModule):
            continue
        dot = f"{prefix}." if prefix else ""
        axes = {f"{dot}{name}": axes for name, axes in module.gene_axes().items()}
        found.gene_axes |= axes
        if hasattr(module, "lay_out"):
            found.layout_of |= dict.fromkeys(axes, prefix)
        found.condition_parameters += [f"{dot}{name}" for name in module.condition_parameters]
        found.condition_layers += [f"{dot}{module.condition_layer}"] if module.condition_layer else []
        found.perturbation_parameters += [f"{dot}{name}" for name in module.perturbation_parameters]
        found.cell_statistics += [f"{dot}{name}" for name in module.cell_statistics]
    return found


def to_gene_rows(parameter: Tensor, axes: Axes) -> Tensor:
    """View a parameter with its gene axes flattened into the first axis, shape (genes or places, ...)."""
    return parameter.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)


def from_gene_rows(rows: Tensor, like: Tensor, axes: Axes) -> Tensor:
    """The inverse of `to_gene_rows` for a parameter with the shape of ``like``."""
    sizes = [like.shape[axis] for axis in axes]
    return rows.unflatten(0, sizes).movedim(tuple(range(len(axes))), axes)


def shareable_modules() -> Mapping[str, type[DescribedModule]]:
    """Classes that a shared model may name, by import path: those of this package, and subclasses imported before."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        importlib.import_module(module.name)
    return DescribedModule.subclasses
