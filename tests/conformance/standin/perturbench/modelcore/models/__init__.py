"""Models."""

import shutil
from pathlib import Path

import anndata as ad
import lightning as L
import pandas as pd
import torch

from primeflow_perturbench.perturbench.embedded.modelcore.models import base


class PerturbationModel(L.LightningModule):
    """Base class of the models, written from the interface alone."""

    COMPATIBLE_DATASETS = ("SingleCellPerturbationWithControls",)

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
        self.n_total_covariates = sum(len(values or [0]) for values in context["covariate_uniques"].values())
        self.n_input_features = embedding_width or n_genes
        self.n_input_perturbation_features = perturbation_embedding_width or n_perts
        self.prediction_config = None
        self.summary_metrics = None
        self._lr, self._wd, self._scheduler = lr or 1e-3, wd or 1e-5, lr_scheduler

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self._lr, weight_decay=self._wd)
        if self._scheduler is None:
            return optimizer
        known = {"optimizer": optimizer}
        arguments = {argument: known[name] for argument, name in self._scheduler["dependencies"].items()}
        scheduler = {"scheduler": self._scheduler["conf"](**arguments), **(self._scheduler.get("extras") or {})}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["training_record"] = self.training_record

    def on_load_checkpoint(self, checkpoint):
        self.training_record = checkpoint["training_record"]

    def predict_anndata(self, data_tuple):
        batch, obs = data_tuple
        values = self.predict(batch).squeeze().detach().cpu().numpy()
        return ad.AnnData(values, obs=obs, var=pd.DataFrame(index=batch.gene_names))

    @property
    def _chunks(self):
        return Path(self.evaluation_config["save_dir"]) / "predicted_anndata"

    def test_step(self, data_tuple, batch_idx):
        self._chunks.mkdir(parents=True, exist_ok=True)
        self.predict_anndata(data_tuple).write_h5ad(self._chunks / f"rank{self.global_rank}_batch{batch_idx}.h5ad")

    def on_test_end(self):
        self.trainer.strategy.barrier()
        if self.global_rank != 0:
            return
        predicted = base.merge_predictions(self._chunks)
        shutil.rmtree(self._chunks)
        reference = self.trainer.datamodule.test_iterator.reference_adata
        result = base.PerturbationModel.evaluate_predictions(self, predicted, reference)
        self.summary_metrics = result.rounded()
        print("Summary metrics")
        print(self.summary_metrics)
        self.summary_metrics.to_csv(Path(self.evaluation_config["save_dir"]) / "summary.csv")

    def predict_step(self, data_tuple, batch_idx):
        folder = Path(self.prediction_config["output_path"])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"prediction_rank{self.global_rank}_chunk_{batch_idx}.h5ad"
        self.predict_anndata(data_tuple).write_h5ad(folder / name)


class MeanModel(PerturbationModel):
    """A model of the stand-in that predicts the controls of the batch."""

    def __init__(self, gene_names=None, **settings):
        super().__init__(**settings)
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        loss = (batch.controls + self.shift - batch.gene_expression).square().mean()
        self.log("train_loss", loss, batch_size=len(batch.gene_expression))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch.gene_expression))

    def predict(self, batch):
        return batch.controls if batch.controls is not None else batch.gene_expression


__all__ = ["MeanModel", "PerturbationModel"]
