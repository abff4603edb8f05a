"""Transfer the weights of a checkpoint to a model of other genes, perturbations and covariates, matched by name.

Weights of a gene go to the gene with the same name, weights of a perturbation or of a category of a covariate to that
with the same name; all others are copied. The first layer that reads conditions is linear, so that means of its columns
are meaningful: a new perturbation starts at the mean of all perturbations, a new category at the mean of its covariate,
and a new covariate at zero. A missing covariate leaves the mean of its categories in the bias. A new gene starts as in
a fresh model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import PCASpace
from primeflow_perturbench.finetuning.vocabulary_match import Match, covariate_names, match_report, perturbation_names
from primeflow_perturbench.networks.condition_embedding import External, MultiHot
from primeflow_perturbench.networks.description import Axes, describe, from_gene_rows, to_gene_rows
from primeflow_perturbench.networks.gene_layout import FREE, GeneLayout

State = dict[str, Tensor]
Context = Mapping[str, Any]
Kind = tuple[str, ...]
# Kind of a feature of a condition, and its name; a continuous covariate and the null flag have none.
Column = tuple[Kind, str | None]
PERTURBATION: Kind = ("perturbation",)
NULL: Kind = ("null",)
HINT = "finetune with the model settings of the checkpoint's run (config.yaml in its folder)"
# Endings of tensors that a model may have or lack, depending on its data.
OPTIONAL = ("order", "mean", "std")


def take_over(model: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Give a fresh model the weights of a checkpoint, matched by name.

    Parameters
    ----------
    model
        A `PRiMeFlow` built for the new cells.
    checkpoint
        Checkpoint of a model with the same settings; its averaged weights are used if there are any.

    Returns
    -------
    For ``genes``, ``perturbations`` and each of ``covariates``: the number of ``known`` names, the ``new`` and the
    ``dropped`` names.

    Raises
    ------
    InputError
        If the checkpoint belongs to another kind of model.
    """
    for part in ("state_dict", "training_record", "hyper_parameters"):
        if part not in checkpoint:
            raise InputError(
                f"the checkpoint to finetune contains no {part}; give a checkpoint of a run of primeflow train"
            )
    context, old_context = model.training_record["train_context"], checkpoint["training_record"]["train_context"]
    old = checkpoint["state_dict"]
    genes = match_genes(model, checkpoint["hyper_parameters"].get("gene_names"))
    check_same_kind(model, old)
    # The coordinates of PCA are no genes: they correspond by position.
    coordinates = range(model.space.width)
    axis = Match.of(coordinates, coordinates) if isinstance(model.space, PCASpace) else genes
    with torch.random.fork_rng(devices=[]):
        # New weights depend on the seed alone, not on what was drawn before.
        torch.manual_seed(model.seed)
        for name, module in model.named_modules():
            if isinstance(module, GeneLayout):
                keep_places(module, name, old, axis)
    merged = merge_states(model, old, axis, context, old_context)
    for name, value in model.state_dict().items():
        check_shape(name, merged[name].shape, value.shape)
    model.load_state_dict(merged)
    return match_report(genes, context, old_context)


def match_genes(model: Any, old_names: Sequence[str] | None) -> Match:
    """Match the genes of a model with those of a checkpoint.

    Raises
    ------
    InputError
        If genes have no names, none is shared, or principal components belong to other genes.
    """
    if model.gene_names is None or old_names is None:
        which = "new data" if model.gene_names is None else "checkpoint"
        raise InputError(
            f"finetuning matches genes by name, but the {which} names none; use a version of PerturBench that passes "
            "gene_names"
        )
    genes = Match.of([str(name) for name in model.gene_names], [str(name) for name in old_names])
    if not len(genes.new):
        raise InputError(
            f"the new data's genes ({model.gene_names[0]}, ...) and the checkpoint's ({old_names[0]}, ...) have no "
            "name in common; use the same kind of gene names"
        )
    if isinstance(model.space, PCASpace) and not genes.same:
        raise InputError(
            "the checkpoint uses principal components, which belong to its genes in their order, but the new data have "
            "other genes; use the checkpoint's genes, or finetune a model with space=genes"
        )
    return genes


def check_same_kind(model: nn.Module, old: State) -> None:
    """Raise `InputError` if model and checkpoint do not have the same parameters by name."""
    own = set(model.state_dict())
    lacks = sorted(name for name, _ in model.named_parameters() if name not in old)
    extra = sorted(name for name in old if name not in own and not name.endswith(OPTIONAL))
    if lacks or extra:
        which = f"lacks {lacks[0]!r}, which the model has" if lacks else f"has {extra[0]!r}, which the model lacks"
        raise InputError(f"the checkpoint is of another kind of model: it {which}; {HINT}")


def check_shape(name: str, old: Sequence[int], new: Sequence[int]) -> None:
    """Raise `InputError` if the shape of a tensor of the checkpoint differs from that of the model."""
    if tuple(old) != tuple(new):
        raise InputError(
            f"the checkpoint's weights {name!r} have shape {tuple(old)}, but the model needs {tuple(new)}; {HINT}"
        )


def keep_places(layout: GeneLayout, name: str, old: State, genes: Match) -> None:
    """Lay out the genes so that known ones keep their place, and new ones fill free places, then places at the end."""
    old_order, rows = old.get(f"{name}.order"), 0
    for parameter, axes in layout.gene_axes().items():
        before = old[f"{name}.{parameter}"]
        if len(axes) > 1:  # Places are (patch, gene in the patch): patches of another size have other places.
            check_shape(f"{name}.{parameter}", before.shape[1:], layout.get_parameter(parameter).shape[1:])
        rows = max(rows, len(to_gene_rows(before, axes))) if axes else rows
    if genes.same:
        if old_order is not None:
            layout.lay_out(old_order)
        return
    n_old = len(genes.old) + len(genes.dropped_names)
    old_order = torch.arange(n_old) if old_order is None else old_order.cpu()
    # A last patch that is not full has weights for more places than the order has.
    order = torch.full((max(rows, len(old_order)),), FREE)
    place = old_order.argsort()[len(old_order) - n_old :]
    order[place[genes.old]] = genes.new
    free = (order == FREE).nonzero()[: len(genes.added), 0]
    order[free] = genes.added[: len(free)]
    layout.lay_out(torch.cat([order, genes.added[len(free) :]]))


def merge_states(model: Any, old: State, genes: Match, context: Context, old_context: Context) -> State:
    """The state of the model with all weights that the checkpoint knows."""
    description, fresh = describe(model), model.state_dict()
    merged: State = {name: old.get(name, value) for name, value in fresh.items()}
    merged |= {name: fresh[name] for name in description.cell_statistics}
    for name, axes in description.gene_axes.items():
        layout = model.get_submodule(description.layout_of[name]) if name in description.layout_of else None
        merged[name] = merge_genes(name, fresh[name], old[name], axes, genes, layout)
        if layout is not None and layout.order is not None:
            merged[f"{description.layout_of[name]}.order"] = layout.order
    perturbations = Match.of(perturbation_names(context), perturbation_names(old_context))
    for name in description.perturbation_parameters:
        check_shape(name, old[name].shape[1:], fresh[name].shape[1:])
        merged[name] = (
            old[name].mean(0).expand_as(fresh[name]).index_copy(0, perturbations.new, old[name][perturbations.old])
        )
    for name in description.condition_layers:
        merged |= merge_condition_layer(name, fresh, old, model, context, old_context)
    if isinstance(model.conditions, External):
        for name in ("mean", "std"):
            check_shape(f"conditions.{name}", old[f"conditions.{name}"].shape, fresh[f"conditions.{name}"].shape)
        model.conditions.set_units(old["conditions.mean"], old["conditions.std"])
        merged["conditions.table"] = model.conditions.table
    return merged


