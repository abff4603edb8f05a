"""What the public PerturBench repository offers."""

import dataclasses
import difflib
from collections.abc import Sequence

from primeflow_perturbench.errors import InputError

REPOSITORY = "altoslabs/perturbench"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set and its files in the repository."""

    name: str
    what: str
    task: str
    files: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Files that are fetched where the repository has them, before the others."""


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "norman19",
            "CRISPRa with pairs, K562",
            "unseen pairs",
            ("norman19_processed.h5ad.gz",),
            ("norman19_split.csv",),
        ),
        Dataset(
            "sciplex3",
            "drugs, cancer lines",
            "unseen lines",
            ("sciplex3_processed.h5ad.gz",),
            ("sciplex3_split.csv",),
        ),
        Dataset(
            "frangieh21",
            "CRISPR, melanoma",
            "unseen treatments",
            ("frangieh21_split.csv", "frangieh21_processed.h5ad.gz"),
        ),
        Dataset(
            "jiang24",
            "CRISPRi with cytokines, cancer lines",
            "unseen lines, cytokines",
            ("jiang24_split.csv", "jiang24_processed.h5ad.gz"),
        ),
        Dataset(
            "op3",
            "drugs, blood cells",
            "unseen cell types",
            ("op3_split.csv", "op3_processed.h5ad.gz"),
        ),
        Dataset(
            "mcfaline23",
            "CRISPR with drugs, glioma lines",
            "unseen lines, drugs",
            ("mcfaline23_gxe_splits.tar.gz", "mcfaline23_gxe_processed.h5ad.gz"),
        ),
    )
}


def choose(names: Sequence[str]) -> list[Dataset]:
    """Data sets by name, each once; "all" stands for every one.

    Raises
    ------
    InputError
        On a name that is none.
    """
    for name in names:
        if name != ALL and name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"data set {name!r}: found no such name, expected one of {', '.join(DATASETS)} or {ALL}{hint}"
            )
    return [dataset for dataset in DATASETS.values() if ALL in names or dataset.name in names]


def unpacked_name(file: str) -> str:
    """Name on disk of a file of the repository: without .gz, and a folder for a .tar.gz."""
    return file.removesuffix(".gz").removesuffix(".tar")
