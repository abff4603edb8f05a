"""Train and test a model from a composed configuration."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import lightning as L
from omegaconf import DictConfig

from ..data.identity import Purpose, check_order
from ..errors import DataError
from .checkpoints import CheckpointIO, first_line, load_checkpoint, restore_record

log = logging.getLogger(__name__)

OTHER_GROUPS = (
    "{} was trained with other groups of parameters, so its optimizer does not fit; use the settings of finetuning of "
    "its run, or start a new training from its weights with finetune=true"
)


def instantiate_all(config: Mapping[str, Any] | None) -> list[Any]:
    """Instantiate every entry of a config group, such as callbacks or loggers, that has a ``_target_``."""
    entries = (config or {}).values()
    return [hydra.utils.instantiate(entry) for entry in entries if entry and "_target_" in entry]


def record_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Training record and gene names of a checkpoint."""
    return {**restore_record(checkpoint), "gene_names": checkpoint["hyper_parameters"].get("gene_names")}


def build_model(cfg: DictConfig, datamodule: L.LightningDataModule) -> L.LightningModule:
    """Build the model of ``cfg.model`` with the eight arguments that the data provide."""
    # Partial, so that Hydra does not convert the vocabularies to configuration objects.
    build = hydra.utils.instantiate(cfg.model, _partial_=True)
    parameters = inspect.signature(build.func).parameters
    unknown = [name for name in build.keywords if name not in parameters]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise DataError(f"{build.func.__name__} has no setting {', '.join(unknown)}; it has {', '.join(parameters)}")
    return build(
        n_genes=datamodule.num_genes,
        n_perts=datamodule.num_perturbations,
        transform=datamodule.transform,
        context=datamodule.context,
        evaluation=datamodule.evaluation,
        embedding_width=datamodule.embedding_width,
        perturbation_embedding_width=datamodule.perturbation_embedding_width,
        gene_names=datamodule.train_iterator.gene_names,
    )


def build_trainer(cfg: DictConfig, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Build the trainer of ``cfg`` with these callbacks besides its own."""
    return hydra.utils.instantiate(
        cfg.trainer,
        callbacks=[*instantiate_all(cfg.get("callbacks")), *callbacks],
        logger=instantiate_all(cfg.get("logger")),
        plugins=[CheckpointIO()],
    )


def train(cfg: DictConfig, callbacks: Sequence[L.Callback] = ()) -> dict[str, Any]:
    """Fit the model of ``cfg`` and test its best checkpoint.

    The data module may be PerturBench's or the embedded one.

    Parameters
    ----------
    cfg
        Composed ``train.yaml``. ``train`` and ``test`` switch the two stages on. With ``train``, the run resumes from
        ``ckpt_path``; without it, ``ckpt_path`` is tested. With ``finetune``, only weights are loaded: a model with a
        method ``take_over`` keeps the genes and conditions of the data and loads the weights that match; any other
        model uses the genes and conditions of the checkpoint. ``seed`` sets the random seed.
    callbacks
        Additional callbacks.

    Returns
    -------
    ``{"trainer", "model", "datamodule"}`` and the callback metrics under ``"metrics"``.

    Raises
    ------
    DataError
        If data or settings are invalid.
    """
    if cfg.get("seed") is not None:
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    ckpt_path, trust = cfg.get("ckpt_path"), bool(cfg.get("trust_checkpoint", False))
    datamodule, model = prepare(cfg)
    trainer = build_trainer(cfg, callbacks)
    metrics: dict[str, Any] = {}
    if cfg.train:
        resume = None if cfg.get("finetune", False) else ckpt_path
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=resume, weights_only=not trust)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise DataError(OTHER_GROUPS.format(ckpt_path)) from error
        metrics.update(trainer.callback_metrics)
    if cfg.test:
        best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
        tested = (best or None) if cfg.train else ckpt_path
        if cfg.train and tested is None:
            log.warning("No checkpoint was saved; the test uses the weights at the end of training.")
        # A run trusts the checkpoint that it has written. After a resumed one, the path may come from another file.
        trust = trust or (cfg.train and resume is None)
        trainer.test(model, datamodule=datamodule, ckpt_path=tested, weights_only=not trust, verbose=False)
        metrics.update(trainer.callback_metrics)
    return {"trainer": trainer, "model": model, "datamodule": datamodule, "metrics": metrics}


def prepare(cfg: DictConfig) -> tuple[L.LightningDataModule, L.LightningModule]:
    """The data module, set up for training, and the model with what it takes from a checkpoint."""
    ckpt_path, finetune = cfg.get("ckpt_path"), bool(cfg.get("finetune", False))
    if not cfg.train and ckpt_path is None:
        raise DataError("train=false tests a trained model: give ckpt_path=PATH")
    if finetune and ckpt_path is None:
        raise DataError("finetune=true starts from a trained model: give ckpt_path=PATH")
    datamodule = hydra.utils.instantiate(cfg.data)
    checkpoint = load_checkpoint(ckpt_path, bool(cfg.get("trust_checkpoint", False))) if ckpt_path is not None else None
    purpose = "test" if not cfg.train else "finetune" if finetune else "resume"
    if purpose == "resume" and checkpoint is not None:
        check_steps(ckpt_path, checkpoint["global_step"], cfg.trainer.get("max_steps"))
    if purpose == "finetune" and hasattr(hydra.utils.get_class(cfg.model._target_), "take_over"):
        purpose = "transfer"
    set_up(datamodule, None if checkpoint is None else record_of(checkpoint), purpose, cfg.data.get("transform"))
    model = build_model(cfg, datamodule)
    check_compatible(model, datamodule)
    if purpose == "transfer":
        model.take_over(checkpoint)
    elif checkpoint is not None:
        load_weights(model, ckpt_path, checkpoint)
    if hasattr(datamodule, "cells"):
        model.training_record = {**model.training_record, "cells": datamodule.cells}
    return datamodule, model


def check_steps(ckpt_path: str, steps: int, max_steps: int | None) -> None:
    """Raise `DataError` if a checkpoint has more steps than the training that goes on from it shall have."""
    if 0 < (max_steps or 0) < steps:
        raise DataError(
            f"{ckpt_path} has trained for {steps} steps, more than trainer.max_steps={max_steps}; set a larger number, "
            "or start a new training from its weights with finetune=true"
        )


def set_up(
    datamodule: L.LightningDataModule,
    record: Mapping[str, Any] | None,
    purpose: Purpose,
    transform: DictConfig | None = None,
) -> None:
    """Prepare the training data, and compare them with the training record of a checkpoint if one is given.

    For all purposes but "transfer", the data get the vocabularies of the record, and PerturBench's data module gets the
    transform that the configuration ``transform`` makes of them.
    """
    ours = hasattr(datamodule, "use_training_record")
    if record is not None and ours:
        datamodule.use_training_record(record, record["gene_names"], purpose)
    datamodule.setup("fit")
    if record is None or ours or purpose == "transfer":
        return
    if purpose == "resume":
        genes, found = datamodule.train_iterator.gene_names, datamodule.context
        check_order("genes", record["gene_names"] or genes, genes)
        check_order("perturbations", record["train_context"]["perturbation_uniques"], found["perturbation_uniques"])
        known, found = record["train_context"]["covariate_uniques"], found["covariate_uniques"]
        check_order("covariates", known, found)
        for name, categories in known.items():
            check_order(f"categories of covariate {name!r}", categories or (), found[name] or ())
        return
    built, context = hydra.utils.instantiate(transform), record["train_context"]
    datamodule.context = context
    datamodule.transform = built.conf(**{argument: context[key] for argument, key in built.dependencies.items()})
    for iterator in (datamodule.train_iterator, datamodule.val_iterator):
        iterator.transform = datamodule.transform


def load_weights(model: L.LightningModule, ckpt_path: str, checkpoint: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint; `DataError` if they are those of another model."""
    try:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # parts of another model can raise any error
        raise DataError(
            f"{ckpt_path} is not of the {type(model).__name__} of these settings: {first_line(error)}; use the model "
            "settings of its run (config.yaml in its folder)"
        ) from error


def check_compatible(model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
    """Raise `DataError` unless the model accepts the data set class of the data module."""
    given, wanted = type(datamodule.train_iterator).__name__, model.COMPATIBLE_DATASETS
    if given not in wanted:
        raise DataError(
            f"{type(model).__name__} needs a data set of class {' or '.join(wanted)}, found {given}; "
            "data=h5ad_controls pairs cells with controls"
        )
