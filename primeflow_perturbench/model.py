"""PRiMeFlow as a PerturBench model: the glue between the host and flow/, networks/ and cells/."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from primeflow_perturbench.calibration.mapping import calibrated
from primeflow_perturbench.calibration.marginals import ConditionMarginals, MarginalSurvey
from primeflow_perturbench.conditions.condition import ConditionEncoder, CovariateSurvey
from primeflow_perturbench.conditions.embedding_tables import ExternalRows, seen_in_training, with_tables
from primeflow_perturbench.conditions.table import Conditions
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.expression.control_pool import ControlPool, ControlSurvey
from primeflow_perturbench.expression.detection_limit import ExpressionSurvey, decode_expression, learn_detection_limit
from primeflow_perturbench.expression.gene_metadata import tell_genes, wants_cells
from primeflow_perturbench.expression.space import GeneSpace, PCASpace, refuse_gene_settings
from primeflow_perturbench.expression.unmeasured import fill_unmeasured, refuse_unmeasured
from primeflow_perturbench.finetuning.weight_transfer import take_over
from primeflow_perturbench.flow.coupling import independent_coupling, optimal_transport_coupling
from primeflow_perturbench.flow.guidance import check_interval
from primeflow_perturbench.flow.loss import flow_matching_loss
from primeflow_perturbench.flow.path import PathSample, StraightPath, logit_normal_time, uniform_time
from primeflow_perturbench.flow.solver import ODESolver
from primeflow_perturbench.networks.compiling import CompiledEvaluation, evaluate
from primeflow_perturbench.networks.condition_embedding import External, MultiHot
from primeflow_perturbench.networks.layers import TimeConditionEmbedding
from primeflow_perturbench.networks.preconditioning import WEIGHTS, GaussianPreconditioning
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.pretrained.folder import load_model, save_model
from primeflow_perturbench.pretrained.sample import sample_conditions
from primeflow_perturbench.sampling.batch_size import BatchSize
from primeflow_perturbench.sampling.sampler import Block, CellGenerator, gather
from primeflow_perturbench.training.noise import Noise, batch_noise
from primeflow_perturbench.training.optimizer import build_adam
from primeflow_perturbench.training.parameter_groups import adam_groups, checked_finetuning, freeze
from primeflow_perturbench.training.schedule import build_schedule

log = logging.getLogger(__name__)

PerturbationModel = load("modelcore.models.PerturbationModel")
Batch = load("data.types.Batch")

TRAIN, VALIDATE = 0, 1
COUPLINGS = {"independent": independent_coupling, "ot": optimal_transport_coupling}
TIME_SAMPLINGS = {"uniform": uniform_time, "logit_normal": logit_normal_time}
SOURCES = ("gaussian", "control")


def check_settings(
    *,
    condition_dropout: float,
    guidance: float,
    source: str,
    source_noise: float,
    source_cells: int,
    coupling: str,
    time_sampling: str,
    precondition: bool,
    loss_weighting: str,
    detection_limit: float | str | None,
    calibrate: str,
    calibration_cells: int,
    cells_per_condition: int | None,
) -> None:
    """Raise `InputError` for a setting of `PRiMeFlow` that is out of range, or that another one rules out."""
    if not 0 <= condition_dropout < 1:
        raise InputError(f"condition_dropout must be at least 0 and below 1, got {condition_dropout}")
    if guidance < 0:
        raise InputError(f"guidance must be at least 0, got {guidance}")
    if guidance != 1 and condition_dropout == 0:
        raise InputError(f"guidance {guidance} needs a null condition: train with condition_dropout above 0")
    for name, value, known in (
        ("source", source, SOURCES),
        ("coupling", coupling, COUPLINGS),
        ("time_sampling", time_sampling, TIME_SAMPLINGS),
        ("loss_weighting", loss_weighting, WEIGHTS),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not source_noise >= 0:
        raise InputError(f"source_noise must be at least 0, got {source_noise}")
    if source_cells < 1:
        raise InputError(f"source_cells must be at least 1, got {source_cells}")
    if source == "control" and precondition:
        raise InputError("precondition supposes a Gaussian source: set precondition=false, or source=gaussian")
    if loss_weighting != "none" and not precondition:
        raise InputError(f"loss_weighting={loss_weighting} needs the variances of genes: set precondition=true")
    if cells_per_condition is not None and cells_per_condition < 1:
        raise InputError(f"cells_per_condition must be at least 1, got {cells_per_condition}")
    if calibrate not in ("none", "mean", "marginals"):
        raise InputError(f"calibrate must be 'none', 'mean' or 'marginals', got {calibrate!r}")
    if calibration_cells < 1:
        raise InputError(f"calibration_cells must be at least 1, got {calibration_cells}")
    if isinstance(detection_limit, str) and detection_limit not in ("learnt", "none"):
        raise InputError(f"detection_limit must be 'learnt', 'none' or a number, got {detection_limit!r}")
    if isinstance(detection_limit, float | int) and not detection_limit >= 0:
        raise InputError(f"detection_limit must be at least 0, got {detection_limit}")


class PRiMeFlow(PerturbationModel):
    """Flow matching from Gaussian noise to log1p expression, conditioned on perturbations and covariates.

    arXiv 2604.13986 (2026). Independent coupling, straight path, mean squared error; sampling by an ODE
    solver with classifier-free guidance, then exact zeros below a detection limit.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Injected by the host, see its `PerturbationModel`. Cell embeddings are not read.
    network
        ``(n_genes, condition_width) -> nn.Module``, a velocity network of ``networks/``; the coordinates of the space
        are its genes.
    conditions
        ``(n_perturbations, covariates) -> nn.Module``, what the network reads of a condition vector, see
        `networks.condition_embedding`.
    space
        ``(n_genes) -> nn.Module``, the space that the flow works in, see `expression.space`.
    source
        Where paths begin: ``"gaussian"`` is standard normal noise, ``"control"`` a control training cell of the same
        covariates with some noise, see `expression.control_pool`.
    source_noise
        Standard deviation of the normal noise on a control cell, in units of the space.
    source_cells
        Most control cells that are kept of each combination of covariates.
    coupling
        ``"independent"``, or ``"ot"``: the sources of a batch, or of a device's share of it, go to its cells by optimal
        transport, those of control cells among cells of the same covariates; see `flow.coupling`.
    time_sampling
        Distribution of the times that are trained on: ``"uniform"`` or ``"logit_normal"``, see `flow.path`.
    precondition
        Whether the network learns only what a Gaussian of each gene does not already say, see
        `networks.preconditioning`; only from a Gaussian source.
    loss_weighting
        What the squared errors of the velocity count in training: ``"none"`` all alike, ``"times"`` and
        ``"times_and_genes"`` see `networks.preconditioning.WEIGHTS`, both with ``precondition`` alone. The validation
        loss has no weights.
    condition_dropout
        Share of training cells that see the null condition.
    guidance
        Strength w of classifier-free guidance at sampling; 1 is none.
    guidance_interval
        Times ``[lo, hi]`` of guidance, see `flow.guidance.guide_within`; ``None`` is [0, 1].
    solver
        How to integrate.
    detection_limit
        ``"learnt"`` from the training cells, a number in log1p units, or ``None`` (or ``"none"``) to keep
        all positive values.
    calibrate
        ``"mean"``: the cells of a condition are moved to the mean that a linear mixed model of the training conditions
        predicts for it; ``"marginals"``: to its share of cells that express each gene as well, and to no more than
        its spread of their values; ``"none"``: they stay, see `calibration.mapping` and `calibration.marginals`.
        Training
        learns the model where this is not "none", and cannot do so afterwards.
    calibration_cells
        The first cells of each condition that say how it is to be moved; they are generated also where fewer are
        asked for.
    cells_per_condition
        Cells to generate for each condition; ``None`` generates one a row of the host's table.
    sample_batch_size
        Most cells on the device at once while sampling; ``"auto"`` chooses by free memory.
    compile
        Whether the network is compiled, for training and sampling.
    seed
        Seed of training noise and of sampling; ``None`` is 0.
    lr, wd, lr_scheduler
        Learning rate (``None``: 1e-3) and weight decay (``None``: 1e-5) of Adam, and the host's configuration of a
        scheduler, ``{conf, dependencies, extras}``.
    finetuning
        ``{freeze, lr_factor}``: which of the groups ``genes``, ``conditions`` and ``trunk`` stay as they are, and the
        learning rate of each as a share of ``lr``; ``None`` trains all parameters alike. See
        `training.parameter_groups`.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    COMPATIBLE_DATASETS = ("SingleCellPerturbation", "SingleCellPerturbationWithControls", "AtlasPerturbation")
    SURVEYED_CELLS = 100_000
    # Enough for the order of the genes.
    KEPT_CELLS = 2048

    def __init__(
        self,
        n_genes: int,
        n_perts: int,
        transform: Any,
        context: Mapping[str, Any],
        evaluation: Mapping[str, Any] | None,
        network: Callable[[int, int], nn.Module],
        embedding_width: int | None = None,
        perturbation_embedding_width: int | None = None,
        gene_names: Sequence[str] | None = None,
        conditions: Callable[[int, Mapping[str, Any]], nn.Module] = MultiHot,
        space: Callable[[int], nn.Module] = GeneSpace,
        source: Literal["gaussian", "control"] = "gaussian",
        source_noise: float = 0.1,
        source_cells: int = 500,
        coupling: Literal["independent", "ot"] = "independent",
        time_sampling: Literal["uniform", "logit_normal"] = "uniform",
        precondition: bool = False,
        loss_weighting: Literal["none", "times", "times_and_genes"] = "none",
        condition_dropout: float = 0.2,
        guidance: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        solver: ODESolver | None = None,
        detection_limit: float | Literal["learnt", "none"] | None = "learnt",
        calibrate: Literal["none", "mean", "marginals"] = "none",
        calibration_cells: int = 1000,
        cells_per_condition: int | None = None,
        sample_batch_size: int | Literal["auto"] = 256,
        compile: bool = False,
        seed: int | None = 0,
        lr: float | None = None,
        wd: float | None = None,
        lr_scheduler: Mapping[str, Any] | None = None,
        finetuning: Mapping[str, Any] | None = None,
    ):
        check_settings(
            condition_dropout=condition_dropout,
            guidance=guidance,
            source=source,
            source_noise=source_noise,
            source_cells=source_cells,
            coupling=coupling,
            time_sampling=time_sampling,
            precondition=precondition,
            loss_weighting=loss_weighting,
            detection_limit=detection_limit,
            calibrate=calibrate,
            calibration_cells=calibration_cells,
            cells_per_condition=cells_per_condition,
        )
        guidance_interval = (0.0, 1.0) if guidance_interval is None else tuple(as_plain(guidance_interval))
        try:
            check_interval(guidance_interval)
        except ValueError as error:
            raise InputError(str(error)) from error
        # A host that instantiates the whole configuration at once hands over vocabularies as configuration.
        context = as_plain(context)
        # Saved without its files, so that a checkpoint needs none.
        conditions, rows = with_tables(conditions, context["perturbation_uniques"])
        super().__init__(
            n_genes=n_genes,
            n_perts=n_perts,
            transform=transform,
            context=context,
            evaluation=evaluation,
            embedding_width=embedding_width,
            perturbation_embedding_width=perturbation_embedding_width,
            lr=lr,
            wd=wd,
            lr_scheduler=lr_scheduler,
        )
        self.save_hyperparameters(logger=False)
        self.optimisation = (1e-3 if lr is None else lr, 1e-5 if wd is None else wd, as_plain(lr_scheduler))
        self.gene_names = None if gene_names is None else list(gene_names)
        self.covariates = context.get("covariate_uniques") or {}
        self.space = space(n_genes)
        # The first weights are the seed's own, whatever the host has drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            self.conditions = conditions(self.n_input_perturbation_features, self.covariates)
            self.network = network(self.space.width, self.conditions.width)
            if type(self.conditions) is MultiHot and perturbation_embedding_width is None:
                for module in self.network.modules():
                    if isinstance(module, TimeConditionEmbedding):
                        module.expect_multi_hot()
        if perturbation_embedding_width is not None and type(self.conditions) is not MultiHot:
            raise InputError(
                "perturbation_embeddings_path of the data puts embeddings in the place of perturbations; leave it out "
                "and give the file as model.conditions.embeddings, or set model/conditions=multi_hot"
            )
        if rows is not None:
            self.conditions.set_rows(rows)
        known = self.conditions if isinstance(self.conditions, External) else None
        self.encoder = ConditionEncoder(self.n_input_perturbation_features, self.covariates, known)
        self._not_calibrated: set[str] = set()
        if isinstance(self.space, PCASpace):
            refuse_gene_settings(self.network)
        if precondition:
            self.network = GaussianPreconditioning(self.network, self.space.width)
        self.path, self.coupling, self.time_sampling = StraightPath(), coupling, time_sampling
        self.loss_weighting = loss_weighting
        self.source, self.source_noise, self.source_cells = source, source_noise, source_cells
        self.controls: ControlPool | None = None
        self.solver = solver or ODESolver()
        self.condition_dropout, self.guidance, self.seed = condition_dropout, guidance, seed or 0
        self.guidance_interval = guidance_interval
        self.cells_per_condition, self.sample_batch_size = cells_per_condition, BatchSize(sample_batch_size)
        self._evaluation = CompiledEvaluation() if compile else evaluate
        self.detection_limit = None if detection_limit == "none" else detection_limit
        self.calibrate, self.calibration_cells = calibrate, calibration_cells
        self.learnt_detection_limit: float | None = None
        self.gene_means: Tensor | None = None
        self.marginals: ConditionMarginals | None = None
        self.learning_shares = checked_finetuning(as_plain(finetuning))
        freeze(self, self.learning_shares)
        self.taken_over: dict[str, Any] | None = None

    def take_over(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Begin with the weights of a checkpoint of other cells, matched by name, see `finetuning.weight_transfer`.

        What is learnt without gradients is learnt anew from the cells that the model is fitted to.
        """
        self.taken_over = take_over(self, checkpoint)
        return self.taken_over

    def configure_optimizers(self) -> Any:
        """Adam, with the scheduler of ``lr_scheduler``; one that leaves its length open lasts as long as the run."""
        lr, wd, config = self.optimisation
        optimizer = build_adam(adam_groups(self, self.learning_shares, lr), lr, wd)
        if not config:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(config, optimizer, self.trainer)}

    def on_fit_start(self) -> None:
        """Look at the training cells once: refuse what is not log1p expression, learn what is not trained."""
        if self.trainer.datamodule is None:
            raise InputError("PRiMeFlow learns from the training cells before it trains: fit it with a data module")
        if self._unmeasured_are_nan:
            space = "pca" if isinstance(self.space, PCASpace) else "genes"
            refuse_unmeasured(self.source, self.coupling, self.calibrate, space)
        if self.coupling == "ot":
            refuse_without_pot()
        survey, by_condition, cells, controls, covariates = self._survey()
        refuse_unusable(survey)
        resumed = self.trainer.ckpt_path is not None and self.learnt_detection_limit is not None
        if not resumed:
            self._learn(survey, by_condition, cells, controls, covariates)

    def _survey(self) -> tuple[ExpressionSurvey, MarginalSurvey, Tensor | None, ControlSurvey, CovariateSurvey]:
        """Look at training cells, together with all other processes; by condition only where that is asked for.

        The cells themselves, the first process's first, are kept where the order of the genes or the space needs them;
        controls where paths begin at them, and then more cells are looked at if need be.
        """
        survey, by_condition = ExpressionSurvey(unmeasured_are_nan=self._unmeasured_are_nan), MarginalSurvey()
        plain, covariates = self.encoder.plain, CovariateSurvey()
        controls = ControlSurvey(plain.perturbation_width, self.source_cells)
        most = max(self.KEPT_CELLS if wants_cells(self.network) else 0, self.space.fit_cells)
        kept: list[Tensor] = []
        for batch in self.trainer.datamodule.train_dataloader():
            survey.add(batch.gene_expression)
            if sum(map(len, kept)) < most:
                kept.append(batch.gene_expression.cpu())
            condition = plain(batch.perturbations, batch.covariates)
            covariates.add(condition[:, plain.perturbation_width : -1])
            if self.calibrate != "none":
                by_condition.add(condition, batch.gene_expression)
            if self.source == "control":
                controls.add(condition, batch.gene_expression)
            if survey.cells * self._world_size >= self.SURVEYED_CELLS and controls.complete:
                break
        cells = torch.cat(kept)[:most] if kept else None
        if self._world_size == 1:
            return survey, by_condition, cells, controls, covariates
        everyone: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(everyone, (survey, by_condition, controls, covariates))
        surveys, by_conditions, of_controls, of_covariates = zip(*everyone, strict=True)
        cells = self.trainer.strategy.broadcast(cells)
        whole = ExpressionSurvey.of_all(surveys), MarginalSurvey.of_all(by_conditions)
        return *whole, cells, ControlSurvey.of_all(of_controls), CovariateSurvey.of_all(of_covariates)

    def _learn(
        self,
        survey: ExpressionSurvey,
        by_condition: MarginalSurvey,
        cells: Tensor | None,
        controls: ControlSurvey,
        covariates: CovariateSurvey,
    ) -> None:
        """Take from the surveyed training cells what is not trained by gradients."""
        if self._unmeasured_are_nan:
            self.gene_means = survey.mean.float()
        if self.learnt_detection_limit is None:
            # Weights that have been trained, here or in a checkpoint, belong to what they were trained in.
            annotated = getattr(self.trainer.datamodule, "adata", None)
            first = None if cells is None else self._without_gaps(cells[: self.KEPT_CELLS])[0]
            if self.taken_over is None:
                tell_genes(self.network, self.gene_names, first, None if annotated is None else annotated.var)
                self.space.fit(survey, cells)
                self.conditions.covariates.set_statistics(*covariates.statistics())
            if isinstance(self.conditions, External):
                names = self.training_record["train_context"]["perturbation_uniques"]
                self.conditions.set_seen(seen_in_training(self.trainer.datamodule, names))
        self.learnt_detection_limit = learn_detection_limit(survey)
        if self.calibrate != "none":
            self.marginals = ConditionMarginals.fit(self.encoder.plain, by_condition)
        if isinstance(self.network, GaussianPreconditioning):
            self.network.set_statistics(*self.space.statistics(survey, cells))
        if self.source == "control":
            self.controls = ControlPool.of(controls, lambda x: self.space.encode(x.to(self.device)), self.covariates)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch, with condition dropout."""
        condition = self.encoder(batch.perturbations, batch.covariates)
        expression, measured = self._without_gaps(batch.gene_expression)
        sample, noise = self._sample(expression, condition, TRAIN, self.current_epoch, batch_idx)
        condition = self._dropped(condition, noise.chance)
        counted = len(condition) if measured is None else measured.sum()
        weighted = self.loss_weighting != "none"
        weight = self.network.loss_weight(sample.t, self.loss_weighting) if weighted else None
        loss = flow_matching_loss(self.velocity, sample, condition, measured, weight) * self._share(counted)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(condition), sync_dist=True)
        return loss

    def _dropped(self, condition: Tensor, chance: Tensor) -> Tensor:
        """Condition vectors (B, C) with some of them null, and some of the others without their identity.

        Parameters
        ----------
        condition
            Condition vectors.
        chance
            Uniform on [0, 1), shape (B,).
        """
        alone = self.condition_dropout + self.conditions.identity_dropout * (1 - self.condition_dropout)
        if self.conditions.identity_dropout:
            condition = self.encoder.drop_identity(condition, chance < alone)
        return self.encoder.drop(condition, chance < self.condition_dropout)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch without dropout, with the same noise in every epoch."""
        condition = self.encoder(batch.perturbations, batch.covariates)
        expression, measured = self._without_gaps(batch.gene_expression)
        sample, _ = self._sample(expression, condition, VALIDATE, 0, batch_idx)
        counted = len(condition) if measured is None else int(measured.sum())
        loss = flow_matching_loss(self.velocity, sample, condition, measured)
        self.log("val_loss", loss, prog_bar=True, batch_size=counted, sync_dist=True)
        return loss

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) of the network at points (B, G), times (B,) and conditions (B, C)."""
        return self._evaluation(self.network, x, t, self.conditions(condition))

    def _sample(self, expression: Tensor, condition: Tensor, *stream: int) -> tuple[PathSample, Noise]:
        """Points on paths to cells (B, G), and all that is random about the batch."""
        x_1 = self.space.encode(expression)
        noise = self._noise(x_1, *stream)
        x_0, groups = noise.x_0, None
        if self.source == "control":
            self.controls = self._control_pool().to(x_1.device)
            groups = self.controls.context_rows(condition)
            x_0 = self.controls.draw(groups, noise.pick).to(x_1) + self.source_noise * noise.x_0
        x_0 = x_0[COUPLINGS[self.coupling](x_0, x_1, groups)]
        return self.path.sample(x_0, x_1, noise.t), noise

    def _noise(self, x_1: Tensor, *stream: int) -> Noise:
        """Noise of one batch: a restarted run draws what an unbroken one would have drawn."""
        time = TIME_SAMPLINGS[self.time_sampling]
        return batch_noise(x_1, [self.seed % 2**32, *stream], self.global_rank, self._world_size, time)

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    @property
    def _unmeasured_are_nan(self) -> bool:
        """Whether NaN in a batch of the data module says that a gene was not measured."""
        return self._trainer is not None and getattr(self.trainer.datamodule, "unmeasured_are_nan", False)

    def _without_gaps(self, expression: Tensor) -> tuple[Tensor, Tensor | None]:
        """Expression (B, G) with means of genes in place of gaps, and what was measured; ``None`` says everything."""
        return fill_unmeasured(expression, self.gene_means) if self._unmeasured_are_nan else (expression, None)

    def _share(self, counted: int | Tensor) -> Tensor | float:
        """What makes the mean over devices of mean losses the mean over cells, or over measured values.

        Parameters
        ----------
        counted
            Cells or values of this device: a last batch is dealt unevenly, and data sets measure different genes.
        """
        world = self._world_size
        if world == 1:
            return 1.0
        count = torch.tensor(float(counted), device=self.device)
        return count / self.trainer.strategy.reduce(count.clone(), reduce_op="mean")

    def predict(self, batch: Batch) -> Tensor:
        """Generated expression (cells, G) on the CPU, a cell for each row of the batch."""
        condition = self.encoder(batch.perturbations, batch.covariates).to(self.device)
        return self.generate(condition)

    @torch.no_grad()
    def generate(self, condition: Tensor) -> Tensor:
        """Generated expression (N, G) on the CPU for condition vectors (N, C).

        Raises
        ------
        InputError
            If the limit is to be learnt and is not, cells are to start at controls of covariates that have none, or the
            network gives values that are not finite.
        """
        return gather(condition, self.n_genes, self.stream)

    @torch.no_grad()
    def stream(self, condition: Tensor, counts: Sequence[int], seed: int | None = None) -> Iterator[Block]:
        """Generated expression block by block, ``counts`` (N,) cells of condition vectors (N, C).

        The cells are those of `generate`, or of another seed where one is given; see `CellGenerator.stream` for the
        blocks, and `generate` for errors.
        """
        limit, generator = self._limit(), self._cell_generator(seed)
        condition = condition.to(self.device)
        if self.source == "control":
            self._control_pool().to(self.device).context_rows(condition)
        if self.calibrate != "none":
            unseen, plain = self.encoder.unseen(condition).cpu(), self.encoder.without_external(condition)
            made = np.where(unseen, counts, np.maximum(counts, self.calibration_cells))
            raw = generator.stream(condition, made, self.space.decode)
            marginals = self._marginals()
            means, rates = marginals(plain, limit or 0.0)
            whole = self.calibrate == "marginals" and limit is not None
            asked = (rates, marginals.spreads(plain, means, rates)) if whole else (None, None)
            rates, spreads = (None if part is None else part.cpu() for part in asked)
            first = self.calibration_cells
            blocks = calibrated(raw, counts, means.cpu(), rates, limit, first, unseen.tolist(), spreads)
        else:
            blocks = generator.stream(condition, counts, lambda z: decode_expression(self.space.decode(z), limit))
        for row, first, cells in blocks:
            refuse_diverged(cells)
            yield row, first, cells

    def _cell_generator(self, seed: int | None = None) -> CellGenerator:
        return CellGenerator(
            self.velocity,
            self.space.width,
            self.encoder.null,
            self.solver,
            guidance=self.guidance,
            seed=self.seed if seed is None else seed,
            batch_size=self.sample_batch_size,
            guidance_interval=self.guidance_interval,
            source=None if self.source == "gaussian" else self._start_at_controls,
        )

    def _start_at_controls(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Controls (n, W) with noise, of the covariates of a condition vector (C,)."""
        pool = self._control_pool().to(torch.device("cpu"))
        pick, noise = torch.rand(n, generator=generator), torch.randn(n, self.space.width, generator=generator)
        return pool.draw(pool.context_rows(condition[None]).expand(n), pick) + self.source_noise * noise

    def _control_pool(self) -> ControlPool:
        if self.controls is None:
            raise InputError("source=control begins at control cells that are kept in training: train first")
        return self.controls

    def _limit(self) -> float | None:
        if self.detection_limit != "learnt":
            return self.detection_limit
        if self.learnt_detection_limit is None:
            raise InputError("the detection limit is learnt in training: train first, or set detection_limit=none")
        return self.learnt_detection_limit

    def _marginals(self) -> ConditionMarginals:
        if self.marginals is None:
            raise InputError("the means of conditions are learnt in training: train first, or set calibrate=none")
        return self.marginals

    def predict_anndata(self, data_tuple: tuple[Batch, pd.DataFrame]) -> ad.AnnData:
        """Generated cells of a batch, ``cells_per_condition`` of each condition where that is set."""
        batch, obs = data_tuple
        rows = np.arange(len(obs))
        if self.cells_per_condition is not None:
            columns = [*(self.training_record["train_context"]["covariate_keys"] or ())]
            columns += [self.training_record["train_context"]["perturbation_key"]]
            first = np.flatnonzero(~obs[columns].duplicated().to_numpy())
            rows = np.repeat(first, self.cells_per_condition)
        condition = self.encoder(batch.perturbations, batch.covariates)[rows].to(self.device)
        self.tell_not_calibrated(condition, obs[self.training_record["train_context"]["perturbation_key"]].iloc[rows])
        cells = self.generate(condition)
        obs = obs.iloc[rows].copy()
        obs.index = [f"cell{index}" for index in range(len(obs))]
        if "_condition_idx" in obs:
            position = obs.groupby("_condition_idx", observed=True).cumcount()
            obs.index = [f"{c}_{i}" for c, i in zip(obs["_condition_idx"], position, strict=True)]
        names = self.gene_names or batch.gene_names
        return ad.AnnData(cells.numpy(), obs=obs, var=pd.DataFrame(index=pd.Index(names, dtype=str)))

    def external_rows(
        self, perturbation_embeddings: pd.DataFrame | str | Path | Sequence[pd.DataFrame | str | Path] | None
    ) -> ExternalRows | None:
        """External embeddings by name, with those of tables beside the model's own; ``None`` where it reads none."""
        if not isinstance(self.conditions, External):
            return None
        return ExternalRows(self.conditions, self.training_record["train_context"], perturbation_embeddings)

    def encode(self, conditions: Conditions) -> Tensor:
        """Condition vectors (N, C) of a checked table; says once which of them `calibrate` does not reach."""
        condition = self.encoder(conditions.perturbations, conditions.covariates, conditions.external)
        self.tell_not_calibrated(condition, conditions.obs[self.training_record["train_context"]["perturbation_key"]])
        return condition

    def tell_not_calibrated(self, condition: Tensor, labels: Sequence[str]) -> None:
        """Warn once of condition vectors (N, C), by their labels (N,), of whose means training says nothing."""
        if self.calibrate == "none":
            return
        unseen = self.encoder.unseen(condition).tolist()
        new = {str(label) for label, alone in zip(labels, unseen, strict=True) if alone} - self._not_calibrated
        if new:
            self._not_calibrated |= new
            log.warning(
                "%d labels have perturbations that training lacks, so that their cells are generated without "
                "calibration: %s",
                len(new),
                quoted(sorted(new)),
            )

    def sample(
        self,
        conditions: pd.DataFrame | Sequence[Mapping[str, Any]],
        n: int = 100,
        seed: int | None = None,
        perturbation_embeddings: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
    ) -> ad.AnnData:
        """Generated cells of conditions that need not have been measured.

        Parameters
        ----------
        conditions
            A mapping or a row each, with the perturbation and all covariates by the names of their columns in training;
            the perturbation may also be called ``perturbation``. Parts of a combination are joined as in training.
        n
            Cells of each condition, where it has no ``n_cells`` of its own.
        seed
            Seed of these cells; ``None`` is the model's.
        perturbation_embeddings
            A row a perturbation, for a model that was trained with embeddings; several tables where training had
            several. An encoder with external embeddings needs them for perturbations that training lacks alone.

        Returns
        -------
        Sparse log1p expression, with conditions in ``obs`` and genes in ``var_names``.

        Raises
        ------
        InputError
            If a condition is incomplete, or has a label that was not seen in training and has no embedding.
        """
        return sample_conditions(self, conditions, n, seed, perturbation_embeddings)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        license: str | None = None,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model as a folder to share: ``model.safetensors``, ``config.json`` and a ``README.md``.

        The folder has its name once it is whole.

        Parameters
        ----------
        folder
            Where to; there must be none, unless ``overwrite`` allows that another model's is replaced.
        overwrite
            Whether a folder of a shared model may be replaced.
        license
            Identifier of the licence, such as ``bsd-3-clause``.
        data
            Name, hash and the like of the training data.
        metrics
            Numbers by name that tell how good the model is.

        Raises
        ------
        InputError
            If the folder may not be replaced, or a setting is no plain value and no class of this package.
        """
        save_model(self, folder, overwrite, license, data, metrics)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "PRiMeFlow":
        """A model that `save_pretrained` wrote, in evaluation mode; nothing that it holds can run code.

        Parameters
        ----------
        name
            Folder, or ``owner/name`` of a model on the Hugging Face hub.
        revision
            Branch, tag or commit on the hub; ``None`` is the main branch.

        Raises
        ------
        InputError
            If there is no such model, or its files are damaged or not what `save_pretrained` writes.
        """
        return load_model(cls, name, revision)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is learnt without gradients beside what the host keeps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["primeflow"] = {"detection_limit": self.learnt_detection_limit}
        if self.gene_means is not None:
            # Apart from the rest, since only training reads them.
            checkpoint["gene_means"] = self.gene_means
        if self.controls is not None:
            checkpoint["primeflow"]["controls"] = self.controls.state()
        if self.marginals is not None:
            checkpoint["primeflow"]["marginals"] = self.marginals.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what is learnt without gradients back."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("primeflow", {})
        self.learnt_detection_limit = kept.get("detection_limit")
        self.gene_means = checkpoint.get("gene_means")
        if "controls" in kept:
            self.controls = ControlPool.from_state(kept["controls"])
        if "marginals" in kept:
            self.marginals = ConditionMarginals.from_state(kept["marginals"])


def refuse_unusable(survey: ExpressionSurvey) -> None:
    """Raise `InputError` if the surveyed cells are not log1p expression."""
    if survey.not_finite:
        raise InputError(f"the training cells hold {survey.not_finite} values that are NaN or infinite; remove them")
    if survey.negative:
        raise InputError(
            f"the training cells hold {survey.negative} negative values, but log1p expression is never negative; "
            "give unscaled values"
        )
    if survey.looks_like_counts:
        raise InputError(
            f"the training cells hold whole numbers up to {survey.largest:.0f}, which look like raw counts, but "
            "PRiMeFlow models log1p expression; run sc.pp.normalize_total and sc.pp.log1p first"
        )


def refuse_without_pot() -> None:
    """Raise `InputError` if the library of optimal transport is not installed."""
    if find_spec("ot") is None:
        raise InputError("coupling=ot needs the library POT: pip install 'primeflow-perturbench[ot]'")


def refuse_diverged(cells: Tensor) -> None:
    """Raise `InputError` if generated cells hold values that are not finite."""
    if not torch.isfinite(cells).all():
        raise InputError("generated cells hold NaN or infinite values: training diverged; lower lr and train again")


def as_plain(value: Any) -> Any:
    """Configuration nodes as dictionaries and lists, anything else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
