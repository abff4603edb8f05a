"""How well means of held-out conditions are predicted, and what the errors are worth in energy distance.

    python benchmarks/means.py --cells cells.h5ad --split split.csv

Fits the linear mixed model of `calibration.mixed_model` to the training cells as it is and in the ways of `VARIANTS`,
which were
tried and not kept, and sets the mean of the line's perturbed and control training cells beside it. Errors are squared
distances in gene space: of training conditions when each is left out, in units of a cell's variance; of held-out ones
to the mean of the measured cells, less what so few cells are off by. In high dimensions a mean that is off by d adds
about ``|d|^2 / 2 E|y - y'|`` to an energy distance. Writes ``benchmarks/results/means.{json,md}``.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from rich.console import Console
from torch import Tensor

from primeflow_perturbench.calibration.mixed_model import (
    CONDITIONS_EACH,
    MOST_COMPONENTS,
    ConditionSurvey,
    Layout,
    cell_spread,
    choose_components,
)
from primeflow_perturbench.conditions.condition import ConditionEncoder
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, versions

RESULTS = Path(__file__).parent / "results"


class Variant(NamedTuple):
    """The mixed model of transformed means, a perturbation of a pair counting n^-weaker."""

    forward: Callable[[Tensor], Tensor] = lambda mean: mean
    back: Callable[[Tensor], Tensor] = lambda value: value
    weaker: float = 0.0


VARIANTS = {
    "mixed model, as it is": Variant(),
    "pairs weaker than the sum of their parts (n^-0.15)": Variant(weaker=0.15),
    "pairs weaker than the sum of their parts (n^-0.3)": Variant(weaker=0.3),
    "square roots of means": Variant(lambda m: (m + 0.1).sqrt(), lambda z: z.clamp(min=0.1**0.5) ** 2 - 0.1),
    "logarithms of means": Variant(lambda m: (m + 0.1).log(), lambda z: z.exp() - 0.1),
}


class Cells(NamedTuple):
    """Expression (N, G), lines, conditions and parts of the split (N,)."""

    x: np.ndarray
    line: np.ndarray
    condition: np.ndarray
    part: np.ndarray

    @classmethod
    def read(cls, cells: Path, split: Path) -> "Cells":
        """Cells of an h5ad with columns condition and cell_type, and a split file."""
        adata = ad.read_h5ad(cells)
        x = np.asarray(adata.X.toarray() if sp.issparse(adata.X) else adata.X, dtype=np.float32)
        part = pd.read_csv(split, header=None, index_col=0)[1].reindex(adata.obs_names)
        columns = (adata.obs[name].astype(str).to_numpy() for name in ("cell_type", "condition"))
        return cls(x, *columns, part.to_numpy())

    def of(self, part: str, line: str, condition: str) -> np.ndarray:
        """Cells (n, G) of a condition in one part of the split."""
        return self.x[(self.part == part) & (self.line == line) & (self.condition == condition)]

    def heldout(self) -> list[tuple[str, str]]:
        """Lines and perturbations that are tested."""
        tested = (self.part == "test") & (self.condition != "control")
        return sorted(set(zip(self.line[tested], self.condition[tested], strict=True)))

    def vectors(self, pairs: list[tuple[str, str]], weaker: float) -> tuple[Tensor, ConditionEncoder]:
        """Condition vectors (M, C) of lines and conditions, and what made them."""
        genes = sorted({part for label in set(self.condition) for part in label.split("+")} - {"control"})
        lines = sorted(set(self.line))
        hot = torch.tensor([[float(gene in label.split("+")) for gene in genes] for _, label in pairs])
        hot = hot * hot.sum(1, keepdim=True).clamp(min=1) ** -weaker
        encoder = ConditionEncoder(len(genes), {"cell_type": lines})
        of_line = torch.tensor([[float(line == name) for name in lines] for line, _ in pairs])
        return encoder(hot, {"cell_type": of_line}), encoder


def predict(cells: Cells, heldout: list[tuple[str, str]], variant: Variant) -> tuple[float, np.ndarray]:
    """Error that is left of training conditions that are left out, and means (M, G) of held-out ones."""
    training = np.flatnonzero(cells.part == "train")
    pairs = list(zip(cells.line[training], cells.condition[training], strict=True))
    known = sorted(set(pairs))
    vectors, encoder = cells.vectors(known, variant.weaker)
    row = {pair: number for number, pair in enumerate(known)}
    survey = ConditionSurvey()
    survey.add(vectors[[row[pair] for pair in pairs]], torch.tensor(cells.x[training]))
    conditions, means, counts = survey.tensors()
    layout, exact = Layout.of(encoder, conditions), conditions.double()
    spread = cell_spread(layout, exact, survey.scatter(), counts)
    noise, perturbed = spread / counts, layout.split(conditions)[0].ne(0).any(1)
    weight = torch.where(perturbed, 1 / spread, 0.0)
    values = variant.forward(means)
    centre = values.mean(0)
    # In units of the means themselves, in which noise is measured.
    unit = (values - centre).square().sum().sqrt() / (means - means.mean(0)).square().sum().sqrt()
    rest = (values - centre) / unit
    effects = torch.stack(list(layout.effects(exact, exact)))
    most = min(MOST_COMPONENTS, int(perturbed.sum()) // CONDITIONS_EACH)
    directions = torch.linalg.svd(rest / spread.sqrt()[:, None], full_matrices=False).Vh[:most]
    components, variances = choose_components(effects, rest, noise, weight, directions)
    scores = rest @ components.T
    parts = [*(s[:, None] * c for s, c in zip(scores.T, components, strict=True)), rest - scores @ components]
    asked = cells.vectors(heldout, variant.weaker)[0].double()
    left_out, predicted = torch.zeros_like(rest), torch.zeros(len(asked), rest.shape[1], dtype=rest.dtype)
    for of_part, part in zip(variances.tolist(), parts, strict=True):
        inverse = torch.linalg.inv(layout.kernel(exact, exact, of_part) + torch.diag(noise))
        left_out += part - (inverse @ part) / inverse.diagonal()[:, None]
        predicted += layout.kernel(asked, exact, of_part) @ inverse @ part
    off = variant.back(left_out * unit + centre).clamp(min=0) - means
    return float((off.square().sum(1) * weight).sum()), variant.back(predicted * unit + centre).clamp(min=0).numpy()


def errors(cells: Cells, heldout: list[tuple[str, str]], predicted: np.ndarray) -> dict[str, dict[str, float]]:
    """Squared error of each held-out mean, and its worth in energy distance."""
    found = {}
    for (line, label), mean in zip(heldout, predicted, strict=True):
        y = cells.of("test", line, label)
        variance = float(y.var(0, ddof=1).sum())
        error = float(((mean - y.mean(0)) ** 2).sum() - variance / len(y))
        found[f"{line}/{label}"] = {"squared_error": error, "energy_distance": error / (2 * (2 * variance) ** 0.5)}
    return found


def measure(cells: Cells) -> dict[str, dict]:
    """Rows by name: ``left_out``, where it is a model's, and ``heldout`` by condition."""
    heldout = cells.heldout()
    rows = {}
    for name, variant in VARIANTS.items():
        left_out, predicted = predict(cells, heldout, variant)
        rows[name] = {"left_out": left_out, "heldout": errors(cells, heldout, predicted)}
    for name, of_controls in (("perturbed training cells of the line", False), ("its training controls", True)):
        means = [
            cells.x[(cells.part == "train") & (cells.line == line) & ((cells.condition == "control") == of_controls)]
            for line, _ in heldout
        ]
        rows[name] = {"heldout": errors(cells, heldout, np.stack([of_line.mean(0) for of_line in means]))}
    return rows


