"""Weights of a checkpoint for a model of other genes, perturbations and covariates, matched by name.

What belongs to a gene goes to the gene of that name, what belongs to a perturbation or to a category of a covariate to
that of its name; all else is taken whole. The first layer of the conditions is linear, so that a mean of its columns
has a meaning: a new perturbation starts as the mean of all perturbations, a new category as the mean of those of its
covariate, and a covariate that is new to the model at zero. A covariate that is gone leaves the mean of its categories
behind. A gene that is new starts as it would in training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.space import PCASpace
from primeflow_perturbench.finetuning.places import kept_places, lay_out_like
from primeflow_perturbench.finetuning.vocabulary_match import (
    NULL,
    PERTURBATION,
    Column,
    Match,
    covariate_columns,
    perturbations_of,
)
from primeflow_perturbench.networks.condition_embedding import External, MultiHot
from primeflow_perturbench.networks.gene_tokens import GeneLayout, GenePatches, GeneTokens
from primeflow_perturbench.networks.layers import TimeConditionEmbedding
from primeflow_perturbench.networks.mlp import MLP
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
from primeflow_perturbench.networks.residual_mlp import ResidualMLP

if TYPE_CHECKING:
    from primeflow_perturbench.model import PRiMeFlow

State = dict[str, Tensor]
MEND = "finetune with the model's settings of the checkpoint's run (config.yaml in its folder)"
# Endings of what a model may have or not, by its data.
OPTIONAL = ("order", "mean", "std")


def take_over(model: "PRiMeFlow", checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Give a freshly built model the weights of a checkpoint, matched by name.

    Parameters
    ----------
    model
        Built for the new cells, not trained yet.
    checkpoint
        Of a model of the same settings; averaged weights are taken where there are such.

    Returns
    -------
    For ``genes``, ``perturbations`` and each of ``covariates``: how many are ``known``, and the names that are ``new``
    to the model and that are ``dropped`` from it.

    Raises
    ------
    InputError
        If the checkpoint is not of such a model, or differs from it in what has no names.
    """
    for part in ("state_dict", "training_record", "hyper_parameters"):
        if part not in checkpoint:
            raise InputError(
                f"the checkpoint to finetune holds no {part}; give a checkpoint of a run of primeflow train"
            )
    context, old_context = model.training_record["train_context"], checkpoint["training_record"]["train_context"]
    genes = matched_genes(model, checkpoint["hyper_parameters"].get("gene_names"))
    refuse_other_parts(model, checkpoint["state_dict"])
    merged = merged_state(model, checkpoint["state_dict"], genes, context, old_context)
    for name, value in model.state_dict().items():
        refuse_other_shape(name, merged[name].shape, value.shape)
    model.load_state_dict(merged)
    return {
        "genes": told(genes),
        "perturbations": told(Match.of(perturbations_of(context), perturbations_of(old_context))),
        "covariates": told_covariates(context, old_context),
    }


def matched_genes(model: "PRiMeFlow", old_names: Sequence[str] | None) -> Match:
    """The model's genes and those of a checkpoint; `InputError` if they have no names, or nothing in common."""
    if model.gene_names is None or old_names is None:
        which = "new data" if model.gene_names is None else "checkpoint"
        raise InputError(
            f"finetuning matches genes by name, but the {which} names none; use a host that names its genes"
        )
    genes = Match.of([str(name) for name in model.gene_names], [str(name) for name in old_names])
    if not len(genes.new):
        raise InputError(
            f"the new data's genes ({model.gene_names[0]}, ...) and the checkpoint's ({old_names[0]}, ...) have no "
            "name in common; name the genes of the new data as the checkpoint's are named"
        )
    if isinstance(model.space, PCASpace) and not genes.same:
        raise InputError(
            "the checkpoint's space is of principal components, which belong to its own genes in their order, but the "
            "new data have others; give them the checkpoint's genes, or finetune a model with space=genes"
        )
    return genes


def refuse_other_parts(model: "PRiMeFlow", old: State) -> None:
    """Raise `InputError` if model and checkpoint do not have the same parameters by name."""
    own = set(model.state_dict())
    lacks = sorted(name for name, _ in model.named_parameters() if name not in old)
    extra = sorted(name for name in old if name not in own and not name.endswith(OPTIONAL))
    if lacks or extra:
        which = f"lacks {lacks[0]!r}, which the model has" if lacks else f"has {extra[0]!r}, which the model lacks"
        raise InputError(f"the checkpoint is of another kind of model: it {which}; {MEND}")


def refuse_other_shape(name: str, old: Sequence[int], new: Sequence[int]) -> None:
    """Raise `InputError` if the shapes of a tensor of the checkpoint, where matched, and of the model differ."""
    if tuple(old) != tuple(new):
        raise InputError(
            f"the checkpoint's weights {name!r} have shape {tuple(old)}, but the model needs {tuple(new)}; {MEND}"
        )


def merged_state(
    model: "PRiMeFlow", old: State, genes: Match, context: Mapping[str, Any], old_context: Mapping[str, Any]
) -> State:
    """The model's state with all that the checkpoint knows; lays out the model's genes on the way."""
    # Of principal components each is its own, and they are all the same.
    coordinates = Match.of(range(model.space.width), range(model.space.width))
    axis = coordinates if isinstance(model.space, PCASpace) else genes
    with torch.random.fork_rng(devices=[]):
        # What is new is the seed's own, whatever has been drawn before.
        torch.manual_seed(model.seed)
        for name, module in model.named_modules():
            if isinstance(module, GeneLayout):
                refuse_other_patch(module, name, old)
                lay_out_like(module, old.get(f"{name}.order"), old[f"{name}.embedding"], axis)
    fresh = model.state_dict()
    merged = {name: old.get(name, value) for name, value in fresh.items()}
    merges: dict[type, Callable[[nn.Module, State, State], Iterator[tuple[str, Tensor]]]] = {
        GeneTokens: lambda *parts: of_tokens(*parts, axis),
        GenePatches: lambda *parts: of_patches(*parts, axis),
        MLP: lambda *parts: of_mlp(*parts, axis),
        ResidualMLP: lambda *parts: of_residual_mlp(*parts, axis),
        GaussianPreconditioning: lambda _, new, __: ((name, new[name]) for name in ("mean", "std")),
        TimeConditionEmbedding: lambda *parts: of_first_layer(*parts, model, context, old_context),
        MultiHot: lambda *parts: of_perturbations(*parts, context, old_context),
    }
    for prefix, module in model.named_modules():
        for kind, merge in merges.items():
            if isinstance(module, kind):
                own = {name.removeprefix(f"{prefix}."): v for name, v in fresh.items() if name.startswith(f"{prefix}.")}
                known = {name.removeprefix(f"{prefix}."): v for name, v in old.items() if name.startswith(f"{prefix}.")}
                merged |= {f"{prefix}.{name}": value for name, value in merge(module, own, known)}
                if isinstance(module, GeneLayout) and module.order is not None:
                    merged[f"{prefix}.order"] = module.order
    return merged


def refuse_other_patch(module: GeneLayout, name: str, old: State) -> None:
    """Raise `InputError` if a checkpoint's patches are of another size."""
    if isinstance(module, GenePatches):
        refuse_other_shape(f"{name}.read_in", old[f"{name}.read_in"].shape[1:], module.read_in.shape[1:])


def matched(name: str, new: Tensor, old: Tensor, match: Match, dim: int = 0) -> Tensor:
    """The new tensor with the old one's values along an axis at the names that both have."""
    shape = list(old.shape)
    shape[dim] = new.shape[dim]
    refuse_other_shape(name, shape, new.shape)
    return new.index_copy(dim, match.new, old.to(new).index_select(dim, match.old))


def of_tokens(genes: GeneTokens, new: State, old: State, axis: Match) -> Iterator[tuple[str, Tensor]]:
    """Embeddings of places; shared ones are whole."""
    if genes.gene_embedding:
        kept = kept_places(genes, old["embedding"].shape[1], axis)
        refuse_other_shape("embedding", old["embedding"].shape[:1], new["embedding"].shape[:1])
        yield "embedding", new["embedding"].index_copy(1, kept, old["embedding"][:, kept])


def of_patches(genes: GenePatches, new: State, old: State, axis: Match) -> Iterator[tuple[str, Tensor]]:
    """Weights of patches, and of the places in them."""
    length = len(old["embedding"])
    yield "embedding", torch.cat([old["embedding"], new["embedding"][length:]])
    kept = kept_places(genes, length * genes.patch, axis)
    patch, slot = kept // genes.patch, kept % genes.patch
    for name in genes.OF_SLOTS:
        if name in new:
            refuse_other_shape(name, old[name].shape[1:], new[name].shape[1:])
            # A gene's slot is the last axis but of what is read in.
            axis_of_slot = 1 if name == "read_in" else -1
            by_slot = new[name].clone().movedim(axis_of_slot, 1)
            by_slot[patch, slot] = old[name].movedim(axis_of_slot, 1)[patch, slot]
            yield name, by_slot.movedim(1, axis_of_slot)
    kept = kept[kept < min(len(new["bias"]), len(old["bias"]))]
    for name in genes.OF_PLACES:
        if name in new:
            refuse_other_shape(name, old[name].shape[:-1], new[name].shape[:-1])
            of_places = new[name].clone()
            of_places[..., kept] = old[name][..., kept]
            yield name, of_places


def of_mlp(network: MLP, new: State, old: State, axis: Match) -> Iterator[tuple[str, Tensor]]:
    """Columns of the first layer, behind which the embedding's follow, and rows of the last."""
    first, last = "layers.0.weight", f"layers.{len(network.layers) - 1}"
    embedding = network.embed.width
    by_gene = matched(first, new[first][:, :-embedding], old[first][:, :-embedding], axis, dim=1)
    yield first, torch.cat([by_gene, old[first][:, -embedding:]], dim=1)
    for name in (f"{last}.weight", f"{last}.bias"):
        yield name, matched(name, new[name], old[name], axis)


