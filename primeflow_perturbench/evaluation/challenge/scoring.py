"""Score predicted cells with a challenge's own library, each row of the table in a separate process."""

import json
import math
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

from primeflow_perturbench.console import flagged
from primeflow_perturbench.data.checks import check_anndata, read_h5ad, require
from primeflow_perturbench.errors import InputError, counted, quoted
from primeflow_perturbench.evaluation.challenge.profiles import PERFECT, PREDICTION, PROFILES, ROWS, Profile, average
from primeflow_perturbench.files import replacing, write_json

CHILD = "primeflow_perturbench.evaluation.challenge.child"


@dataclass(frozen=True)
class ChallengeTable:
    """Metrics of a prediction and of the rows beside it.

    Attributes
    ----------
    profile
        The profile.
    values
        Metrics by row and name, without the rows that failed.
    per_condition
        Columns row, perturbation, metric and value.
    failures
        Error of each row that failed.
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
        """One row per row and metric: row, metric, label, value and score; the average score counts as a metric."""
        lines = []
        for row, values in self.values.items():
            scores = self.scores.get(row, {})
            lines += [(row, m.name, m.label, values[m.name], scores.get(m.name)) for m in self.profile.metrics]
            lines.append((row, "average", "average score", None, average(scores)))
        return pd.DataFrame(lines, columns=["row", "metric", "label", "value", "score"])


# Long because its docstring describes every parameter; the body reads straight through.
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
    """Score a file of predicted cells against a file of measured ones, and print and save the table.

    The other rows of the table are the mean of the measured perturbations, one half of the measured cells against the
    other, and the measured cells themselves.

    Parameters
    ----------
    predicted, measured
        Paths of h5ad files.
    columns
        ``perturbation_key`` and ``perturbation_control_value``.
    profile
        Key of `PROFILES`.
    console
        Prints the table.
    layers
        Layers of the predicted and the measured file with the expression; ``None`` for X.
    synthetic_controls
        Whether predicted control cells are kept; otherwise the measured ones replace them.
    timeout
        Seconds for each row.
    seed
        Seed of the baseline and of the halves.
    output
        Folder of the saved table; ``None`` does not save.

    Raises
    ------
    InputError
        If the library is not installed, the files do not match, or the row of the prediction fails. Other rows that
        fail are left out with a warning.
    """
    chosen = PROFILES[profile]
    check_installed(chosen)
    key, control = columns["perturbation_key"], columns["perturbation_control_value"]
    cells = [
        read_cells(predicted, layers[0], columns, chosen, with_controls=synthetic_controls),
        read_cells(measured, layers[1], columns, chosen, with_controls=True),
    ]
    pair = align(*cells, (predicted, measured), key, control, synthetic_controls)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.h5ad") for name in ("predicted", "measured")}
        for file, adata in zip(files.values(), pair, strict=True):
            adata.write_h5ad(file)
        job = {**files, "profile": profile, "perturbation_key": key, "control": control, "seed": seed}
        table = score_rows(chosen, job, Path(folder), timeout, console)
    for row, reason in table.failures.items():
        if row != PREDICTION:
            console.print(flagged("warning", f"{chosen.name}, row {row!r}: {reason}"))
    if table.values:
        console.print(rich_table(table))
    if output is not None:
        save(table, Path(output))
    if PREDICTION in table.failures:
        raise InputError(f"{chosen.name} could not score {predicted}: {table.failures[PREDICTION]}")
    return table


def check_installed(profile: Profile) -> None:
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
    """Cells with their expression and perturbation alone, checked to contain what the profile expects."""
    adata = read_h5ad(path, layer=layer)
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


def align(
    predicted: ad.AnnData, measured: ad.AnnData, names: tuple[str, str], key: str, control: str, synthetic: bool
) -> tuple[ad.AnnData, ad.AnnData]:
    """Both files with the genes of the measured one in its order, and its control cells unless ``synthetic``.

    Raises
    ------
    InputError
        If only one of them has a gene or a perturbation.
    """
    pairs = {
        "gene": [set(map(str, cells.var_names)) for cells in (predicted, measured)],
        "perturbation": [set(cells.obs[key].unique()) - {control} for cells in (predicted, measured)],
    }
    for what, sets in pairs.items():
        for has, lacks in ((0, 1), (1, 0)):
            if more := sorted(sets[has] - sets[lacks]):
                raise InputError(
                    f"{names[has]} has {counted(more, what)} that {names[lacks]} lacks, {quoted(more)}; a challenge "
                    f"scores the same {what}s on both sides"
                )
    predicted = predicted[:, measured.var_names]
    if not synthetic:
        perturbed, controls = (predicted.obs[key] != control).to_numpy(), (measured.obs[key] == control).to_numpy()
        predicted = ad.concat([predicted[perturbed], measured[controls]], index_unique="-", join="inner")
    return predicted.copy(), measured


def score_rows(
    profile: Profile, job: Mapping[str, Any], folder: Path, timeout: float, console: Console
) -> ChallengeTable:
    """Score the rows of the table one after another."""
    values, failures, per_condition = {}, {}, []
    for number, row in enumerate(ROWS):
        with console.status(f"Scoring {row} with {profile.library}"):
            place = folder / str(number)
            place.mkdir()
            answer = run_child(
                {**job, "row": row, "folder": str(place), "threads": os.cpu_count() or 1}, place, timeout
            )
        if "error" in answer:
            failures[row] = answer["error"]
            continue
        values[row] = answer["values"]
        per_condition += [{"row": row, **each} for each in answer["per_condition"]]
    columns = ["row", "perturbation", "metric", "value"]
    return ChallengeTable(profile, values, pd.DataFrame(per_condition, columns=columns), failures)


def run_child(job: Mapping[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Answer of a child process, or ``{"error": sentence}`` if it runs out of time or ends without one."""
    request, result, log = folder / "job.json", folder / "answer.json", folder / "log.txt"
    write_json(request, {**job, "output": str(result)})
    with log.open("wb") as file:
        # In a session of its own, so that processes that the library starts end with it.
        command = [sys.executable, "-m", CHILD, str(request)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:g} seconds; allow more with --timeout, or use fewer cells"}
        finally:
            _kill_session(child)
    if result.is_file():
        return json.loads(result.read_text())
    if status < 0:
        return {"error": f"the process was killed by {signal.Signals(-status).name}, perhaps for lack of memory"}
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"error": f"the process ended with status {status}: {lines[-1] if lines else 'without output'}"}


def _kill_session(child: subprocess.Popen) -> None:
    """Kill a child and all processes that it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()


def rich_table(table: ChallengeTable) -> Table:
    """Table for the terminal: one line per metric with the value, and the score in brackets, of each row."""
    scores, profile = table.scores, table.profile
    one = "the best value" if profile.one == PERFECT else f"the {profile.one}"
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
    """Write PROFILE.csv, PROFILE_per_condition.csv and PROFILE.json."""
    name = table.profile.name
    for stem, frame in ((name, table.frame()), (f"{name}_per_condition", table.per_condition)):
        with replacing(folder / f"{stem}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    content = {
        "profile": name,
        "library": table.profile.library,
        "values": _without_nan(table.values),
        "scores": _without_nan(table.scores),
        "failures": table.failures,
    }
    write_json(folder / f"{name}.json", content)


def _without_nan(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """The same numbers with ``None`` for NaN, which JSON does not have."""
    return {row: {key: None if math.isnan(x) else x for key, x in of.items()} for row, of in rows.items()}
