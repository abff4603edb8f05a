"""The settings of a simulated Perturb-seq screen, validated."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from numbers import Real

from primeflow_perturbench.errors import InputError, nearest

# Increase it when the same spec gives other cells or has other names: files of another version are simulated again.
VERSION = 2
MINIMUM = {
    **dict.fromkeys(("n_genes", "programs_per_gene", "n_perturbations", "n_batches"), 1),
    **dict.fromkeys(("seed", "n_pairs", "cells_per_condition", "control_cells_per_line", "effect_size"), 0),
    **dict.fromkeys(("expression_spread", "library_spread", "dispersion", "housekeeping_dispersion"), 0),
    **dict.fromkeys(("line_strength", "interaction_strength", "cell_strength", "batch_strength"), 0),
    "n_programs": 2,
}


@dataclasses.dataclass(frozen=True)
class ScreenSpec:
    """Settings of a simulated screen.

    A strength is a root mean square over the genes that load on programs, in units of the natural logarithm of
    expression: a strength of 0.7 doubles or halves a typical gene.

    Parameters
    ----------
    seed
        Random seed of the truth and of the cells.
    n_genes
        Genes in the panel. The targets of the perturbations come first: ``G0``, ``G1``, ..., ``gene12``, ...
    n_programs
        Gene programs.
    programs_per_gene
        Programs that a gene loads on.
    n_perturbations
        Single perturbations, ``G0`` to ``G{n - 1}``. If there are more than genes, the targets of the last ones are
        not measured.
    n_pairs
        Pairs of perturbations that the screen measures.
    cell_lines
        Names of the cell lines.
    cells_per_condition
        Cells per cell line and perturbation.
    control_cells_per_line
        Control cells per cell line.
    expression_spread
        Standard deviation of the log expression of the genes.
    line_strength
        Strength of the difference between the baselines of cell lines. Half of its variance is along programs.
    effect_size
        Strength of a single perturbation in the cells that respond.
    context_specificity
        Share of the squared effect of a perturbation that is specific to each cell line, 0 to 1. Responder fractions
        differ between lines by the same share.
    interaction_strength
        Norm of the interaction of a pair, relative to the norm of the sum of the effects of its parts. Half of its
        square is along the sum (synergy) or against it (epistasis), the other half in another direction.
    responder_fraction
        Smallest and largest fraction of cells that respond to a perturbation. The others escape: they equal controls.
        In a pair each of the two takes effect independently.
    knockdown
        Share of the expression of the target gene that is left in the cells that respond.
    cell_strength
        Strength of the variation of programs between the cells of a condition.
    dispersion
        Dispersion a of the counts: variance = mean + a * mean ** 2.
    library_median
        Median of the counts of a cell over the panel.
    library_spread
        Standard deviation of the natural logarithm of the library size.
    housekeeping_genes
        Share of the genes, the last ones of the panel, that are housekeeping genes: high, even and independent of
        programs. They stand for the thousands of genes outside the panel, which stabilize the total of a cell.
    housekeeping_counts
        Share of the counts that falls on them.
    housekeeping_dispersion
        Their dispersion.
    n_batches
        Batches. Each cell is in a random one.
    batch_strength
        Strength of the batch effect on each gene, the same in all cell lines.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    seed: int = 0
    n_genes: int = 200
    n_programs: int = 8
    programs_per_gene: int = 2
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
        """Convert sequences to tuples, since configs contain lists, and check all values."""
        for name in ("cell_lines", "responder_fraction"):
            self._check(name, not isinstance(getattr(self, name), (str, Real)), "a list")
        object.__setattr__(self, "cell_lines", tuple(str(line) for line in self.cell_lines))
        object.__setattr__(self, "responder_fraction", tuple(float(f) for f in self.responder_fraction))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in (int, float):
                finite = isinstance(value, Real) and math.isfinite(value)
                self._check(
                    field.name, finite and kind(value) == value, "a whole number" if kind is int else "a number"
                )
                # One type per field, so that 1500 and 1500.0 give the same spec.
                object.__setattr__(self, field.name, kind(value))
        for name, minimum in MINIMUM.items():
            self._check(name, getattr(self, name) >= minimum, f"at least {minimum}")
        for name in ("context_specificity", "knockdown"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        for name in ("housekeeping_genes", "housekeeping_counts"):
            self._check(name, 0 <= getattr(self, name) < 1, "a share of at least 0 and below 1")
        n_possible = self.n_perturbations * (self.n_perturbations - 1) // 2
        self._check("n_pairs", self.n_pairs <= n_possible, f"at most {n_possible}, all pairs of the perturbations")
        expected = f"at least programs_per_gene={self.programs_per_gene}"
        self._check("n_programs", self.n_programs >= self.programs_per_gene, expected)
        self._check("library_median", self.library_median > 0, "above 0")
        unique = len(set(self.cell_lines)) == len(self.cell_lines)
        self._check("cell_lines", bool(self.cell_lines) and unique, "one or more different names")
        fractions = self.responder_fraction
        ordered = len(fractions) == 2 and 0 <= fractions[0] <= fractions[1] <= 1
        self._check("responder_fraction", ordered, "two fractions between 0 and 1, the smaller first")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"simulated screen, {name}: found {getattr(self, name)!r}, expected {expected}.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> ScreenSpec:
        """Build a spec from a config; `InputError` if a name does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                match = nearest(name, names)
                hint = f"did you mean {match!r}?" if match else f"the settings are {', '.join(names)}."
                raise InputError(f"simulated screen: found the unknown setting {name!r}; {hint}")
        return cls(**values)

    def to_json(self) -> str:
        """Return spec and version of the simulator as JSON with sorted keys. Equal text means equal cells."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)
