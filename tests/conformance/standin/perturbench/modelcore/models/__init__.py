"""Models."""

from abc import ABC, abstractmethod
from pathlib import Path

import anndata as ad
import lightning as L
import torch
from omegaconf import OmegaConf

from perturbench.modelcore.utils import instantiate_with_context
from primeflow_perturbench.perturbench.embedded.modelcore.models import base


class PerturbationModel(L.LightningModule, ABC):
    """Base class of the models, written from the interface alone."""

    COMPATIBLE_DATASETS = ("SingleCellPerturbation", "SingleCellPerturbationWithControls")
    summary_metrics = None
    prediction_config = None

    def __init__(
        self,
        n_genes,
        n_perts,
        transform,
        context,
        evaluation,
        embedding_width=None,
        perturbation_embedding_width=None,
        lr=None,
        wd=None,
        lr_scheduler=None,
        count_based_input_expression=False,
        embedding_decoder_path=None,
        **kwargs,
    ):
        super().__init__()
        self.n_genes, self.n_perts = n_genes, n_perts
        self.training_record = {"transform": transform, "train_context": context}
        self.evaluation_config = evaluation
        uniques = context["covariate_uniques"].values()
        self.n_total_covariates = sum(1 if values is None else len(values) for values in uniques)
        self.n_input_features = n_genes if embedding_width is None else embedding_width
        self.n_input_perturbation_features = (
            n_perts if perturbation_embedding_width is None else perturbation_embedding_width
        )
        self.lr, self.wd = 1e-3 if lr is None else lr, 1e-5 if wd is None else wd
        self.lr_scheduler = lr_scheduler

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.wd)
        if self.lr_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = {"scheduler": instantiate_with_context(self.lr_scheduler, {"optimizer": optimizer})}
        if "extras" in self.lr_scheduler:
            scheduler |= OmegaConf.to_object(self.lr_scheduler.extras)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["training_record"] = self.training_record

    def on_load_checkpoint(self, checkpoint):
        self.training_record = checkpoint["training_record"]

    @abstractmethod
    def predict(self, batch): ...

    def predict_anndata(self, data_tuple):
        batch, obs = data_tuple
        cells = ad.AnnData(self.predict(batch).float().squeeze().detach().cpu().numpy(), obs=obs)
        cells.var_names = batch.gene_names
        return cells

    def on_test_start(self):
        folder = Path(self.evaluation_config.save_dir) / "predicted_anndata"
        self.chunks = Path(self.trainer.strategy.broadcast(str(folder)))
        self.chunks.mkdir(parents=True, exist_ok=True)

    def test_step(self, data_tuple, batch_idx):
        path = self.chunks / f"predicted_rank{self.global_rank}_batch{batch_idx}.h5ad"
        self.predict_anndata(data_tuple).write_h5ad(path)

    def on_test_end(self):
        self.trainer.strategy.barrier()
        if self.global_rank != 0:
            return
        settings = self.evaluation_config
        if settings.use_control_variance:
            raise NotImplementedError("the stand-in has no variances of controls")
        reference = self.trainer.datamodule.test_iterator.reference_adata
        # The chunks stay, those of an earlier run as well.
        result = base.PerturbationModel.evaluate_predictions(self, base.merge_predictions(self.chunks), reference)
        self.summary_metrics = result.rounded()
        if settings.print_summary:
            print(self.summary_metrics)
        Path(settings.save_dir).mkdir(parents=True, exist_ok=True)
        result.summary_by_cov.to_csv(settings.save_dir + "/summary_by_cov.csv", index_label="metric")
        if settings.get("run_cell_eval", True):
            raise NotImplementedError("the stand-in has no cell-eval")

    def predict_step(self, data_tuple, batch_idx):
        name = f"/prediction_rank{self.global_rank}_chunk_{batch_idx}.h5ad"
        self.predict_anndata(data_tuple).write_h5ad(self.prediction_config.output_path + name)


class LinearAdditive(PerturbationModel):
    """A model of PerturBench by name, which shifts control cells."""

    COMPATIBLE_DATASETS = ("SingleCellPerturbationWithControls",)

    def __init__(self, inject_covariates=False, **settings):
        super().__init__(**settings)
        self.save_hyperparameters()
        self.shift = torch.nn.Linear(self.n_input_perturbation_features, self.n_genes)

    def training_step(self, batch, batch_idx):
        loss = (batch.controls + self.shift(batch.perturbations) - batch.gene_expression).square().mean()
        # As in PerturBench, the length of a batch is its number of fields.
        self.log("train_loss", loss, batch_size=len(batch), sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch), sync_dist=True)

    def predict(self, batch):
        return batch.gene_expression + self.shift(batch.perturbations)


__all__ = ["LinearAdditive", "PerturbationModel"]
