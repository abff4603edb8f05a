"""PerturBench's description of many h5 files as one data set, read as an atlas.

It is a data config of PerturBench's ``H5LitModule``: ``data.filename`` lists h5ad files that name their columns and
labels alike, ``data_iter_factory`` says how. There the genes are those that all files have, or those of
``feature_filter_path`` that any file has; with ``data.append_dataset_to_index`` a cell is called
``<name>-f<number of its file>-<its file's dataset>``, the name that split files use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from primeflow_perturbench.data.atlas.manifest import (
    CONDITION,
    DATASET,
    AtlasFile,
    Manifest,
    names_of,
    read_genes,
    refusal,
)
from primeflow_perturbench.errors import first_line
from primeflow_perturbench.simulation.screen import CONTROL, DELIMITER

FILE_KEYS = ("filename", "append_dataset_to_index")
FACTORY_KEYS = (
    "perturbation_key",
    "perturbation_control_value",
    "perturbation_combination_delimiter",
    "covariate_keys",
    "feature_filter_path",
)
DATA_DIR = "${oc.env:PRIMEFLOW_DATA,data}"


def is_h5_description(given: Mapping) -> bool:
    """Whether a YAML is such a config, by itself or within a run's whole config."""
    return "files" not in given and isinstance(given.get("data"), Mapping)


def read_h5_description(given: Mapping, path: Path) -> Manifest:
    """Read a data config as a manifest.

    Parameters
    ----------
    given
        The config; ``${paths.data_dir}`` in it is PRIMEFLOW_DATA, or ``data``. Its paths are relative to the working
        folder, as Hydra takes them. The splitter and the settings of training are not read.
    path
        Where it was read, for sentences.
    """
    data, factory = _resolved(given, path)
    filenames = data.get("filename")
    filenames = [filenames] if isinstance(filenames, str) else filenames
    if not filenames or not factory:
        found, expected = "no data.filename or no data_iter_factory", "PerturBench's description of h5 files"
        raise refusal(path, found, expected, "give both, or write an atlas manifest with files")
    covariates = names_of(factory.get("covariate_keys") or [], f"{path}, data_iter_factory.covariate_keys")
    # Of a single file PerturBench leaves the names of cells alone.
    appended = bool(data.get("append_dataset_to_index")) and len(filenames) > 1
    entries = tuple(
        AtlasFile(
            path=Path(name),
            dataset=f"f{number}",
            perturbation_key=factory.get("perturbation_key", CONDITION),
            control=(str(factory.get("perturbation_control_value", CONTROL)),),
            delimiter=factory.get("perturbation_combination_delimiter", DELIMITER),
            covariates={DATASET: DATASET} if appended or DATASET in covariates else {},
            constants={} if appended or DATASET in covariates else {DATASET: Path(name).name.partition(".")[0]},
            cell_suffix=f"-f{number}-{{dataset}}" if appended else "",
        )
        for number, name in enumerate(filenames)
    )
    filtered = factory.get("feature_filter_path")
    genes = "intersection" if filtered is None else read_genes(Path(filtered).absolute(), path)
    return Manifest(path, entries, covariates, genes, drop_absent_genes=True)


def _resolved(given: Mapping, path: Path) -> tuple[dict, dict]:
    """What the config says of the files and of their columns, with its interpolations resolved."""
    # A data config by itself lies at ``data`` of the whole config, which its interpolations start from.
    whole = given if "data" in given["data"] else {"data": dict(given)}
    parts = []
    try:
        config = OmegaConf.merge({"paths": {"data_dir": DATA_DIR}}, whole)
        for name, keys in (("data", FILE_KEYS), ("data_iter_factory", FACTORY_KEYS)):
            part = config.data.get(name) or {}
            parts.append({key: _plain(part[key]) for key in keys if key in part})
    except OmegaConfBaseException as error:
        found = f"a value that cannot be resolved ({first_line(error)})"
        raise refusal(path, found, "paths, or ${paths.data_dir} in them", "write the value out") from error
    return parts[0], parts[1]


def _plain(value: object) -> object:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
