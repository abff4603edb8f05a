"""Which conditions can be scored: one rule for the start of a run, for its end and for `primeflow evaluate`.

A condition needs `LEAST` cells, and as many control cells with the same covariates: its scores compare variances.
Controls need not be repeated for each value of a numeric covariate such as a dose: those with the same categorical
covariates and the nearest numbers serve a group that has none of its own.
"""

from collections.abc import Collection, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from primeflow_perturbench.errors import InputError, counted, quoted

LEAST = 2
Group = tuple[Any, ...]


def rows_by_group(obs: pd.DataFrame, columns: Mapping[str, Any]) -> dict[Group, dict[str, np.ndarray]]:
    """Positions of the cells of each label in each covariate group; ``columns`` as of `score.data_columns`."""
    labels = obs[columns["perturbation_key"]].astype(str).to_numpy()
    keys = [obs[key].to_numpy() for key in columns["covariate_keys"]]
    groups = pd.Series(list(zip(*keys, strict=True)) if keys else [()] * len(obs), dtype=object)
    return {
        group: pd.Series(rows).groupby(labels[rows]).apply(np.asarray).to_dict()
        for group, rows in groups.groupby(groups, sort=False).indices.items()
    }


def lenders(obs: pd.DataFrame, columns: Mapping[str, Any]) -> dict[Group, Group]:
    """The group whose controls serve each group that has perturbed cells and no controls, where there is one."""
    keys, control = columns["covariate_keys"], columns["perturbation_control_value"]
    numeric = np.array([pd.api.types.is_numeric_dtype(obs[key]) for key in keys], dtype=bool)
    found = rows_by_group(obs, columns)
    own = [group for group, rows in found.items() if control in rows]

    def split(group: Group) -> tuple[Group, np.ndarray]:
        names = tuple(value for value, number in zip(group, numeric, strict=True) if not number)
        return names, np.array([value for value, number in zip(group, numeric, strict=True) if number], dtype=float)

    result = {}
    for group in found:
        names, numbers = split(group)
        near = [other for other in own if split(other)[0] == names]
        if control not in found[group] and near:
            result[group] = min(near, key=lambda other: float(np.abs(split(other)[1] - numbers).sum()))
    return result


def with_lent_controls(cells: ad.AnnData, columns: Mapping[str, Any]) -> ad.AnnData:
    """The cells, with copies of the controls that serve groups without any; see the module docstring."""
    lent, found = lenders(cells.obs, columns), rows_by_group(cells.obs, columns)
    if not lent:
        return cells
    copies = []
    for number, (group, lender) in enumerate(lent.items()):
        copy = cells[found[lender][columns["perturbation_control_value"]]].copy()
        copy.obs_names = [f"{name}-{number}" for name in copy.obs_names]
        for key, value in zip(columns["covariate_keys"], group, strict=True):
            copy.obs[key] = pd.Series(value, index=copy.obs.index, dtype=cells.obs[key].dtype)
        copies.append(copy)
    return ad.concat([cells, *copies], merge="same")


def unscorable(obs: pd.DataFrame, columns: Mapping[str, Any]) -> dict[tuple[Group, str], str]:
    """What conditions (group, label) have too few of to be scored, "controls" or "cells"; empty if all can be."""
    control, lent, found = columns["perturbation_control_value"], lenders(obs, columns), rows_by_group(obs, columns)
    lacking = {}
    for group, rows in found.items():
        controls = len(found[lent.get(group, group)].get(control, ()))
        for label in set(rows) - {control}:
            if controls < LEAST:
                lacking[group, label] = "controls"
            elif len(rows[label]) < LEAST:
                lacking[group, label] = "cells"
    return lacking


def without(cells: ad.AnnData, columns: Mapping[str, Any], left_out: Collection[tuple[Group, str]]) -> ad.AnnData:
    """The cells without those of some conditions (group, label), matched as text."""
    names = {(*map(str, group), label) for group, label in left_out}
    keys = [cells.obs[key].astype(str) for key in (*columns["covariate_keys"], columns["perturbation_key"])]
    return cells[np.array([row not in names for row in zip(*keys, strict=True)])]


def described(group: Group) -> str:
    """A covariate group in messages."""
    return ", ".join(map(str, group)) if group else "(all cells)"


def check_scorable(obs: pd.DataFrame, columns: Mapping[str, Any], split: str) -> None:
    """Raise `InputError` if conditions of a split could be generated but not scored for want of controls.

    Parameters
    ----------
    obs
        The cells of the split.
    columns
        Names of the columns and of the control.
    split
        Name of the split in messages.
    """
    lacking = unscorable(obs, columns)
    groups = sorted({described(group) for (group, _), what in lacking.items() if what == "controls"})
    if groups:
        raise InputError(
            f"the {split} split has perturbed cells but fewer than {LEAST} control cells in "
            f"{counted(groups, 'covariate group')}, {quoted(groups)}, so that they could not be scored after training; "
            "lower data.splitter.train_control_fraction, give more control cells or another split, or set test=false"
        )
    control = columns["perturbation_control_value"]
    conditions = [key for rows in rows_by_group(obs, columns).values() for key in rows if key != control]
    if conditions and len(lacking) == len(conditions):
        raise InputError(
            f"no condition of the {split} split has {LEAST} cells, so that none could be scored; hold out conditions "
            "with more cells, or set test=false"
        )
