"""The base class of every model: optimizer, training record in checkpoints, predictions as AnnData, evaluation."""

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import lightning as L
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from ...analysis.benchmarks.evaluation import Evaluation
from ...analysis.benchmarks.pipelines import EvaluationResult, run_pipelines
from ...data.types import Batch
from ...files import replacing
from ..checkpoints import restore_record, store_plain

log = logging.getLogger(__name__)

CONDITION_INDEX = "_condition_idx"


class PerturbationModel(L.LightningModule, ABC):
    """Base class of perturbation models.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    n_perts
        Number of perturbations, P.
    transform
        Converts labels to tensors; saved in checkpoints.
    context
        Training context (vocabularies, columns); saved in checkpoints.
    evaluation
        Settings of the evaluation after a test, see `AnnDataLitModule`.
    embedding_width
        Width of the cell embeddings that replace expression as input.
    perturbation_embedding_width
        Width of the perturbation embeddings that replace the multi-hot vectors.
    lr, wd
        Learning rate (default 1e-3) and weight decay (default 1e-5) of Adam.
    lr_scheduler
        ``{conf: partial, dependencies: {argument: "optimizer"}, extras: {monitor, interval, frequency}}``.
    count_based_input_expression
        Whether the model reads raw counts instead of log1p expression.
    embedding_decoder_path
        Accepted for compatibility; the embedded subset does not decode embeddings.

    Raises
    ------
    ValueError
        If ``embedding_decoder_path`` is given.
    """

    COMPATIBLE_DATASETS: tuple[str, ...] = ("SingleCellPerturbationWithControls",)
    # Whether a test scores its predictions. If not, the caller scores them.
    evaluate_on_test: bool = True

    def __init__(
        self,
        n_genes: int,
        n_perts: int,
        transform: Any,
        context: Mapping[str, Any],
        evaluation: Mapping[str, Any] | None,
        embedding_width: int | None = None,
        perturbation_embedding_width: int | None = None,
        lr: float | None = None,
        wd: float | None = None,
        lr_scheduler: Mapping[str, Any] | None = None,
        count_based_input_expression: bool = False,
        embedding_decoder_path: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if embedding_decoder_path is not None:
            raise ValueError(
                "embedding_decoder_path: the embedded subset has no decoders; install PerturBench to use them"
            )
        self.n_genes, self.n_perts = n_genes, n_perts
        self.training_record = {"transform": transform, "train_context": context}
        self.evaluation_config = evaluation
        self.embedding_width = embedding_width
        self.lr = 1e-3 if lr is None else lr
        self.wd = 1e-5 if wd is None else wd
        self.lr_scheduler_config = lr_scheduler
        self.count_based_input_expression = count_based_input_expression
        uniques = (context or {}).get("covariate_uniques") or {}
        self.n_total_covariates = sum(1 if values is None else len(values) for values in uniques.values())
        self.n_input_features = embedding_width or n_genes
        self.n_input_perturbation_features = perturbation_embedding_width or n_perts
        self.prediction_config: dict[str, Any] = {}
        self.summary_metrics: pd.DataFrame | None = None
        self.evaluation_result: EvaluationResult | None = None

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Predicted expression (cells, G) for the perturbations and covariates of a batch."""

    def configure_optimizers(self) -> Any:
        """Adam, with the scheduler of ``lr_scheduler`` if one is given."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.wd)
        if not self.lr_scheduler_config:
            return optimizer
        config = self.lr_scheduler_config
        known = {"optimizer": optimizer}
        arguments = {argument: known[name] for argument, name in config["dependencies"].items()}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": config["conf"](**arguments), **(config.get("extras") or {})},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the training record, and the settings as plain values."""
        checkpoint["training_record"] = self.training_record
        store_plain(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training record."""
        if "training_record" in checkpoint:
            self.training_record = restore_record(checkpoint)

    def predict_anndata(self, data_tuple: tuple[Batch, pd.DataFrame]) -> ad.AnnData:
        """Predict the cells of a batch; ``obs`` describes them."""
        batch, obs = data_tuple
        with torch.no_grad():
            predicted = self.predict(batch)
        if isinstance(predicted, torch.distributions.Distribution):
            predicted = predicted.mean
        return predicted_anndata(predicted, obs, batch.gene_names)

    def on_test_start(self) -> None:
        """Create an empty folder for predictions, the same for all processes."""
        folder = Path((self.evaluation_config or {}).get("save_dir") or ".") / "predicted_anndata"
        self._prediction_folder = Path(self.trainer.strategy.broadcast(str(folder)))
        if self.trainer.is_global_zero:
            shutil.rmtree(self._prediction_folder, ignore_errors=True)
            self._prediction_folder.mkdir(parents=True)
        self.trainer.strategy.barrier()

    def test_step(self, data_tuple: tuple[Batch, pd.DataFrame], batch_idx: int) -> None:
        """Predict a batch of test conditions and write it to disk."""
        path = self._prediction_folder / f"prediction_rank{self.global_rank}_chunk_{batch_idx}.h5ad"
        write_h5ad(self.predict_anndata(data_tuple), path)

    def on_test_end(self) -> None:
        """Merge the predictions, evaluate them, print and save the summary."""
        self.trainer.strategy.barrier()
        if not self.trainer.is_global_zero:
            return
        config = self.evaluation_config or {}
        dataset = self.trainer.datamodule.test_iterator
        predicted = merge_predictions(self._prediction_folder)
        save_dir = Path(config.get("save_dir") or ".")
        write_h5ad(predicted, save_dir / "predicted.h5ad")
        shutil.rmtree(self._prediction_folder)
        if not self.evaluate_on_test:
            return
        self.evaluation_result = self.evaluate_predictions(predicted, dataset.reference_adata)
        self.summary_metrics = self.evaluation_result.rounded()
        if config.get("save_evaluation", True):
            save_evaluation(self.evaluation_result, save_dir)
        if config.get("print_summary", True):
            print(self.summary_metrics.to_string())

    def evaluate_predictions(self, predicted: ad.AnnData, reference: ad.AnnData) -> EvaluationResult:
        """Score predicted cells against measured ones with the pipelines of the settings.

        Predicted control cells are replaced by the measured ones unless ``use_synthetic_controls``.
        """
        config, context = self.evaluation_config or {}, self.training_record["train_context"]
        evaluation = Evaluation(
            model_adatas=[with_controls(predicted, reference, context, bool(config.get("use_synthetic_controls")))],
            model_names=[type(self).__name__],
            ref_adata=reference,
            pert_col=context["perturbation_key"],
            ctrl=context["perturbation_control_value"],
            cov_cols=list(context["covariate_keys"]),
        )
        return run_pipelines(evaluation, config.get("evaluation_pipelines"))

    def predict_step(self, data_tuple: tuple[Batch, pd.DataFrame], batch_idx: int) -> None:
        """Predict a batch of conditions and write it to ``prediction_config["output_path"]``."""
        folder = Path(self.prediction_config.get("output_path") or ".")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"prediction_rank{self.global_rank}_chunk_{batch_idx}.h5ad"
        write_h5ad(self.predict_anndata(data_tuple), path)


def predicted_anndata(predicted: Tensor, obs: pd.DataFrame, gene_names: list[str]) -> ad.AnnData:
    """AnnData of predicted cells (cells, G), also of a single cell; sparse if most values are zero."""
    values = predicted.detach().to("cpu", torch.float32).numpy().reshape(len(obs), -1)
    matrix = sp.csr_matrix(values) if np.count_nonzero(values) < 0.4 * values.size else values
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(gene_names, dtype=str)))


def write_h5ad(adata: ad.AnnData, path: Path) -> None:
    """Write an h5ad file atomically."""
    with replacing(path) as temporary:
        adata.write_h5ad(temporary)


def merge_predictions(folder: Path) -> ad.AnnData:
    """Merge the files of a folder in the order of conditions; a condition that two devices predicted counts once."""
    chunks = [ad.read_h5ad(path) for path in sorted(folder.glob("*.h5ad"))]
    seen: set[int] = set()
    kept = []
    for chunk in chunks:
        fresh = ~chunk.obs[CONDITION_INDEX].isin(seen).to_numpy()
        seen.update(chunk.obs[CONDITION_INDEX].unique())
        if fresh.any():
            kept.append(chunk[fresh])
    merged = ad.concat(kept, join="inner")
    return merged[np.argsort(merged.obs[CONDITION_INDEX].to_numpy(), kind="stable")].copy()


def with_controls(
    predicted: ad.AnnData, reference: ad.AnnData, context: Mapping[str, Any], synthetic: bool = False
) -> ad.AnnData:
    """Predicted perturbed cells with control cells: measured ones, or predicted ones if ``synthetic``."""
    if synthetic:
        return predicted
    key, control = context["perturbation_key"], context["perturbation_control_value"]
    perturbed = predicted[(predicted.obs[key].astype(str) != control).to_numpy()]
    controls = reference[(reference.obs[key].astype(str) == control).to_numpy()]
    columns = [*context["covariate_keys"], key]
    parts = [
        ad.AnnData(sp.csr_matrix(part.X), obs=part.obs[columns].astype(str), var=part.var[[]])
        for part in (perturbed, controls)
    ]
    return ad.concat(parts, index_unique="-", join="inner")


def save_evaluation(result: EvaluationResult, folder: Path) -> None:
    """Write ``summary.csv``, ``summary_by_cov.csv`` and ``per_condition.parquet``."""
    with replacing(folder / "summary.csv") as temporary:
        result.rounded().to_csv(temporary)
    with replacing(folder / "summary_by_cov.csv") as temporary:
        result.summary_by_cov.to_csv(temporary, index=False)
    with replacing(folder / "per_condition.parquet") as temporary:
        result.per_condition.to_parquet(temporary, index=False)
