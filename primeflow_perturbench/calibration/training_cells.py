"""What a model learns from the training cells without gradients, before the first step."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.conditions.embedding_tables import seen_in_training
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool, ControlReservoir
from primeflow_perturbench.expression.detection_limit import learn_detection_limit
from primeflow_perturbench.expression.gene_metadata import set_gene_metadata
from primeflow_perturbench.expression.space import PCASpace
from primeflow_perturbench.expression.statistics import (
    ExpressionStatistics,
    MarginalStatistics,
    TrainingStatistics,
    check_log1p,
)
from primeflow_perturbench.expression.unmeasured import check_unmeasured
from primeflow_perturbench.flow.coupling import check_coupling
from primeflow_perturbench.networks.condition_embedding import External
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning


def collect(model: Any, kept_cells: int = 0) -> TrainingStatistics:
    """Statistics of the training cells of all processes, in one pass that ends when there are enough.

    Parameters
    ----------
    model
        A `PRiMeFlow` with a trainer.
    kept_cells
        Least number of cells that are kept, with their conditions.

    Raises
    ------
    InputError
        If the cells are not log1p expression, or a setting needs something that is missing.
    """
    if model.trainer.datamodule is None:
        raise InputError("PRiMeFlow reads the training cells before it trains: fit it with a data module")
    if model.unmeasured_are_nan:
        check_unmeasured(model.objective, model.sampler, isinstance(model.space, PCASpace))
    check_coupling(model.objective.coupling)
    from_controls = model.objective.source == "control" or model.sampler.control_start is not None
    statistics = TrainingStatistics(
        expression=ExpressionStatistics(unmeasured_are_nan=model.unmeasured_are_nan),
        controls=ControlReservoir(model.objective.source_cells) if from_controls else None,
        marginals=None if model.sampler.calibrate == "none" else MarginalStatistics(),
        kept_cells=max(model.space.fit_cells, kept_cells),
    )
    for batch in model.trainer.datamodule.train_dataloader():
        statistics.add(model.encoder(batch.perturbations, batch.covariates), batch.gene_expression)
        enough = statistics.expression.cells * model.world_size >= model.STATISTICS_CELLS
        if enough and (statistics.controls is None or statistics.controls.complete):
            break
    if model.world_size > 1:
        everyone: list[Any] = [None] * model.world_size
        torch.distributed.all_gather_object(everyone, statistics)
        statistics = TrainingStatistics.merge(everyone)
    check_log1p(statistics.expression)
    return statistics


def learn(model: Any, statistics: TrainingStatistics) -> None:
    """Set the parts of a `PRiMeFlow` that are learned from statistics of the training cells."""
    kept = statistics.first(model.space.fit_cells)
    cells = None if kept is None else kept[1]
    if model.unmeasured_are_nan:
        model.gene_means = statistics.expression.mean.float()
    if model.learned_detection_limit is None:
        # Weights that were trained, here or in a checkpoint, keep the space and gene metadata of their training.
        if model.taken_over is None:
            set_gene_metadata(model.network, model.gene_names)
            model.space.fit(cells)
            model.conditions.covariates.set_statistics(*statistics.covariates.moments())
        if isinstance(model.conditions, External):
            names = model.training_record["train_context"]["perturbation_uniques"]
            model.conditions.set_seen(seen_in_training(model.trainer.datamodule, names))
    model.learned_detection_limit = learn_detection_limit(statistics.expression)
    if statistics.marginals is not None:
        model.marginals = Marginals.fit(model.encoder, statistics.marginals)
    if isinstance(model.network, GaussianPreconditioning):
        model.network.set_statistics(*model.space.statistics(statistics.expression, cells))
    # Paths begin at controls of the same context; counterfactual sampling takes those of the nearest.
    everywhere = model.objective.source == "control"
    optional = not everywhere and model.sampler.control_start == "auto"
    if statistics.controls is not None and not (optional and statistics.controls.empty):
        encode = lambda x: model.space.encode(x.to(model.device))  # noqa: E731
        model.controls = ControlPool.fit(statistics.controls, encode, model.covariates, everywhere)


def save(model: Any, checkpoint: dict[str, Any]) -> None:
    """Add what a `PRiMeFlow` has learned to a checkpoint."""
    checkpoint["primeflow"] = {"detection_limit": model.learned_detection_limit}
    if model.choice is not None:
        checkpoint["primeflow"]["choice"] = asdict(model.choice)
    if model.gene_means is not None:
        # Outside of "primeflow", which is shared with the model: only training needs them.
        checkpoint["gene_means"] = model.gene_means
    for name in ("controls", "marginals"):
        if (part := getattr(model, name)) is not None:
            checkpoint["primeflow"][name] = part.state()


def restore(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Take back what `save` has added to a checkpoint."""
    kept = checkpoint.get("primeflow", {})
    model.learned_detection_limit = kept.get("detection_limit")
    model.gene_means = checkpoint.get("gene_means")
    for name, kind in (("controls", ControlPool), ("marginals", Marginals)):
        if name in kept:
            setattr(model, name, kind.from_state(kept[name]))
