"""Score predicted cells by a challenge's own library, each row of the table in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from primeflow_perturbench.data.checks import check_anndata, read_h5ad, require
from primeflow_perturbench.errors import InputError, quoted
from primeflow_perturbench.evaluation.challenge.profiles import PREDICTION, PROFILES, ROWS, Profile, average
from primeflow_perturbench.files import replacing

CHILD = "primeflow_perturbench.evaluation.challenge.child"


@dataclass(frozen=True)
class ChallengeTable:
    """What a profile says of a prediction.

    Attributes
    ----------
    profile
        The profile.
    values
        Metrics by row and name; a row that failed is not there.
    per_condition
        Columns row, perturbation, metric and value.
    failures
        Rows that failed, with the reason.
    """

    profile: Profile
    values: dict[str, dict[str, float]]
    per_condition: pd.DataFrame
    failures: dict[str, str]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Scores by row and metric, see `Profile.scores`."""
        return self.profile.scores(self.values)

    def frame(self) -> pd.DataFrame:
        """A row for each row and metric: row, metric, label, value and score, with the average score as a metric."""
        scores, lines = self.scores, []
        for row, values in self.values.items():
            of_row = scores.get(row, {})
            lines += [(row, m.name, m.label, values[m.name], of_row.get(m.name)) for m in self.profile.metrics]
            lines.append((row, "average", "average score", None, average(of_row)))
        return pd.DataFrame(lines, columns=["row", "metric", "label", "value", "score"])


def evaluate_profile(
    predicted: str,
    measured: str,
    columns: Mapping[str, Any],
    profile: str,
    console: Console,
    *,
    layers: tuple[str | None, str | None] = (None, None),
    synthetic_controls: bool = False,
    timeout: float = 3600.0,
    seed: int = 0,
    output: str | None = None,
) -> ChallengeTable:
    """Score a file of predicted cells against a file of measured ones, print the table, save it under ``output``.

    Beside the prediction stand the mean of the measured perturbations, one half of the measured cells against the
    other, and the measured cells themselves.

    Parameters
    ----------
    columns
        Names of the perturbation column and of the control, by their keys in a training context.
    profile
        Key of `PROFILES`.
    layers
        Layers of the predicted and the measured file that hold the expression, ``None`` for X.
    synthetic_controls
        Whether predicted control cells are kept; otherwise the measured ones take their place.
    timeout
        Seconds for each row.
    seed
        Seed of the baseline and of the halves.

    Raises
    ------
    InputError
        If the library is not installed, the files do not fit, or the prediction's own row fails; the others' failures
        are said and leave the table without them.
    """
    chosen = PROFILES[profile]
    refuse_without(chosen)
    key, control = columns["perturbation_key"], columns["perturbation_control_value"]
    cells = [
        read_cells(name, layer, columns, chosen, with_controls=place == 1 or synthetic_controls)
        for place, (name, layer) in enumerate(zip((predicted, measured), layers, strict=True))
    ]
    pair = aligned(*cells, (predicted, measured), key, control, synthetic_controls)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.h5ad") for name in ("predicted", "measured")}
        for file, adata in zip(files.values(), pair, strict=True):
            adata.write_h5ad(file)
        job = {**files, "profile": profile, "perturbation_key": key, "control": control, "seed": seed}
        table = score_rows(chosen, job, Path(folder), timeout, console)
    for row, reason in table.failures.items():
        if row != PREDICTION:
            console.print(f"[yellow]warning:[/yellow] {chosen.name}, row {row!r}: {reason}", highlight=False)
    if table.values:
        console.print(rich_table(table))
    if output is not None:
        save(table, Path(output))
    if PREDICTION in table.failures:
        raise InputError(f"{chosen.name} could not score {predicted}: {table.failures[PREDICTION]}")
    return table


def refuse_without(profile: Profile) -> None:
    """Raise `InputError` if a module that a profile needs is not installed."""
    missing = [module for module in profile.modules if find_spec(module) is None]
    if missing:
        raise InputError(
            f"--profile {profile.name} needs {profile.library}, but the module {missing[0]} is not installed: "
            "pip install 'primeflow-perturbench[vcc]'"
        )


def read_cells(
    path: str, layer: str | None, columns: Mapping[str, Any], profile: Profile, with_controls: bool
) -> ad.AnnData:
    """Cells with nothing but their expression and their perturbation, checked to be what the profile expects."""
    adata = read_h5ad(path)
    key, control = columns["perturbation_key"], columns["perturbation_control_value"]
    findings = check_anndata(
        adata,
        filename=path,
        perturbation_key=key,
        perturbation_control_value=control,
        perturbation_combination_delimiter=None,
        expect=profile.expression,
        layer=layer,
    )
    require(finding for finding in findings if with_controls or finding.expected != "control cells")
    obs = pd.DataFrame({key: pd.Categorical(adata.obs[key].astype(str))}, index=adata.obs_names.astype(str))
    matrix = adata.X if layer is None else adata.layers[layer]
    return ad.AnnData(sp.csr_matrix(matrix, dtype="float32"), obs=obs, var=pd.DataFrame(index=adata.var_names))


