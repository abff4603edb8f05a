"""A simulated Perturb-seq screen whose truth is known.

Genes load on programs, a perturbation moves programs, and counts are negative binomial around the result. Each random
choice has its own random stream, seeded by the names of what it decides. So the truth and the cells of a condition do
not change when other lines, perturbations or pairs are added.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import replacing
from primeflow_perturbench.simulation.settings import VERSION, ScreenSpec

CONTROL = "control"
DELIMITER = "+"
TARGET_SUM = 1e4
UNS_KEY = "simulation"


class Cells(NamedTuple):
    """Simulated cells of one condition."""

    counts: sp.csr_matrix
    """(n_cells, n_genes), int32."""
    responder: np.ndarray
    """Whether at least one perturbation took effect in the cell, (n_cells,), bool."""
    batch: np.ndarray
    """Index of the cell's batch, (n_cells,), int."""


class Screen:
    """The truth of a simulated screen. It draws any number of cells of any condition.

    Parameters
    ----------
    spec
        Settings of the screen; the defaults if None.

    Attributes
    ----------
    gene_names, perturbations, pairs, conditions
        Names; ``conditions`` are the control, the perturbations and the pairs that the screen measures.
    loadings
        Loading of each gene on each program, (n_programs, n_genes).
    """

    def __init__(self, spec: ScreenSpec | None = None):
        self._own_effects = True
        self.spec = spec = ScreenSpec() if spec is None else spec
        n_targets = min(spec.n_perturbations, spec.n_genes)
        self.gene_names = [f"G{i}" if i < n_targets else f"gene{i}" for i in range(spec.n_genes)]
        self.perturbations = [f"G{i}" for i in range(spec.n_perturbations)]
        every = list(itertools.combinations(self.perturbations, 2))
        chosen = sorted(self._stream("pairs").permutation(len(every))[: spec.n_pairs])
        self.pairs = [DELIMITER.join(every[i]) for i in chosen]
        self.conditions = [CONTROL, *self.perturbations, *self.pairs]
        self._housekeeping = np.arange(spec.n_genes) >= spec.n_genes - round(spec.housekeeping_genes * spec.n_genes)
        self._dispersion = np.where(self._housekeeping, spec.housekeeping_dispersion, spec.dispersion)
        self._draw_programs()
        self._baselines = {line: self._draw_baseline(line) for line in spec.cell_lines}
        self._batch_effects = spec.batch_strength * np.stack(
            [self._stream("batch", str(b)).standard_normal(spec.n_genes) for b in range(spec.n_batches)]
        )

    @classmethod
    def from_adata(cls, adata: anndata.AnnData) -> Screen:
        """Rebuild the truth that ``adata`` was drawn from, given the spec in ``adata.uns['simulation']``.

        Raises
        ------
        InputError
            If there is no spec, or it is of another version of the simulator.
        """
        if UNS_KEY not in adata.uns:
            raise InputError(
                f"AnnData, uns['{UNS_KEY}']: found nothing, expected the spec of a simulated screen; "
                "only a file written by Screen.write has a known truth."
            )
        stored = json.loads(adata.uns[UNS_KEY])
        version = stored.pop("version", None)
        if version != VERSION:
            raise InputError(
                f"AnnData, uns['{UNS_KEY}']: found simulator version {version}, expected {VERSION}; "
                "simulate the screen again."
            )
        return cls(ScreenSpec.from_mapping(stored))

    def without_own_effects(self) -> Screen:
        """The same screen with only the part of each response that all cell lines share.

        Effects lack the line's own component, and responder fractions have its mean. The lines keep their baselines.
        """
        shared = copy.copy(self)
        shared._own_effects = False
        return shared

    def _stream(self, *names: str) -> np.random.Generator:
        """Return the random stream of what ``names`` identify, independent of all others."""
        digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16).digest()
        key = tuple(int(word) for word in np.frombuffer(digest, dtype="<u4"))
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.spec.seed, spawn_key=key)))

    def _draw_programs(self) -> None:
        """Draw the loadings, and the log expression that all lines share, (n_genes,)."""
        # The name of the stream determines the numbers, so its spelling stays.
        spec, rng = self.spec, self._stream("programmes")
        rank = rng.random((spec.n_programs, spec.n_genes)).argsort(axis=0).argsort(axis=0)
        # Scaled so that moving the programs by norm s has strength s. Uniform, so that no gene changes without bound.
        loadings = rng.uniform(-1, 1, rank.shape) * (rank < spec.programs_per_gene)
        loadings *= np.sqrt(3 * spec.n_programs / spec.programs_per_gene)
        self.loadings = np.where(self._housekeeping, 0.0, loadings)
        expression = spec.expression_spread * self._stream("expression").standard_normal(spec.n_genes)
        if self._housekeeping.any():
            expression[self._housekeeping] *= 0.3
            for group, share in (
                (self._housekeeping, spec.housekeeping_counts),
                (~self._housekeeping, 1 - spec.housekeeping_counts),
            ):
                expression[group] += np.log(share) - np.log(np.exp(expression[group]).sum())
        self._expression = expression

    def _draw_baseline(self, line: str) -> np.ndarray:
        spec, rng = self.spec, self._stream("line", line)
        activity = _unit(rng.standard_normal(spec.n_programs)) @ self.loadings
        own = np.where(self._housekeeping, 0.0, rng.standard_normal(spec.n_genes))
        return self._expression + spec.line_strength * np.sqrt(0.5) * (activity + own)

    def parts(self, perturbation: str) -> tuple[str, ...]:
        """Return the perturbations that a label names, in the order of the screen; none for the control.

        Parameters
        ----------
        perturbation
            ``'control'``, ``'G3'``, ``'G3+G7'`` and so on, in any order.

        Raises
        ------
        InputError
            If the label names a perturbation that the screen does not know, or one twice.
        """
        if perturbation == CONTROL:
            return ()
        parts = perturbation.split(DELIMITER)
        unknown = [part for part in parts if part not in self.perturbations]
        if unknown or len(set(parts)) < len(parts):
            raise InputError(
                f"simulated screen, perturbation {perturbation!r}: expected '{CONTROL}' or different ones of "
                f"{self.perturbations[0]} to {self.perturbations[-1]} joined by '{DELIMITER}'."
            )
        return tuple(sorted(parts, key=self.perturbations.index))

    def shift(self, cell_line: str, perturbation: str) -> np.ndarray:
        """Return how a perturbation moves the programs in the cells in which all of its parts take effect.

        Returns
        -------
        Shape (n_programs,). Multiplied by ``loadings`` it is the change of the natural-log expression of the genes,
        before the knock-down of the target itself and before the proportions are scaled to sum to one.
        """
        parts = self.parts(perturbation)
        total = sum((self._single(cell_line, p) for p in parts), np.zeros(self.spec.n_programs))
        return total + sum(self.interaction(cell_line, *pair) for pair in itertools.combinations(parts, 2))

    def interaction(self, cell_line: str, first: str, second: str) -> np.ndarray:
        """Return what a pair adds to the sum of the shifts of its parts, shape (n_programs,)."""
        first, second = self.parts(first + DELIMITER + second)
        added = self._single(cell_line, first) + self._single(cell_line, second)
        rng = self._stream("interaction", first, second)
        along = rng.choice([-1.0, 1.0]) * _unit(added)
        own = rng.standard_normal(self.spec.n_programs)
        own = _unit(own - (own @ along) * along)
        return self.spec.interaction_strength * np.linalg.norm(added) * np.sqrt(0.5) * (along + own)

    def _single(self, cell_line: str, name: str) -> np.ndarray:
        spec = self.spec
        shared = _unit(self._stream("effect", name).standard_normal(spec.n_programs))
        own = self._stream("effect", name, cell_line).standard_normal(spec.n_programs)
        own = _unit(own - (own @ shared) * shared)
        share = spec.context_specificity
        own = np.sqrt(share) * own if self._own_effects else 0.0
        return spec.effect_size * (np.sqrt(1 - share) * shared + own)

    def responder_fraction(self, cell_line: str, name: str) -> float:
        """Return the fraction of cells of a line in which the single perturbation ``name`` takes effect."""
        low, high = self.spec.responder_fraction
        shared = self._stream("escape", name).random()
        own = self._stream("escape", name, cell_line).random() if self._own_effects else 0.5
        share = self.spec.context_specificity
        return low + (high - low) * ((1 - share) * shared + share * own)

    def _proportions(self, cell_line: str, parts: tuple[str, ...]) -> np.ndarray:
        """Return the expected share of each gene in the counts when ``parts`` took effect, (n_batches, n_genes)."""
        shift = self.shift(cell_line, DELIMITER.join(parts) or CONTROL)
        logits = self._baselines[cell_line] + shift @ self.loadings
        for part in parts:
            if part in self.gene_names:
                with np.errstate(divide="ignore"):
                    logits[self.gene_names.index(part)] += np.log(self.spec.knockdown)
        rates = np.exp(logits + self._batch_effects)
        return rates / rates.sum(axis=1, keepdims=True)

    def _outcomes(self, cell_line: str, perturbation: str) -> list[tuple[tuple[str, ...], float]]:
        """Return which parts can take effect together, with probabilities; first the case that none does."""
        if cell_line not in self._baselines:
            names = ", ".join(self.spec.cell_lines)
            raise InputError(f"simulated screen, cell line {cell_line!r}: expected one of {names}.")
        outcomes: list[tuple[tuple[str, ...], float]] = [((), 1.0)]
        for part in self.parts(perturbation):
            takes = self.responder_fraction(cell_line, part)
            outcomes = [both for took, p in outcomes for both in ((took, p * (1 - takes)), ((*took, part), p * takes))]
        return outcomes

    def mean(self, cell_line: str, perturbation: str, responders: bool | None = None) -> np.ndarray:
        """Return expected counts over the expected library size, in closed form, averaged over the batches.

        Parameters
        ----------
        cell_line, perturbation
            The condition; the screen need not measure it.
        responders
            True for cells in which at least one part took effect, False for the others, None for all.

        Returns
        -------
        Proportions that sum to 1, shape (n_genes,); NaN if there are no such cells.
        """
        outcomes = self._outcomes(cell_line, perturbation)
        if responders is not None:
            outcomes = outcomes[1:] if responders else outcomes[:1]
        total = sum(p for _, p in outcomes)
        if total == 0:
            return np.full(self.spec.n_genes, np.nan)
        return sum(p / total * self._proportions(cell_line, took).mean(axis=0) for took, p in outcomes)

    def draw(self, cell_line: str, perturbation: str, n_cells: int, seed: int | str) -> Cells:
        """Draw cells of a condition with responder status and batch; see `sample`."""
        spec, outcomes = self.spec, self._outcomes(cell_line, perturbation)
        label = DELIMITER.join(self.parts(perturbation)) or CONTROL
        rng = self._stream("cells", cell_line, label, str(seed))
        outcome = rng.choice(len(outcomes), size=n_cells, p=[p for _, p in outcomes])
        batch = rng.integers(spec.n_batches, size=n_cells)
        library = spec.library_median * np.exp(spec.library_spread * rng.standard_normal(n_cells))
        strength = spec.cell_strength / np.sqrt(spec.n_programs)
        state = strength * rng.standard_normal((n_cells, spec.n_programs))
        spread = strength**2 * (self.loadings**2).sum(axis=0)
        proportions = np.stack([self._proportions(cell_line, took) for took, _ in outcomes])
        # The log-normal cell state has mean one, so that the mean of the condition has a closed form.
        rates = library[:, None] * proportions[outcome, batch] * np.exp(state @ self.loadings - spread / 2)
        noisy = self._dispersion > 0
        shape = 1 / self._dispersion[noisy]
        rates[:, noisy] *= rng.gamma(shape, 1 / shape, size=(n_cells, len(shape)))
        counts = sp.csr_matrix(rng.poisson(rates).astype(np.int32))
        return Cells(counts, outcome > 0, batch)

    def sample(self, cell_line: str, perturbation: str, n_cells: int, seed: int) -> np.ndarray:
        """Draw new cells of any condition; the screen need not measure it.

        The cells depend only on the spec, the condition, ``n_cells`` and ``seed``. They are never those of `adata`.

        Returns
        -------
        Counts, shape (n_cells, n_genes), int32.
        """
        return self.draw(cell_line, perturbation, n_cells, seed).counts.toarray()

    def adata(self, seed: int | None = None) -> anndata.AnnData:
        """Return the whole screen as one AnnData.

        Parameters
        ----------
        seed
            None gives the screen itself. A number gives a replicate: other cells of the same conditions.

        Returns
        -------
        ``X``: log1p of counts normalized to 10,000 per cell, CSR float32; ``layers['counts']``: CSR int32;
        ``obs``: cell_type, condition, batch, responder, library_size (counts of the cell);
        ``uns['simulation']``: the spec.
        """
        spec, blocks, obs = self.spec, [], []
        for line, condition in itertools.product(spec.cell_lines, self.conditions):
            n_cells = spec.control_cells_per_line if condition == CONTROL else spec.cells_per_condition
            cells = self.draw(line, condition, n_cells, "screen" if seed is None else seed)
            blocks.append(cells.counts)
            names = [f"{line}_{condition}_{i}" for i in range(n_cells)]
            columns = {"cell_type": line, "condition": condition, "batch": [f"batch{b}" for b in cells.batch]}
            obs.append(pd.DataFrame({**columns, "responder": cells.responder}, index=names))
        counts = sp.vstack(blocks, format="csr")
        table = pd.concat(obs)
        table["library_size"] = np.asarray(counts.sum(axis=1)).ravel()
        for column in ("cell_type", "condition", "batch"):
            table[column] = table[column].astype("category")
        return anndata.AnnData(
            X=log_normalize(counts),
            obs=table,
            var=pd.DataFrame({"housekeeping": self._housekeeping}, index=self.gene_names),
            layers={"counts": counts},
            uns={UNS_KEY: spec.to_json()},
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the screen as h5ad. The file appears complete or not at all."""
        path = Path(path)
        with replacing(path) as temporary:
            self.adata().write_h5ad(temporary, compression="gzip")
        return path


def log_normalize(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p of counts scaled to 10,000 per cell, (n_cells, n_genes), float32. Cells without counts stay zero."""
    total = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
    scale = TARGET_SUM / np.where(total > 0, total, 1)
    return sp.csr_matrix(sp.diags_array(scale.astype(np.float32)) @ counts.astype(np.float32)).log1p()


def simulate(path: str | os.PathLike[str], **spec: object) -> str:
    """Write a simulated screen to ``path``, unless the file there is already that very screen.

    Parameters
    ----------
    path
        h5ad file. Another simulated screen at this path is replaced.
    **spec
        Settings of `ScreenSpec`; the others keep their defaults.

    Returns
    -------
    The path, so that a config can take the name of its file from here.

    Raises
    ------
    InputError
        If a setting is invalid, or ``path`` exists and is not a simulated screen.
    """
    path, wanted = Path(path), ScreenSpec.from_mapping(spec)
    if path.exists():
        stored = _stored_spec(path)
        if stored is None:
            raise InputError(
                f"{path}: found something other than a simulated screen, expected one or nothing; "
                "give another path or move the file away."
            )
        if stored == wanted.to_json():
            return str(path)
    return str(Screen(wanted).write(path))


def _stored_spec(path: Path) -> str | None:
    """Return the spec in an h5ad file without reading its cells; None if there is none."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return None
    try:
        with h5py.File(path, "r") as file:
            return file[f"uns/{UNS_KEY}"].asstr()[()]
    except (OSError, KeyError, AttributeError, TypeError):
        return None


def _unit(vector: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector
