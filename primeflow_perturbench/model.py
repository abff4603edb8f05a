"""PRiMeFlow as a PerturBench model: hooks and steps. The method itself lives in the packages imported here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import torch
from torch import Tensor, nn

from primeflow_perturbench.calibration import training_cells
from primeflow_perturbench.calibration.marginals import Marginals
from primeflow_perturbench.conditions.condition import Condition, ConditionEncoder
from primeflow_perturbench.conditions.embedding_tables import with_tables
from primeflow_perturbench.conditions.table import Conditions
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.expression.control_pool import ControlPool
from primeflow_perturbench.expression.space import GeneSpace, PCASpace, check_gene_settings
from primeflow_perturbench.expression.unmeasured import fill_unmeasured
from primeflow_perturbench.finetuning.weight_transfer import take_over
from primeflow_perturbench.flow.coupling import COUPLINGS
from primeflow_perturbench.flow.loss import check_loss, flow_matching_loss
from primeflow_perturbench.flow.noise import Noise, batch_noise
from primeflow_perturbench.flow.objective import Objective
from primeflow_perturbench.flow.path import PathSample, StraightPath
from primeflow_perturbench.networks.compiling import compiled_evaluation, evaluate
from primeflow_perturbench.networks.condition_embedding import MultiHot
from primeflow_perturbench.networks.layers import expect_multi_hot
from primeflow_perturbench.networks.preconditioning import GaussianPreconditioning
from primeflow_perturbench.perturbench.backend import load
from primeflow_perturbench.pretrained.load import load_model
from primeflow_perturbench.pretrained.save import save_model
from primeflow_perturbench.pretrained.settings import as_plain, built, store_settings, with_transform
from primeflow_perturbench.sampling import choice
from primeflow_perturbench.sampling.batch_size import BatchSize
from primeflow_perturbench.sampling.command_line import of_command_line
from primeflow_perturbench.sampling.generate import control_pool, generate_table, stream_cells, warn_uncalibrated
from primeflow_perturbench.sampling.sample import sample_conditions
from primeflow_perturbench.sampling.sampler import Block, gather
from primeflow_perturbench.sampling.settings import SamplingSettings

PerturbationModel = load("modelcore.models.PerturbationModel")
Batch = load("data.types.Batch")

TRAIN, VALIDATE = 0, 1  # streams of random numbers


class PRiMeFlow(PerturbationModel):
    """Flow matching from Gaussian noise to log1p expression, conditioned on perturbations and covariates.

    arXiv 2604.13986 (2026): independent coupling, straight path, mean squared error, ODE solver, guidance.

    Parameters
    ----------
    n_genes, n_perts, transform, context, evaluation, embedding_width, perturbation_embedding_width, gene_names
        Passed by PerturBench, see its `PerturbationModel`. Cell embeddings are not used.
    network
        ``(n_coordinates, condition_width) -> nn.Module``, a velocity network of `networks`.
    conditions
        ``(n_perturbations, covariates) -> nn.Module``, see `networks.condition_embedding`.
    space
        ``(n_genes) -> nn.Module``, the space of the flow, see `expression.space`.
    objective, sampler
        Settings of training and of sampling; ``None`` is the default `Objective` or `SamplingSettings`.
    optimizer, lr, wd, lr_scheduler
        `training.optimizer.GroupedAdam` or ``None`` for PerturBench's Adam, learning rate, weight decay, and
        PerturBench's configuration of a scheduler, ``{conf, dependencies, extras}``.
    seed
        Seed of the initial weights, of training noise and of sampling; ``None`` is 0.

    Raises
    ------
    InputError
        If settings contradict each other.
    """

    COMPATIBLE_DATASETS = ("SingleCellPerturbation", "SingleCellPerturbationWithControls", "AtlasPerturbation")
    STATISTICS_CELLS = 100_000  # enough for the statistics of genes

    # Long because of its signature and the call of PerturBench's constructor.
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
        objective: Objective | None = None,
        sampler: SamplingSettings | None = None,
        optimizer: Any = None,
        lr: float = 2e-4,
        wd: float = 0.0,
        lr_scheduler: Mapping[str, Any] | None = None,
        seed: int | None = 0,
    ):
        # A checkpoint stores objects as plain values.
        network, conditions, space, objective, sampler = map(built, (network, conditions, space, objective, sampler))
        objective, (sampler, seed) = objective or Objective(), of_command_line(sampler or SamplingSettings(), seed)
        if objective.source == "control" and sampler.control_start not in (None, "auto"):
            raise InputError("control_start encodes control cells for a Gaussian source: set source=gaussian")
        if sampler.guidance != 1 and objective.condition_dropout == 0:
            raise InputError(f"guidance {sampler.guidance} needs a null condition: set condition_dropout above 0")
        # PerturBench passes vocabularies as configuration where it instantiates the whole configuration at once.
        context = as_plain(context)
        # The tables are replaced by their rows, so that a checkpoint does not depend on files.
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
        self.objective, self.sampler, self.optimizer, self.seed = objective, sampler, optimizer, seed or 0
        self.gene_names = None if gene_names is None else list(gene_names)
        self.covariates = context.get("covariate_uniques") or {}
        self.space, self.path = space(n_genes), StraightPath()
        # The initial weights depend on the seed alone, not on what was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.conditions = conditions(self.n_input_perturbation_features, self.covariates)
            self.network = network(self.space.width, self.conditions.width)
            if type(self.conditions) is MultiHot and perturbation_embedding_width is None:
                expect_multi_hot(self.network)
        if perturbation_embedding_width is not None and type(self.conditions) is not MultiHot:
            hint = "pass the file as model.conditions.embeddings instead, or set model/conditions=multi_hot"
            raise InputError(f"perturbation_embeddings_path of the data replaces perturbations by embeddings; {hint}")
        if rows is not None:
            self.conditions.set_rows(rows)
        self.encoder = ConditionEncoder(self.n_input_perturbation_features, self.covariates, self.conditions)
        if isinstance(self.space, PCASpace):
            check_gene_settings(self.network)
        if objective.precondition:
            self.network = GaussianPreconditioning(self.network, self.space.width)
        if optimizer is not None:
            optimizer.freeze(self)
        self._evaluation = compiled_evaluation() if sampler.compile else evaluate
        self._batch_size = BatchSize(sampler.sample_batch_size)
        # Learned from the training cells without gradients.
        self.learned_detection_limit: float | None = None
        self.gene_means: Tensor | None = None
        self.controls: ControlPool | None = None
        self.marginals: Marginals | None = None
        self.taken_over: dict[str, Any] | None = None
        self.choice: choice.Choice | None = None
        self.held_out: choice.HeldOut = []
        self.uncalibrated_labels: set[str] = set()

    def take_over(self, checkpoint: Mapping[str, Any]) -> None:
        """Start from the weights of a checkpoint, matched by name, see `finetuning.weight_transfer`."""
        self.taken_over = take_over(self, checkpoint)

    def configure_optimizers(self) -> Any:
        """The optimizer and scheduler of the settings; PerturBench's Adam if the model has no ``optimizer``."""
        if self.optimizer is None:
            return super().configure_optimizers()
        return self.optimizer.configure(self, self.hparams.lr, self.hparams.wd, as_plain(self.hparams.lr_scheduler))

    def on_fit_start(self) -> None:
        """Read the training cells once, and learn what needs no gradients."""
        statistics = training_cells.collect(self, choice.MOST_CELLS if self.sampler.open else 0)
        if self.trainer.ckpt_path is None or self.learned_detection_limit is None:
            training_cells.learn(self, statistics)
        if self.sampler.open:
            choice.prepare(self, statistics)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch, with condition dropout."""
        condition = self.encoder(batch.perturbations, batch.covariates)
        expression, measured = self._filled(batch.gene_expression)
        counted = len(condition) if measured is None else measured.sum()
        loss = self.loss(condition, expression, measured, self.current_epoch, batch_idx) * self._share(counted)
        check_loss(loss.detach(), self.global_step)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(condition), sync_dist=True)
        return loss

    def loss(self, condition: Condition, expression: Tensor, measured: Tensor | None, *stream: int) -> Tensor:
        """Training loss of cells (B, G) of conditions (B); ``stream`` numbers the batch, whose noise depends on it."""
        sample, noise = self._sample(expression, condition, TRAIN, *stream)
        null, identity = self.objective.condition_dropout, self.conditions.identity_dropout
        condition = condition.drop_identity(noise.chance < null + identity * (1 - null)) if identity else condition
        return flow_matching_loss(self.velocity, sample, self.conditions(condition.drop(noise.chance < null)), measured)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow-matching loss of a batch without dropout, with the same noise in every epoch."""
        condition = self.encoder(batch.perturbations, batch.covariates)
        expression, measured = self._filled(batch.gene_expression)
        sample, _ = self._sample(expression, condition, VALIDATE, 0, batch_idx)
        loss = flow_matching_loss(self.velocity, sample, self.conditions(condition), measured)
        counted = len(condition) if measured is None else int(measured.sum())
        self.log("val_loss", loss, prog_bar=True, batch_size=counted, sync_dist=True)
        if batch_idx == 0 and self.held_out:  # at the end, averaged weights have been swapped out again
            choice.decide(self)
            self.log("val_energy", min(self.choice.energy.values()), prog_bar=True, rank_zero_only=True)
        return loss

    def velocity(self, x: Tensor, t: Tensor, embedded: Tensor) -> Tensor:
        """Velocity (B, W) at points (B, W), times (B,) and embedded conditions (B, C)."""
        return self._evaluation(self.network, x, t, embedded)

    def _sample(self, expression: Tensor, condition: Condition, *stream: int) -> tuple[PathSample, Noise]:
        """Points on paths to cells (B, G), and all random numbers of the batch."""
        x_1 = self.space.encode(expression)
        noise = batch_noise(x_1, [self.seed % 2**32, *stream], self.global_rank, self.world_size)
        x_0, groups = noise.x_0, None
        if self.objective.source == "control":
            self.controls = control_pool(self).to(x_1.device)
            groups = self.controls.context_rows(condition)
            x_0 = self.controls.draw(groups, noise.pick).to(x_1) + self.objective.source_noise * noise.x_0
        x_0 = x_0[COUPLINGS[self.objective.coupling](x_0, x_1, groups)]
        return self.path.sample(x_0, x_1, noise.t), noise

    @property
    def world_size(self) -> int:
        """Number of processes that train."""
        return 1 if self._trainer is None else self.trainer.world_size

    @property
    def unmeasured_are_nan(self) -> bool:
        """Whether NaN in a batch marks a gene that was not measured."""
        return self._trainer is not None and getattr(self.trainer.datamodule, "unmeasured_are_nan", False)

    def _filled(self, expression: Tensor) -> tuple[Tensor, Tensor | None]:
        """Expression (B, G) without gaps, and what was measured; ``None`` means everything."""
        return fill_unmeasured(expression, self.gene_means) if self.unmeasured_are_nan else (expression, None)

    def _share(self, counted: int | Tensor) -> Tensor | float:
        """Factor of the mean loss of ``counted`` cells or values, for devices that hold different numbers."""
        if self.world_size == 1:
            return 1.0
        count = torch.tensor(float(counted), device=self.device)
        return count / self.trainer.strategy.reduce(count.clone(), reduce_op="mean")

    def predict(self, batch: Batch) -> Tensor:
        """Generated expression (cells, G) on the CPU, one cell for each row of the batch."""
        return self.generate(self.encoder(batch.perturbations, batch.covariates))

    def generate(self, condition: Condition) -> Tensor:
        """Generated expression (N, G) on the CPU, one cell for each condition (N); see `stream` for errors."""
        return gather(condition, self.n_genes, self.stream)

    def stream(self, condition: Condition, counts: Sequence[int], seed: int | None = None) -> Iterator[Block]:
        """Generate ``counts`` (N,) cells of conditions (N), block by block; see `sampling.generate.stream_cells`."""
        return stream_cells(self, condition, counts, self.seed if seed is None else seed)

    def predict_anndata(self, data_tuple: tuple[Batch, pd.DataFrame]) -> ad.AnnData:
        """Generated cells of a batch; ``cells_per_condition`` of each condition where that is set."""
        return generate_table(self, *data_tuple)

    def encode(self, conditions: Conditions) -> Condition:
        """Conditions (N) of a checked table; warns once about those that calibration does not cover."""
        condition = self.encoder(conditions.perturbations, conditions.covariates, conditions.external)
        warn_uncalibrated(self, condition, conditions.obs[self.training_record["train_context"]["perturbation_key"]])
        return condition

    def sample(
        self,
        conditions: pd.DataFrame | Sequence[Mapping[str, Any]],
        n: int = 100,
        seed: int | None = None,
        perturbation_embeddings: pd.DataFrame | Sequence[pd.DataFrame] | None = None,
    ) -> ad.AnnData:
        """Generate cells of conditions, measured or not; see `sampling.sample.sample_conditions`."""
        return sample_conditions(self, conditions, n, seed, perturbation_embeddings)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model as a folder to share; see `pretrained.save.save_model` for the options."""
        save_model(self, folder, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "PRiMeFlow":
        """Load a folder, or ``owner/name`` from the Hugging Face Hub; see `pretrained.load.load_model`."""
        return load_model(cls, name, revision)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is learned without gradients, and the settings as plain values."""
        choice.ensure(self)
        super().on_save_checkpoint(checkpoint)
        store_settings(checkpoint)
        training_cells.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what is learned without gradients."""
        super().on_load_checkpoint(checkpoint)
        self.training_record = with_transform(self.training_record)
        training_cells.restore(self, checkpoint)
        self.choice = choice.Choice.of(checkpoint)