def aligned(
    predicted: ad.AnnData, measured: ad.AnnData, names: tuple[str, str], key: str, control: str, synthetic: bool
) -> tuple[ad.AnnData, ad.AnnData]:
    """Both files with the measured one's genes in its order and the same perturbations, controls by `synthetic`.

    Raises
    ------
    InputError
        If a gene or a perturbation is in one of them alone.
    """
    for what, of in (("gene", lambda cells: cells.var_names), ("perturbation", lambda cells: cells.obs[key].unique())):
        sets = [{str(name) for name in of(cells)} - {control} for cells in (predicted, measured)]
        for has, lacks in ((0, 1), (1, 0)):
            if more := sorted(sets[has] - sets[lacks]):
                raise InputError(
                    f"{names[has]} has {len(more)} {what}{'' if len(more) == 1 else 's'} that {names[lacks]} lacks, "
                    f"{quoted(more)}; a challenge scores the same {what}s on both sides"
                )
    predicted = predicted[:, measured.var_names]
    if not synthetic:
        perturbed, controls = (predicted.obs[key] != control).to_numpy(), (measured.obs[key] == control).to_numpy()
        parts = [predicted[perturbed], measured[controls]]
        predicted = ad.concat(parts, index_unique="-", join="inner")
    return predicted.copy(), measured


def score_rows(
    profile: Profile, job: Mapping[str, Any], folder: Path, timeout: float, console: Console
) -> ChallengeTable:
    """Score every row of the table, one after another."""
    values, failures, per_condition = {}, {}, []
    for number, row in enumerate(ROWS):
        with console.status(f"Scoring {row} with {profile.library}"):
            place = folder / str(number)
            place.mkdir()
            answer = in_child({**job, "row": row, "folder": str(place), "threads": os.cpu_count() or 1}, place, timeout)
        if "error" in answer:
            failures[row] = answer["error"]
            continue
        values[row] = answer["values"]
        per_condition += [{"row": row, **each} for each in answer["per_condition"]]
    columns = ["row", "perturbation", "metric", "value"]
    return ChallengeTable(profile, values, pd.DataFrame(per_condition, columns=columns), failures)


def in_child(job: Mapping[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """The child's answer, or ``{"error": sentence}`` if it ran out of time or ended without one."""
    request, result, log = folder / "job.json", folder / "answer.json", folder / "log.txt"
    request.write_text(json.dumps({**job, "output": str(result)}))
    with log.open("wb") as file:
        # A session of its own, so that the workers that a library starts end with it.
        command = [sys.executable, "-m", CHILD, str(request)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:g} seconds; give more with --timeout, or fewer cells"}
        finally:
            end_group(child)
    if result.is_file():
        return json.loads(result.read_text())
    if status < 0:
        return {"error": f"the process was ended by {signal.Signals(-status).name}; memory may not have sufficed"}
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"error": f"the process ended with status {status}: {lines[-1] if lines else 'it said nothing'}"}


def end_group(child: subprocess.Popen) -> None:
    """End a child and all that it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()


def rich_table(table: ChallengeTable) -> Table:
    """The table for a terminal: a line for each metric, value and score in brackets of each row."""
    scores, profile = table.scores, table.profile
    one = "the best value" if profile.one == "perfect" else f"the {profile.one}"
    shown = Table(title=f"{profile.name} ({profile.library}): value (score; 0 the mean baseline, 1 {one})")
    shown.add_column("metric", no_wrap=True)
    for row in table.values:
        shown.add_column(row, justify="right", no_wrap=True)
    for metric in profile.metrics:
        cells = []
        for row, values in table.values.items():
            score = scores.get(row, {}).get(metric.name)
            cells.append(f"{values[metric.name]:.3f}" + ("" if score is None else f" ({score:.2f})"))
        shown.add_row(f"{metric.label} {'↑' if metric.best else '↓'}", *cells)
    if scores:
        shown.add_section()
        shown.add_row("average score", *(f"{average(scores[row]):.3f}" for row in table.values))
    return shown


def save(table: ChallengeTable, folder: Path) -> None:
    """Write ``PROFILE.csv``, ``PROFILE.json`` and ``PROFILE_per_condition.csv``."""
    name = table.profile.name
    with replacing(folder / f"{name}.csv") as temporary:
        table.frame().to_csv(temporary, index=False)
    with replacing(folder / f"{name}_per_condition.csv") as temporary:
        table.per_condition.to_csv(temporary, index=False)
    whole = {
        "profile": name,
        "library": table.profile.library,
        "values": table.values,
        "scores": table.scores,
        "failures": table.failures,
    }
    with replacing(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(without_nan(whole), indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """Nested dictionaries with ``None`` for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value
