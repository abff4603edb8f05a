"""PerturBench's own command ``predict``."""

import hydra
from omegaconf import DictConfig, open_dict


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict.yaml")
def main(cfg: DictConfig):
    import torch

    with open_dict(cfg):
        cfg.data.prediction.prediction_dataframe_path = cfg.prediction_dataframe_path
        cfg.data.prediction.chunk_size = cfg.chunk_size
    datamodule = hydra.utils.instantiate(cfg.data)
    record = torch.load(cfg.ckpt_path, map_location="cpu", weights_only=False)["training_record"]
    datamodule.transform, datamodule.context = record["transform"], record["train_context"]
    datamodule.setup("predict")
    model = hydra.utils.get_class(cfg.model._target_).load_from_checkpoint(
        cfg.ckpt_path, evaluation=None, lr=None, lr_scheduler=None, map_location="cpu", weights_only=False
    )
    model.prediction_config = {"output_path": cfg.output_path}
    hydra.utils.instantiate(cfg.trainer, logger=False).predict(model, datamodule=datamodule, return_predictions=False)


if __name__ == "__main__":
    main()
