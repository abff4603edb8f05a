"""Kinds of held-out conditions on which models differ: strong, weak, with interaction, in an unseen covariate group."""

from pathlib import Path

import pandas as pd

from primeflow_perturbench.labels import split_label
from primeflow_perturbench.leaderboard.collect import Run

STRONG, WEAK = "strong effect", "weak effect"
INTERACTION, UNSEEN = "combination with interaction", "unseen covariate"
MEANING = {
    STRONG: "upper third of the conditions by the energy distance of control cells to them",
    WEAK: "lower third of the conditions by that distance",
    INTERACTION: "upper third of the combinations by the energy distance of the additive reference to them",
    UNSEEN: "perturbation that training has in other covariate groups alone",
}
DISTANCES = ("mmd_none", "mmd_pca")
SPLIT_MAP = "perturbation_covariate_split_map.csv"


def regimes(run: Run) -> pd.DataFrame:
    """Regimes of the held-out conditions, by what any run of a collection knows of the data.

    Returns
    -------
    Columns condition and part, the regime. A condition may be in several regimes or in none, and a regime that cannot
    be told, for want of the reference row or of several covariate groups, is absent.
    """
    control, additive = reference_distance(run, "control"), reference_distance(run, "additive")
    found = {}
    if len(control) >= 3:
        found[STRONG] = control.index[control >= control.quantile(2 / 3)]
        found[WEAK] = control.index[control <= control.quantile(1 / 3)]
    pairs = additive[additive.index.isin(combinations(run))]
    if len(pairs) >= 3:
        found[INTERACTION] = pairs.index[pairs >= pairs.quantile(2 / 3)]
    found[UNSEEN] = unseen_covariate(run)
    rows = [(condition, regime) for regime, conditions in found.items() for condition in conditions]
    return pd.DataFrame(rows, columns=["condition", "part"])


def reference_distance(run: Run, name: str) -> pd.Series:
    """Energy distance of a reference's cells to those observed, by condition; empty where it was not scored."""
    rows = run.references[run.references["model"] == name]
    for metric in DISTANCES:
        values = rows[rows["metric"] == metric].set_index("cov_pert")["value"].dropna()
        if len(values):
            return values
    return pd.Series(dtype=float)


def combinations(run: Run) -> set[str]:
    """Conditions whose label names several perturbations."""
    columns = run.settings["data"]["data_iter_factory"]
    delimiter, control = columns.get("perturbation_combination_delimiter"), columns["perturbation_control_value"]
    labels = run.scores["perturbation"].astype(str)
    joined = [len(split_label(label, delimiter, control)) > 1 for label in labels]
    return set(run.scores.loc[joined, "cov_pert"])


def unseen_covariate(run: Run) -> list[str]:
    """Conditions whose perturbation training has in other covariate groups alone, by the run's split."""
    path = Path(run.folder) / SPLIT_MAP
    key = run.settings["data"]["data_iter_factory"].get("perturbation_key", "")
    covariates = run.covariates
    if not covariates or not path.is_file():
        return []
    pairs = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {*covariates, key, "split"} <= set(pairs.columns):
        return []
    training = pairs[pairs["split"] == "train"]
    labels, seen = set(training[key]), set(training[[*covariates, key]].itertuples(index=False, name=None))
    conditions = run.scores.drop_duplicates("cov_pert").astype(str)
    named = conditions[[*covariates, "perturbation"]].itertuples(index=False, name=None)
    return [
        condition
        for condition, pair in zip(conditions["cov_pert"], named, strict=True)
        if pair[-1] in labels and pair not in seen
    ]