def merge_genes(name: str, new: Tensor, old: Tensor, axes: Axes, genes: Match, layout: GeneLayout | None) -> Tensor:
    """A parameter of genes with the checkpoint's weights of all known genes."""
    if not axes:
        # Shared between genes, such as the embeddings of patches, of which there may be more now.
        kept = min(len(new), len(old))
        check_shape(name, old.shape[1:], new.shape[1:])
        return torch.cat([old[:kept], new[kept:]])
    new_rows, old_rows = to_gene_rows(new, axes), to_gene_rows(old, axes)
    if old_rows.shape[1:] != new_rows.shape[1:]:
        check_shape(name, old.shape, new.shape)
    rows = new_rows.clone()
    if layout is not None:
        # Known genes have kept their places, and places of missing genes keep their weights.
        stays = torch.ones(max(layout.places, len(new_rows)), dtype=torch.bool)
        stays[layout.place_of_gene[genes.added]] = False
        kept = stays[: min(len(new_rows), len(old_rows))].nonzero()[:, 0]
        rows[kept] = old_rows[kept]
    else:
        rows[genes.new] = old_rows[genes.old]
        n_new, n_old = len(genes.new) + len(genes.added), len(genes.old) + len(genes.dropped_names)
        check_shape(name, old_rows[n_old:].shape, rows[n_new:].shape)
        rows[n_new:] = old_rows[n_old:]
    return from_gene_rows(rows, new, axes)


def merge_condition_layer(
    layer: str, new: State, old: State, model: Any, context: Context, old_context: Context
) -> State:
    """Weight and bias of the linear layer that reads conditions; see the module docstring."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    check_shape(weight, old[weight].shape[:1], new[weight].shape[:1])
    columns = condition_columns(model, context, new[weight].shape[1])
    old_columns = condition_columns(model, old_context, old[weight].shape[1])
    counts = [sum(kind == PERTURBATION for kind, _ in each) for each in (old_columns, columns)]
    named = [columns_have_names(model, each) for each in (old_context, context)]
    if named[0] != named[1] or (not named[0] and counts[0] != counts[1]):
        raise InputError(
            f"the checkpoint represents perturbations by {counts[0]} features, but the model by {counts[1]}, and "
            f"features have no names to match; {HINT}"
        )
    match = Match.of(columns, old_columns)
    covariates = covariate_names(old_context)
    kinds = [PERTURBATION, *(("covariate", name) for name, categories in covariates.items() if categories != [None])]
    means = {kind: old[weight][:, [column[0] == kind for column in old_columns]].mean(1) for kind in kinds}
    merged = old[weight].new_zeros(len(old[weight]), len(columns))
    merged[:, match.new] = old[weight][:, match.old]
    for i in match.added.tolist():
        kind, name = columns[i]
        if name is not None and kind in means:
            merged[:, i] = means[kind]
    merged_bias = old[bias]
    for kind in kinds[1:]:
        if kind[1] not in covariate_names(context):
            merged_bias = merged_bias + means[kind]
            # The null condition never had the covariate.
            merged[:, -1] -= means[kind]
    return {weight: merged, bias: merged_bias}


def condition_columns(model: Any, context: Context, width: int) -> list[Column]:
    """Kind and name of each of the ``width`` features of a condition that a network reads."""
    covariates = [(("covariate", key), name) for key, names in covariate_names(context).items() for name in names]
    n_features = width - len(covariates) - 1
    names = perturbation_names(context) if columns_have_names(model, context) else list(map(str, range(n_features)))
    return [*((PERTURBATION, name) for name in names), *covariates, (NULL, None)]


def columns_have_names(model: Any, context: Context) -> bool:
    """Whether the network has a column for each perturbation; otherwise it reads features of perturbations."""
    return type(model.conditions) is MultiHot and not context.get("use_perturbation_embedding")
