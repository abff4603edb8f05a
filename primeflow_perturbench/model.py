"""PRiMeFlow as a PerturBench model: the glue between the host and flow/, networks/ and cells/."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from primeflow_perturbench.benchmark import load
from primeflow_perturbench.cells.batch_size import BatchSize
from primeflow_perturbench.cells.calibration import calibrated
from primeflow_perturbench.cells.condition import ConditionEncoder
from primeflow_perturbench.cells.decoding import ExpressionSurvey, decode_expression, learn_detection_limit
from primeflow_perturbench.cells.gene_knowledge import tell_genes, wants_cells
from primeflow_perturbench.cells.generation import Block, CellGenerator, gather
from primeflow_perturbench.cells.means import ConditionMeans, ConditionSurvey
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.guidance import check_interval
from primeflow_perturbench.flow.loss import flow_matching_loss
from primeflow_perturbench.flow.path import StraightPath
from primeflow_perturbench.flow.sampling import ODESolver
from primeflow_perturbench.networks.compiling import CompiledEvaluation, evaluate
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
from primeflow_perturbench.training.noise import Noise, batch_noise
from primeflow_perturbench.training.optimiser import build_adam
from primeflow_perturbench.training.schedule import build_schedule

PerturbationModel = load("modelcore.models.PerturbationModel")
Batch = load("data.types.Batch")

TRAIN, VALIDATE = 0, 1


class PRiMeFlow(PerturbationModel):
    """Flow matching from Gaussian noise to log1p expression, conditioned on perturbations and covariates.

    arXiv 2604.13986 (2026). Independent coupling, straight path, mean squared error; sampling by an ODE
    solver with classifier-free guidance, then exact zeros below a detection limit.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Injected by the host, see its `PerturbationModel`. Cell embeddings are not read.
    network
        ``(n_genes, condition_width) -> nn.Module``, a velocity network of ``networks/``.
    precondition
        Whether the network learns only what a Gaussian of each gene does not already say, see
        `networks.preconditioning`.
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
        Whether the cells of a condition are moved to the mean that a linear mixed model of the training conditions
        predicts for it, see `cells.calibration` and `cells.means`. Training learns that model in any case where this
        is set, and cannot do so afterwards.
    calibration_cells
        The first cells of each condition that say how far it is to be moved; they are generated also where fewer are
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

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    COMPATIBLE_DATASETS = ("SingleCellPerturbation", "SingleCellPerturbationWithControls")
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
        precondition: bool = False,
        condition_dropout: float = 0.2,
        guidance: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        solver: ODESolver | None = None,
        detection_limit: float | Literal["learnt", "none"] | None = "learnt",
        calibrate: bool = False,
        calibration_cells: int = 1000,
        cells_per_condition: int | None = None,
        sample_batch_size: int | Literal["auto"] = 256,
        compile: bool = False,
        seed: int | None = 0,
        lr: float | None = None,
        wd: float | None = None,
        lr_scheduler: Mapping[str, Any] | None = None,
    ):
        if not 0 <= condition_dropout < 1:
            raise InputError(f"condition_dropout must be at least 0 and below 1, got {condition_dropout}")
        if guidance < 0:
            raise InputError(f"guidance must be at least 0, got {guidance}")
        if guidance != 1 and condition_dropout == 0:
            raise InputError(f"guidance {guidance} needs a null condition: train with condition_dropout above 0")
        if cells_per_condition is not None and cells_per_condition < 1:
            raise InputError(f"cells_per_condition must be at least 1, got {cells_per_condition}")
        if calibration_cells < 1:
            raise InputError(f"calibration_cells must be at least 1, got {calibration_cells}")
        if isinstance(detection_limit, str) and detection_limit not in ("learnt", "none"):
            raise InputError(f"detection_limit must be 'learnt', 'none' or a number, got {detection_limit!r}")
        if isinstance(detection_limit, float | int) and not detection_limit >= 0:
            raise InputError(f"detection_limit must be at least 0, got {detection_limit}")
        guidance_interval = (0.0, 1.0) if guidance_interval is None else tuple(as_plain(guidance_interval))
        try:
            check_interval(guidance_interval)
        except ValueError as error:
            raise InputError(str(error)) from error
        # A host that instantiates the whole configuration at once hands over vocabularies as configuration.
        context = as_plain(context)
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
        self.encoder = ConditionEncoder(self.n_input_perturbation_features, context.get("covariate_uniques") or {})
        # The first weights are the seed's own, whatever the host has drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            self.network = network(n_genes, self.encoder.width)
        if precondition:
            self.network = GaussianPreconditioning(self.network, n_genes)
        self.path = StraightPath()
        self.solver = solver or ODESolver()
        self.condition_dropout, self.guidance, self.seed = condition_dropout, guidance, seed or 0
        self.guidance_interval = guidance_interval
        self.cells_per_condition, self.sample_batch_size = cells_per_condition, BatchSize(sample_batch_size)
        self._evaluation = CompiledEvaluation() if compile else evaluate
        self.detection_limit = None if detection_limit == "none" else detection_limit
        self.calibrate, self.calibration_cells = calibrate, calibration_cells
        self.learnt_detection_limit: float | None = None
        self.means: ConditionMeans | None = None

    def configure_optimizers(self) -> Any:
        """Adam, with the scheduler of ``lr_scheduler``; one that leaves its length open lasts as long as the run."""
        lr, wd, config = self.optimisation
        optimizer = build_adam(self.parameters(), lr, wd)
        if not config:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(config, optimizer, self.trainer)}

    def on_fit_start(self) -> None:
        """Look at the training cells once: refuse what is not log1p expression, learn what is not trained."""
        if self.trainer.datamodule is None:
            raise InputError("PRiMeFlow learns from the training cells before it trains: fit it with a data module")
        survey, by_condition, cells = self._survey()
        refuse_unusable(survey)
        resumed = self.trainer.ckpt_path is not None and self.learnt_detection_limit is not None
        if not resumed:
            self._learn(survey, by_condition, cells)

    def _survey(self) -> tuple[ExpressionSurvey, ConditionSurvey, Tensor | None]:
        """Look at training cells, together with all other processes; by condition only where that is asked for.

        The cells themselves, the first process's first, are kept where the order of the genes needs them.
        """
        survey, by_condition = ExpressionSurvey(), ConditionSurvey()
        kept: list[Tensor] = []
        for batch in self.trainer.datamodule.train_dataloader():
            survey.add(batch.gene_expression)
            if wants_cells(self.network) and sum(map(len, kept)) < self.KEPT_CELLS:
                kept.append(batch.gene_expression.cpu())
            if self.calibrate:
                by_condition.add(self.encoder(batch.perturbations, batch.covariates), batch.gene_expression)
            if survey.cells * self._world_size >= self.SURVEYED_CELLS:
                break
        cells = torch.cat(kept)[: self.KEPT_CELLS] if kept else None
        if self._world_size == 1:
            return survey, by_condition, cells
        everyone: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(everyone, (survey, by_condition))
        surveys, by_conditions = zip(*everyone, strict=True)
        cells = self.trainer.strategy.broadcast(cells)
        return ExpressionSurvey.of_all(surveys), ConditionSurvey.of_all(by_conditions), cells

    def _learn(self, survey: ExpressionSurvey, by_condition: ConditionSurvey, cells: Tensor | None) -> None:
        """Take from the surveyed training cells what is not trained by gradients."""
        if self.learnt_detection_limit is None:
            # Weights that have been trained, here or in a checkpoint, belong to the order they were trained in.
            annotated = getattr(self.trainer.datamodule, "adata", None)
            tell_genes(self.network, self.gene_names, cells, None if annotated is None else annotated.var)
        self.learnt_detection_limit = learn_detection_limit(survey)
        if self.calibrate:
            self.means = ConditionMeans.fit(self.encoder, by_condition)
        if isinstance(self.network, GaussianPreconditioning):
            self.network.set_statistics(survey.mean, survey.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch, with condition dropout."""
        noise = self._noise(batch.gene_expression, TRAIN, self.current_epoch, batch_idx)
        condition = self.encoder(batch.perturbations, batch.covariates)
        condition = self.encoder.drop(condition, noise.chance < self.condition_dropout)
        loss = self._loss(batch.gene_expression, condition, noise) * self._share(len(condition))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(condition), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch without dropout, with the same noise in every epoch."""
        noise = self._noise(batch.gene_expression, VALIDATE, 0, batch_idx)
        condition = self.encoder(batch.perturbations, batch.covariates)
        loss = self._loss(batch.gene_expression, condition, noise)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(condition), sync_dist=True)
        return loss

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity (B, G) of the network at points (B, G), times (B,) and conditions (B, C)."""
        return self._evaluation(self.network, x, t, condition)

    def _loss(self, x_1: Tensor, condition: Tensor, noise: Noise) -> Tensor:
        return flow_matching_loss(self.velocity, self.path.sample(noise.x_0, x_1, noise.t), condition)

    def _noise(self, x_1: Tensor, *stream: int) -> Noise:
        """Noise of one batch: a restarted run draws what an unbroken one would have drawn."""
        return batch_noise(x_1, [self.seed % 2**32, *stream], self.global_rank, self._world_size)

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def _share(self, cells: int) -> Tensor | float:
        """What makes the mean over devices of mean losses the mean over cells, where a last batch is dealt unevenly."""
        world = self._world_size
        if world == 1:
            return 1.0
        count = torch.tensor(float(cells), device=self.device)
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
            If the limit is to be learnt and is not, or the network gives values that are not finite.
        """
        return gather(condition, self.n_genes, self.stream)

    @torch.no_grad()
    def stream(self, condition: Tensor, counts: Sequence[int]) -> Iterator[Block]:
        """Generated expression block by block, ``counts`` (N,) cells of condition vectors (N, C).

        The cells are those of `generate`; see `CellGenerator.stream` for the blocks, and `generate` for errors.
        """
        limit, generator = self._limit(), self._cell_generator()
        condition = condition.to(self.device)
        if self.calibrate:
            raw = generator.stream(condition, np.maximum(counts, self.calibration_cells))
            blocks = calibrated(raw, counts, self._means()(condition).cpu(), limit, self.calibration_cells)
        else:
            blocks = generator.stream(condition, counts, partial(decode_expression, detection_limit=limit))
        for row, first, cells in blocks:
            refuse_diverged(cells)
            yield row, first, cells

    def _cell_generator(self) -> CellGenerator:
        return CellGenerator(
            self.velocity,
            self.n_genes,
            self.encoder.null,
            self.solver,
            guidance=self.guidance,
            seed=self.seed,
            batch_size=self.sample_batch_size,
            guidance_interval=self.guidance_interval,
        )

    def _limit(self) -> float | None:
        if self.detection_limit != "learnt":
            return self.detection_limit
        if self.learnt_detection_limit is None:
            raise InputError("the detection limit is learnt in training: train first, or set detection_limit=none")
        return self.learnt_detection_limit

    def _means(self) -> ConditionMeans:
        if self.means is None:
            raise InputError("the means of conditions are learnt in training: train first, or set calibrate=false")
        return self.means

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
        cells = self.generate(condition)
        obs = obs.iloc[rows].copy()
        obs.index = [f"cell{index}" for index in range(len(obs))]
        if "_condition_idx" in obs:
            position = obs.groupby("_condition_idx", observed=True).cumcount()
            obs.index = [f"{c}_{i}" for c, i in zip(obs["_condition_idx"], position, strict=True)]
        names = self.gene_names or batch.gene_names
        return ad.AnnData(cells.numpy(), obs=obs, var=pd.DataFrame(index=pd.Index(names, dtype=str)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the detection limit beside what the host keeps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["primeflow"] = {"detection_limit": self.learnt_detection_limit}
        if self.means is not None:
            checkpoint["primeflow"]["means"] = self.means.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the detection limit back."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("primeflow", {})
        self.learnt_detection_limit = kept.get("detection_limit")
        if "means" in kept:
            self.means = ConditionMeans.from_state(kept["means"])


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


def refuse_diverged(cells: Tensor) -> None:
    """Raise `InputError` if generated cells hold values that are not finite."""
    if not torch.isfinite(cells).all():
        raise InputError("generated cells hold NaN or infinite values: training diverged; lower lr and train again")


def as_plain(value: Any) -> Any:
    """Configuration nodes as dictionaries and lists, anything else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
