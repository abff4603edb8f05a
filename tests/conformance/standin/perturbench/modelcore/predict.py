"""PerturBench's own command ``predict``."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict.yaml")
def main(cfg: DictConfig):
    from pathlib import Path

    import lightning as L

    from perturbench.modelcore.train import transform_of

    if cfg.get("seed"):
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    datamodule.setup("fit")
    # The settings of the model are those of the checkpoint; those of the command line are ignored.
    model = hydra.utils.get_class(cfg.model._target_).load_from_checkpoint(
        cfg.ckpt_path, map_location="cpu", weights_only=False
    )
    model.prediction_config = cfg
    datamodule.setup("predict")
    datamodule.predict_iterator.transform = transform_of(cfg, model)
    loader = datamodule.predict_dataloader()
    Path(cfg.output_path).mkdir(parents=True, exist_ok=True)
    hydra.utils.instantiate(cfg.trainer, logger=False).predict(model, dataloaders=loader)


if __name__ == "__main__":
    main()
