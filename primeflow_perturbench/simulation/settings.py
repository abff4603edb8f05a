"""What a simulated Perturb-seq screen looks like: the settings of ``simulate.py``, checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from numbers import Real

from primeflow_perturbench.errors import InputError

# Raise it whenever the same spec would give other cells: files of another version are drawn anew.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class ScreenSpec:
    """What a simulated screen looks like.

    Strengths are root mean squares over the genes that load on programmes, in units of the natural logarithm
    of expression: a strength of 0.7 is, for a typical gene, a doubling or a halving.

    Parameters
    ----------
    seed
        Seed of the truth and of the cells.
    n_genes
        Genes in the panel. The targets of the perturbations come first: ``G0``, ``G1``, ..., ``gene12``, ...
    n_programmes
        Gene programmes; a gene loads on ``programmes_per_gene`` of them.
    programmes_per_gene
        Programmes a gene loads on.
    n_perturbations
        Single perturbations, ``G0`` to ``G{n - 1}``. The targets of those past the panel are not measured.
    n_pairs
        Pairs of perturbations that the screen measures.
    cell_lines
        Names of the cell lines.
    cells_per_condition
        Cells per cell line and perturbation.
    control_cells_per_line
        Control cells per cell line.
    expression_spread
        Standard deviation of the genes' log expression.
    line_strength
        Strength by which a cell line's baseline differs, half of its variance through programmes.
    effect_size
        Strength of a single perturbation in the cells that respond.
    context_specificity
        Share of a perturbation's squared effect that is its own in each cell line, 0 to 1. The responder
        fraction differs between lines by the same share.
    interaction_strength
        Norm of a pair's interaction over the norm of the sum of its parts' effects. Half of its square lies
        along the sum (synergy) or against it (epistasis), the other half in a direction of the pair's own.
    responder_fraction
        Lowest and highest fraction of cells that respond to a perturbation; the others escape and are as
        controls. In a pair each of the two takes or escapes on its own.
    knockdown
        Share of the target gene's expression that is left in the cells that respond.
    cell_strength
        Strength of the programmes' variation from cell to cell within a condition.
    dispersion
        Dispersion a of the counts: variance = mean + a * mean ** 2.
    library_median
        Median of the counts of a cell over the panel.
    library_spread
        Standard deviation of the natural logarithm of the library size.
    housekeeping_genes
        Share of the genes, the last ones of the panel, that keep house: high, even and untouched by
        programmes. They stand for the thousands of genes that a panel lacks and that steady a cell's total.
    housekeeping_counts
        Share of the counts that falls on them.
    housekeeping_dispersion
        Their dispersion.
    n_batches
        Batches; every condition's cells fall on them evenly at random.
    batch_strength
        Strength of the batch effect, gene by gene, the same in all cell lines.
    """

    seed: int = 0
    n_genes: int = 200
    n_programmes: int = 8
    programmes_per_gene: int = 2
    n_perturbations: int = 12
    n_pairs: int = 6
    cell_lines: tuple[str, ...] = ("alpha", "beta", "gamma")
    cells_per_condition: int = 48
    control_cells_per_line: int = 150
    expression_spread: float = 2.0
    line_strength: float = 0.7
    effect_size: float = 1.6
    context_specificity: float = 0.2
    interaction_strength: float = 0.4
    responder_fraction: tuple[float, float] = (0.7, 0.95)
    knockdown: float = 0.2
    cell_strength: float = 0.3
    dispersion: float = 0.2
    library_median: float = 1500.0
    library_spread: float = 0.35
    housekeeping_genes: float = 0.05
    housekeeping_counts: float = 0.85
    housekeeping_dispersion: float = 0.05
    n_batches: int = 2
    batch_strength: float = 0.05

    def __post_init__(self) -> None:
        """Make sequences tuples (a config gives lists) and refuse what cannot be simulated."""
        for name in ("cell_lines", "responder_fraction"):
            self._require(name, not isinstance(getattr(self, name), (str, Real)), "a list")
        object.__setattr__(self, "cell_lines", tuple(str(line) for line in self.cell_lines))
        object.__setattr__(self, "responder_fraction", tuple(float(f) for f in self.responder_fraction))
        # One type a field, so that 1500 and 1500.0 are one spec.
        a_number = {int: "a whole number", float: "a number"}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in (int, float):
                finite = isinstance(value, Real) and math.isfinite(value)
                self._require(field.name, finite and kind(value) == value, a_number[kind])
                object.__setattr__(self, field.name, kind(value))
        for name in ("n_genes", "n_programmes", "programmes_per_gene", "n_perturbations", "n_batches"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "n_pairs", "cells_per_condition", "control_cells_per_line"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for field in dataclasses.fields(self):
            if field.name.endswith(("_spread", "_strength", "dispersion")) or field.name == "effect_size":
                self._require(field.name, getattr(self, field.name) >= 0, "0 or more")
        for name in ("context_specificity", "knockdown"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        for name in ("housekeeping_genes", "housekeeping_counts"):
            self._require(name, 0 <= getattr(self, name) < 1, "a share from 0 to below 1")
        most = self.n_perturbations * (self.n_perturbations - 1) // 2
        self._require("n_pairs", self.n_pairs <= most, f"at most {most}, all pairs of the perturbations")
        least = max(2, self.programmes_per_gene)
        self._require("n_programmes", self.n_programmes >= least, f"at least {least}")
        self._require("library_median", self.library_median > 0, "above 0")
        unique = len(set(self.cell_lines)) == len(self.cell_lines)
        self._require("cell_lines", bool(self.cell_lines) and unique, "one or more different names")
        fractions = self.responder_fraction
        ordered = len(fractions) == 2 and 0 <= fractions[0] <= fractions[1] <= 1
        self._require("responder_fraction", ordered, "two fractions between 0 and 1, the lower first")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"simulated screen, {name}: found {getattr(self, name)!r}, expected {expected}.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> ScreenSpec:
        """Build a spec from a config, with a sentence for a name that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                mend = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}."
                raise InputError(f"simulated screen: found the unknown setting {name!r}; {mend}")
        return cls(**values)

    def to_json(self) -> str:
        """Spec and simulator version as JSON with sorted keys; equal text means equal cells."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)
