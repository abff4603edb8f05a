"""Predict the cells of given conditions from a composed configuration."""

from typing import Any

import hydra
import lightning as L
from omegaconf import DictConfig, OmegaConf, open_dict

from .checkpoints import build_model, load_checkpoint
from .train import instantiate_all, record_of


def predict(cfg: DictConfig) -> dict[str, Any]:
    """Predict the conditions of a table with a trained model and write them in chunks to ``cfg.output_path``.

    Parameters
    ----------
    cfg
        Composed ``predict.yaml`` with ``ckpt_path``, ``prediction_dataframe_path``, ``output_path``, ``chunk_size``.

    Raises
    ------
    DataError
        If the checkpoint, the table or the data are invalid.
    """
    if cfg.get("seed") is not None:
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = load_checkpoint(cfg.ckpt_path, bool(cfg.get("trust_checkpoint", False)))
    record = record_of(checkpoint)
    with open_dict(cfg):
        OmegaConf.update(cfg, "data.prediction.prediction_dataframe_path", cfg.prediction_dataframe_path)
        OmegaConf.update(cfg, "data.prediction.chunk_size", cfg.chunk_size)
    datamodule = hydra.utils.instantiate(cfg.data)
    datamodule.use_training_record(record, record["gene_names"])
    datamodule.setup("predict")
    model_class = hydra.utils.get_class(cfg.model._target_)
    model = build_model(model_class, cfg.ckpt_path, checkpoint)
    model.prediction_config = {"output_path": cfg.output_path}
    trainer = hydra.utils.instantiate(cfg.trainer, logger=False, callbacks=instantiate_all(cfg.get("callbacks")))
    trainer.predict(model, datamodule=datamodule, return_predictions=False)
    return {"trainer": trainer, "model": model, "datamodule": datamodule}
