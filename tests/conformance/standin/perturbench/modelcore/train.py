"""PerturBench's own command ``train``."""

import hydra
from omegaconf import DictConfig


def instantiate_all(config):
    return [hydra.utils.instantiate(entry) for entry in (config or {}).values()]


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig):
    import lightning as L
    import torch

    if cfg.get("seed"):
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    datamodule.setup("fit")
    model = hydra.utils.instantiate(
        cfg.model,
        n_genes=datamodule.num_genes,
        n_perts=datamodule.num_perturbations,
        transform=datamodule.transform,
        context=datamodule.context,
        evaluation=datamodule.evaluation,
        embedding_width=datamodule.embedding_width,
        perturbation_embedding_width=datamodule.perturbation_embedding_width,
        gene_names=datamodule.train_iterator.gene_names,
    )
    if cfg.get("finetune"):
        model.load_state_dict(torch.load(cfg.ckpt_path, map_location="cpu", weights_only=False)["state_dict"])
    trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=instantiate_all(cfg.get("callbacks")), logger=instantiate_all(cfg.get("logger"))
    )
    if cfg.train:
        trainer.fit(model, datamodule=datamodule)
    if cfg.test:
        trainer.test(model, datamodule=datamodule, ckpt_path="best" if cfg.train else cfg.ckpt_path, weights_only=False)


if __name__ == "__main__":
    main()
