"""PerturBench's own command ``train``."""

import hydra
from omegaconf import DictConfig


def instantiate_all(config):
    return [hydra.utils.instantiate(entry) for entry in (config or {}).values()]


def transform_of(cfg, model):
    """The transform of a loaded model; one that is a configuration is built anew from the settings of the data."""
    from perturbench.modelcore.utils import instantiate_with_context

    transform, context = model.training_record["transform"], model.training_record["train_context"]
    if isinstance(transform, DictConfig):
        transform = instantiate_with_context(hydra.utils.instantiate(cfg.data.transform), context)
    return transform


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig):
    import lightning as L

    from perturbench.modelcore.models import PerturbationModel

    if cfg.get("seed"):
        L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    datamodule.setup("fit")
    if cfg.data.data_iter_factory._target_.split(".")[-2] not in PerturbationModel.COMPATIBLE_DATASETS:
        raise ValueError("the model is not compatible with this data set")
    if cfg.get("ckpt_path"):
        given = {"evaluation": datamodule.evaluation, "map_location": "cpu", "weights_only": False}
        if "lr" in cfg.model:
            given["lr"] = cfg.model.lr
        if "lr_scheduler" in cfg.model:
            given["lr_scheduler"] = hydra.utils.instantiate(cfg.model.lr_scheduler)
        model = hydra.utils.get_class(cfg.model._target_).load_from_checkpoint(cfg.ckpt_path, **given)
        datamodule.transform, datamodule.context = transform_of(cfg, model), model.training_record["train_context"]
        for iterator in (datamodule.train_iterator, datamodule.val_iterator):
            iterator.transform = datamodule.transform
    else:
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
    trainer = hydra.utils.instantiate(
        cfg.trainer, callbacks=instantiate_all(cfg.get("callbacks")), logger=instantiate_all(cfg.get("logger"))
    )
    if cfg.train:
        resumed = None if cfg.get("finetune") else cfg.get("ckpt_path")
        trainer.fit(model, datamodule=datamodule, ckpt_path=resumed, weights_only=False)
    if cfg.test:
        best = "best" if trainer.checkpoint_callback and trainer.checkpoint_callback.best_model_path else None
        tested = best if cfg.train else cfg.ckpt_path
        trainer.test(model, datamodule=datamodule, ckpt_path=tested, weights_only=False)


if __name__ == "__main__":
    main()
