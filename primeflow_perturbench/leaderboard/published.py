"""Figures that others have published, to stand beside ours as marked rows that never compete."""

from collections.abc import Iterable
from dataclasses import dataclass

from primeflow_perturbench.errors import InputError

PAPER = "arXiv 2604.13986 v2, at second hand"
ISSUE = "public issue of the authors' repository"


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes
    ----------
    label
        The model, as published.
    origin
        Where the figures come from.
    means
        Value by metric key.
    deviations
        Published standard deviation by metric key, where there is one.
    """

    label: str
    origin: str
    means: dict[str, float]
    deviations: dict[str, float]


# Ranges and "near 0" are no figures and left out.
ROWS: dict[str, tuple[Published, ...]] = {
    "norman19": (
        Published(
            "PRiMeFlow, w = 3, 5 seeds",
            ISSUE,
            {"mmd_none": 0.61, "mmd_pca": 0.86, "top_k_recall_scores": 0.61},
            {"mmd_none": 0.03, "mmd_pca": 0.05, "top_k_recall_scores": 0.008},
        ),
        Published(
            "PRiMeFlow, w = 3, third-party rerun",
            ISSUE,
            {"mmd_none": 0.673, "mmd_pca": 1.039, "top_k_recall_scores": 0.592},
            {},
        ),
        Published(
            "PRiMeFlow, w = 1, third-party rerun",
            ISSUE,
            {"mmd_none": 0.346, "mmd_pca": 0.453, "top_k_recall_scores": 0.569},
            {},
        ),
    ),
    "sciplex3": (
        Published("PRiMeFlow", PAPER, {"mmd_none": 0.13, "top_k_recall_scores": 0.26, "cosine_logfc": 0.46}, {}),
        Published("flow matching in PCA space", PAPER, {"mmd_none": 1.2, "top_k_recall_scores": 0.042}, {}),
        Published("PRiMeFlow with an MLP", PAPER, {"mmd_none": 14.0}, {}),
    ),
}


def published_rows(names: Iterable[str], file: str = "") -> list[Published]:
    """Published rows of data sets, by name or else by the name of the data file.

    Parameters
    ----------
    names
        Data sets asked for; if none, the one that ``file`` begins with, if any.
    file
        Name of the runs' data file, such as norman19_processed.h5ad.

    Raises
    ------
    InputError
        If nothing is known of a name.
    """
    names = list(names)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise InputError(
            f"--published {', '.join(unknown)}: there are no published figures of that name, choose from "
            f"{', '.join(ROWS)}"
        )
    chosen = names or [name for name in ROWS if file.lower().startswith(name)]
    return [row for name in chosen for row in ROWS[name]]
