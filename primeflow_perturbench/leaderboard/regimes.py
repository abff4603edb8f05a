"""Groups of held-out conditions by kind: strong or weak effect, interaction, unseen covariate, covariate group."""

import pandas as pd

from primeflow_perturbench.labels import split_label
from primeflow_perturbench.leaderboard.collect import Run

STRONG, WEAK = "strong effect", "weak effect"
INTERACTION, UNSEEN = "combination with interaction", "unseen covariate"
MEANING = {
    STRONG: "upper third of the conditions by energy distance from the control cells",
    WEAK: "lower third of the conditions by that distance",
    INTERACTION: "upper third of the combinations by energy distance from the additive reference",
    UNSEEN: "perturbation that training saw in other covariate groups only",
}
# Distance of a reference, the first that was scored.
DISTANCES = ("mmd_none", "mmd_pca")
SPLIT_MAP = "perturbation_covariate_split_map.csv"


def regimes(run: Run) -> pd.DataFrame:
    """Regimes of the held-out conditions, from the references and the split of any run of a collection.

    Returns
    -------
    Columns condition and part, the regime. A condition may be in several regimes or in none. A regime is absent if it
    cannot be determined, for want of a reference row, a split map or several covariate groups.
    """
    control, additive = _reference_distance(run, "control"), _reference_distance(run, "additive")
    combinations = additive[additive.index.isin(_combinations(run))]
    found = {}
    if len(control) >= 3:
        found[STRONG] = control.index[control >= control.quantile(2 / 3)]
        found[WEAK] = control.index[control <= control.quantile(1 / 3)]
    if len(combinations) >= 3:
        found[INTERACTION] = combinations.index[combinations >= combinations.quantile(2 / 3)]
    found[UNSEEN] = _unseen_covariate(run)
    rows = [(condition, regime) for regime, conditions in found.items() for condition in conditions]
    return pd.DataFrame(rows, columns=["condition", "part"])


def covariate_groups(run: Run) -> pd.DataFrame:
    """Covariate group of each held-out condition: columns condition and part."""
    conditions = run.scores.drop_duplicates("cov_pert")
    groups = conditions[run.covariates].astype(str).agg(", ".join, axis=1) if run.covariates else "all"
    return pd.DataFrame({"condition": conditions["cov_pert"], "part": groups}).reset_index(drop=True)


def _reference_distance(run: Run, name: str) -> pd.Series:
    """Energy distance of a reference's cells from the observed ones by condition; empty if it was not scored."""
    rows = run.references[run.references["model"] == name]
    for metric in DISTANCES:
        values = rows[rows["metric"] == metric].set_index("cov_pert")["value"].dropna()
        if len(values):
            return values
    return pd.Series(dtype=float)


def _combinations(run: Run) -> set[str]:
    """Conditions of several perturbations."""
    delimiter = run.columns.get("perturbation_combination_delimiter")
    control = run.columns["perturbation_control_value"]
    labels = run.scores["perturbation"].astype(str)
    joined = [len(split_label(label, delimiter, control)) > 1 for label in labels]
    return set(run.scores.loc[joined, "cov_pert"])


def _unseen_covariate(run: Run) -> list[str]:
    """Conditions whose perturbation training saw in other covariate groups only, by the run's split."""
    path, key = run.folder / SPLIT_MAP, run.columns.get("perturbation_key", "")
    if not run.covariates or not path.is_file():
        return []
    split = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {*run.covariates, key, "split"} <= set(split.columns):
        return []
    training = split[split["split"] == "train"]
    labels = set(training[key])
    seen = set(training[[*run.covariates, key]].itertuples(index=False, name=None))
    conditions = run.scores.drop_duplicates("cov_pert").astype(str)
    pairs = conditions[[*run.covariates, "perturbation"]].itertuples(index=False, name=None)
    return [
        condition
        for condition, pair in zip(conditions["cov_pert"], pairs, strict=True)
        if pair[-1] in labels and pair not in seen
    ]