def of_residual_mlp(network: ResidualMLP, new: State, old: State, axis: Match) -> Iterator[tuple[str, Tensor]]:
    """Columns of the read-in, rows of the read-outs, and the last axis of what reads a gene's own value."""
    of_genes = {"read_in.weight": 1, "read_out.weight": 0, "read_out.bias": 0, "direct.weight": 0}
    of_genes |= dict.fromkeys(("own.scale", "own.shift", "own.bias", "own.read_out"), -1)
    for name, dim in of_genes.items():
        if name in new:
            yield name, matched(name, new[name], old[name], axis, dim)


def of_perturbations(
    conditions: MultiHot, new: State, old: State, context: Mapping[str, Any], old_context: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Learnt embeddings of perturbations, and rows of known ones in the units of the checkpoint."""
    match = Match.of(perturbations_of(context), perturbations_of(old_context))
    for name in {"learned", "gate"} & set(new):
        yield name, matched(name, old[name].mean(0).expand_as(new[name]), old[name], match)
    if isinstance(conditions, External):
        refuse_other_shape("conditions.mean", old["mean"].shape, new["mean"].shape)
        columns = len(new["mean"])
        values, has = new["table"][:, :columns], new["table"][:, columns:]
        known = has.repeat_interleave(torch.tensor(conditions.table_widths), dim=1)
        raw = values * new["std"] + new["mean"]
        yield "table", torch.cat([(raw - old["mean"]) / old["std"] * known, has], dim=1)
        yield from ((name, old[name]) for name in ("mean", "std"))
        yield "seen", new["seen"]


def of_first_layer(
    embed: TimeConditionEmbedding,
    new: State,
    old: State,
    model: "PRiMeFlow",
    context: Mapping[str, Any],
    old_context: Mapping[str, Any],
) -> Iterator[tuple[str, Tensor]]:
    """First layer of the conditions, see the module's text."""
    name = "condition.0.weight"
    refuse_other_shape(name, old[name].shape[:1], new[name].shape[:1])
    columns = read_columns(model, context, new[name].shape[1])
    old_columns = read_columns(model, old_context, old[name].shape[1])
    counts = [sum(kind == PERTURBATION for kind, _ in some) for some in (old_columns, columns)]
    by_name = [columns_are_named(model, some) for some in (old_context, context)]
    if by_name[0] != by_name[1] or (not by_name[0] and counts[0] != counts[1]):
        raise InputError(
            f"the checkpoint knows perturbations by {counts[0]} features, but the model by {counts[1]}, and features "
            f"have no names to be matched by; {MEND}"
        )
    weight, bias = merged_columns(old[name], old["condition.0.bias"], columns, old_columns)
    yield from ((name, weight), ("condition.0.bias", bias))


def read_columns(model: "PRiMeFlow", context: Mapping[str, Any], width: int) -> list[Column]:
    """What each of the features stands for that the network reads of a condition."""
    covariates = covariate_columns(context)
    features = width - len(covariates) - 1
    named = columns_are_named(model, context)
    names = perturbations_of(context) if named else [f"feature {i}" for i in range(features)]
    return [*((PERTURBATION, name) for name in names), *covariates, (NULL, None)]


def columns_are_named(model: "PRiMeFlow", context: Mapping[str, Any]) -> bool:
    """Whether the network has a column for each perturbation; otherwise it reads their features."""
    return type(model.conditions) is MultiHot and not context.get("use_perturbation_embedding")


def merged_columns(
    weight: Tensor, bias: Tensor, columns: Sequence[Column], old_columns: Sequence[Column]
) -> tuple[Tensor, Tensor]:
    """Weight (E, C) and bias (E,) of a linear layer for other columns.

    Parameters
    ----------
    weight, bias
        For the old columns.
    columns, old_columns
        Kind and name of each.
    """
    match = Match.of(columns, old_columns)
    kinds = {kind for kind, _ in columns}
    named = {kind for kind, name in old_columns if name is not None}
    means = {
        kind: weight[:, [i for i, column in enumerate(old_columns) if column[0] == kind]].mean(1) for kind in named
    }
    new = weight.new_zeros(len(weight), len(columns))
    new[:, match.new] = weight[:, match.old]
    for i in match.added.tolist():
        kind, name = columns[i]
        if name is not None and kind in means:
            new[:, i] = means[kind]
    null = columns.index((NULL, None))
    for kind in set(means) - kinds - {PERTURBATION}:
        bias = bias + means[kind]
        new[:, null] -= means[kind]
    return new, bias


def told(match: Match) -> dict[str, Any]:
    """A match for a report."""
    return {"known": len(match.new), "new": match.added_names, "dropped": match.dropped_names}


def told_covariates(context: Mapping[str, Any], old_context: Mapping[str, Any]) -> dict[str, Any]:
    """The matches of all covariates by name, those that only one of the two has among them."""
    columns, old_columns = covariate_columns(context), covariate_columns(old_context)
    keys = dict.fromkeys(kind[1] for kind, _ in [*columns, *old_columns])

    def names(of: Sequence[Column], key: str) -> list[str]:
        return ["(continuous)" if name is None else name for kind, name in of if kind[1] == key]

    return {key: told(Match.of(names(columns, key), names(old_columns, key))) for key in keys}