def shared(cells: Cells) -> dict[str, dict[str, float]]:
    """Inner product of what a perturbation does in its held-out line with what it does in others, in squared length.

    Against the perturbed training cells of each line; ``own`` is the squared length in the held-out line itself, less
    what so few cells are off by.
    """
    usual = {
        line: cells.x[(cells.part == "train") & (cells.line == line) & (cells.condition != "control")].mean(0)
        for line in set(cells.line)
    }
    found = {}
    for line, label in cells.heldout():
        y = cells.of("test", line, label)
        effect = y.mean(0) - usual[line]
        row = {"own": float(effect @ effect - y.var(0, ddof=1).sum() / len(y))}
        for other in sorted(set(cells.line) - {line}):
            if len(there := cells.of("train", other, label)):
                row[other] = float(effect @ (there.mean(0) - usual[other]))
        found[f"{line}/{label}"] = row
    return found


def as_markdown(rows: dict[str, dict]) -> str:
    """A column a held-out condition, worth of its error in energy distance, and their mean."""
    conditions = list(next(iter(rows.values()))["heldout"])
    lines = ["| means by | left out | " + " | ".join(conditions) + " | mean |", "|---" * (len(conditions) + 3) + "|"]
    for name, row in rows.items():
        worth = [row["heldout"][condition]["energy_distance"] for condition in conditions]
        shown = [f"{value:.3f}" for value in [*worth, statistics.mean(worth)]]
        left_out = f"{row['left_out']:.0f}" if "left_out" in row else ""
        lines.append(f"| {name} | {left_out} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="h5ad with columns condition and cell_type")
    parser.add_argument("--split", type=Path, required=True, help="headerless CSV of cell and split")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    chosen = parser.parse_args()
    cells = Cells.read(chosen.cells, chosen.split)
    rows = measure(cells)
    chosen.output.mkdir(parents=True, exist_ok=True)
    record = {"rows": rows, "shared": shared(cells), "hardware": hardware(), "versions": versions(), "commit": commit()}
    write_json(chosen.output / "means.json", record)
    (chosen.output / "means.md").write_text(as_markdown(rows))
    Console().print(as_markdown(rows))


if __name__ == "__main__":
    main()
