"""What a velocity network reads of a condition: perturbations as they are, or embedded.

The modules here map a `conditions.condition.Condition` to features ``[embedded perturbations | covariates | is null]``.
The embeddings of the parts of a combination are added, so that a pair that training lacks is defined, and control
cells, which have no part, get zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.description import DescribedModule

Unit = Literal["none", "log1p", "standardize"]
UNITS = ("none", "log1p", "standardize")


class ConditionTensors(Protocol):
    """The tensors of a condition that an encoder reads, see `conditions.condition.Condition`."""

    @property
    def perturbations(self) -> Tensor:
        """Multi-hot perturbations (B, P)."""
        ...

    @property
    def external(self) -> Tensor:
        """Summed external embeddings (B, E)."""
        ...

    @property
    def context(self) -> Tensor:
        """Covariates and the null flag (B, F + 1)."""
        ...


class CovariateUnits(nn.Module):
    """Convert continuous covariates to the units that the network reads.

    ``log1p`` is ``sign(x) log(1 + |x|)``; ``standardize`` uses the mean and standard deviation of the training cells.
    The null condition stays all zeros.

    Parameters
    ----------
    uniques
        Categories of each covariate by name, ``None`` for a continuous one, in the order of the context.
    units
        ``none``, ``log1p`` or ``standardize`` by name of a continuous covariate; the default is ``none``.

    Raises
    ------
    ValueError
        If a name is not a continuous covariate, or a unit is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, uniques: Mapping[str, Sequence[Any] | None], units: Mapping[str, Unit] | None = None):
        super().__init__()
        self.width, continuous = 0, {}
        for name, categories in uniques.items():
            if categories is None:
                continuous[name] = self.width
            self.width += 1 if categories is None else len(categories)
        for name, unit in (units or {}).items():
            if name not in continuous:
                known = ", ".join(continuous) or "none"
                raise ValueError(f"continuous names {name!r}, but the continuous covariates of the data are {known}")
            if unit not in UNITS:
                raise ValueError(f"continuous.{name} must be one of {', '.join(UNITS)}, got {unit!r}")
        wanted = {unit: [continuous[n] for n, u in (units or {}).items() if u == unit] for unit in UNITS}
        self.logarithmic, self.standardized = wanted["log1p"], wanted["standardize"]
        if self.standardized:
            self.register_buffer("mean", torch.zeros(len(self.standardized)))
            self.register_buffer("std", torch.ones(len(self.standardized)))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation (F,) of all covariate features over the training cells."""
        if self.standardized:
            self.mean.copy_(mean[self.standardized])
            # A constant covariate becomes 0, not 0 / 0.
            self.std.copy_(torch.where(std > 0, std, 1.0)[self.standardized])

    def forward(self, covariates: Tensor) -> Tensor:
        """Convert covariates and null flag (B, F + 1); the flag is the last feature."""
        if not self.logarithmic and not self.standardized:
            return covariates
        changed, known = covariates.clone(), covariates[:, -1:] == 0
        values = covariates[:, self.logarithmic]
        changed[:, self.logarithmic] = values.sign() * values.abs().log1p()
        if self.standardized:
            changed[:, self.standardized] = (covariates[:, self.standardized] - self.mean) / self.std
        return torch.where(known, changed, covariates)


class MultiHot(DescribedModule):
    """Perturbations as they are: multi-hot, or PerturBench's summed embeddings. The paper's encoder.

    Parameters
    ----------
    n_perturbations
        Perturbations of the vocabulary, P.
    covariates
        Categories of each covariate by name, ``None`` for a continuous one, in the order of the context.
    continuous
        Units of continuous covariates by name, see `CovariateUnits`.

    Attributes
    ----------
    width
        Features that the network reads.
    external_width
        Features of external embeddings, E.
    identity_dropout
        Share of training cells whose perturbation is represented by its external embedding alone.
    """

    condition_parameters = ("",)
    external_width, identity_dropout = 0, 0.0

    def __init__(
        self,
        n_perturbations: int,
        covariates: Mapping[str, Sequence[Any] | None],
        continuous: Mapping[str, Unit] | None = None,
    ):
        super().__init__()
        self.n_perturbations = n_perturbations
        self.covariates = CovariateUnits(covariates, continuous)
        self.width = n_perturbations + self.covariates.width + 1

    def _set_width(self, width: int) -> None:
        """Set the number of features of an embedded perturbation."""
        if width < 1:
            raise ValueError(f"an embedding of perturbations needs a width of at least 1, got {width}")
        self.width = width + self.covariates.width + 1

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features of perturbations (B, P) and of their external embeddings (B, E)."""
        return perturbations

    def forward(self, condition: ConditionTensors) -> Tensor:
        """Features (B, width) of conditions that the network reads; float32 also under a lower precision."""
        with torch.autocast(condition.perturbations.device.type, enabled=False):
            embedded = self.embed(condition.perturbations, condition.external)
            return torch.cat([embedded, self.covariates(condition.context)], dim=1)


class External(MultiHot):
    """A linear projection of external embeddings, which also covers perturbations that training lacks.

    The external embedding of a perturbation concatenates the columns of K tables, standardized over the vocabulary and
    zero where a table lacks the perturbation, and K flags that say which tables have it: ``E = W_1 + ... + W_K + K``.
    The flags keep a perturbation with an average embedding distinct from control. The model stores the rows of its
    vocabulary.

    Parameters
    ----------
    n_perturbations, covariates, continuous
        As for `MultiHot`.
    width
        Features that embeddings are projected to.
    embeddings
        Paths of tables. `conditions.embedding_tables` reads them, passes their widths as ``table_widths`` and their
        rows to `set_rows`.
    table_widths
        Columns of each table.

    Raises
    ------
    ValueError
        If there is no table, or a size is not positive.
    """

    cell_statistics = ("seen",)
    mean: Tensor
    std: Tensor
    table: Tensor
    seen: Tensor

    def __init__(
        self,
        n_perturbations: int,
        covariates: Mapping[str, Sequence[Any] | None],
        width: int = 128,
        embeddings: str | Sequence[str] | None = None,
        table_widths: Sequence[int] | None = None,
        continuous: Mapping[str, Unit] | None = None,
    ):
        super().__init__(n_perturbations, covariates, continuous)
        if not table_widths or min(table_widths) < 1:
            raise ValueError(
                f"{type(self).__name__} needs tables of embeddings; give model.conditions.embeddings=PATH of a parquet "
                "file with names of perturbations as its index"
            )
        self._set_width(width)
        self.table_widths, columns = list(table_widths), sum(table_widths)
        self.external_width = columns + len(self.table_widths)
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))
        self.register_buffer("table", torch.zeros(n_perturbations, self.external_width))
        self.register_buffer("seen", torch.ones(n_perturbations))
        self.project = nn.Linear(self.external_width, width, bias=False)

    def set_rows(self, rows: Tensor) -> None:
        """Set the rows of the vocabulary (P, W_1 + ... + W_K), NaN where a table lacks the perturbation."""
        count = rows.isfinite().sum(0).clamp(min=1)
        mean = rows.nansum(0) / count
        std = ((rows - mean).square().nansum(0) / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1.0))
        self.table.copy_(self.standardized(rows))

    def set_units(self, mean: Tensor, std: Tensor) -> None:
        """Express the table in the units of a checkpoint: its mean and standard deviation (W_1 + ... + W_K)."""
        columns = len(self.mean)
        values, has = self.table[:, :columns], self.table[:, columns:]
        known = has.repeat_interleave(torch.tensor(self.table_widths, device=has.device), dim=1)
        raw = values * self.std + self.mean
        self.table.copy_(torch.cat([(raw - mean) / std * known, has], dim=1))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def set_seen(self, seen: Tensor) -> None:
        """Set which perturbations of the vocabulary (P,) training has; the others only have their rows."""
        self.seen.copy_(seen)

    def standardized(self, rows: Tensor) -> Tensor:
        """External embeddings (N, E) of rows (N, W_1 + ... + W_K) of any perturbations, see `set_rows`."""
        rows = rows.to(self.mean)
        has = [part[:, :1].isfinite().to(rows) for part in rows.split(self.table_widths, dim=1)]
        return torch.cat([((rows - self.mean) / self.std).nan_to_num(0.0), *has], dim=1)

    def summed(self, perturbations: Tensor) -> Tensor:
        """Summed external embeddings (B, E) of multi-hot perturbations (B, P)."""
        row, column = perturbations.nonzero(as_tuple=True)
        return summed_rows(self.table.to(perturbations.device)[column], row, len(perturbations))

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features (B, width) of external embeddings (B, E)."""
        return self.project(external)


class Mixture(External):
    """A learned and a projected embedding of each perturbation, mixed in a learned ratio.

    The sum over the parts of a combination of ``g_p learned_p + (1 - g_p) project(external_p)``, where ``g_p`` is the
    sigmoid of a parameter of the perturbation that starts at 0; ``g_p = 0`` for perturbations that training lacks.

    Parameters
    ----------
    n_perturbations, covariates, width, embeddings, table_widths, continuous
        As for `External`.
    identity_dropout
        Share of training cells whose perturbation is treated as one that training lacks, so that this case is trained.

    Raises
    ------
    ValueError
        As `External`, and if ``identity_dropout`` is not in [0, 1].
    """

    perturbation_parameters = ("learned", "gate")

    def __init__(
        self,
        n_perturbations: int,
        covariates: Mapping[str, Sequence[Any] | None],
        width: int = 128,
        embeddings: str | Sequence[str] | None = None,
        table_widths: Sequence[int] | None = None,
        continuous: Mapping[str, Unit] | None = None,
        identity_dropout: float = 0.2,
    ):
        super().__init__(n_perturbations, covariates, width, embeddings, table_widths, continuous)
        if not 0 <= identity_dropout <= 1:
            raise ValueError(f"identity_dropout must be at least 0 and at most 1, got {identity_dropout}")
        self.identity_dropout = identity_dropout
        self.learned = nn.Parameter(torch.randn(n_perturbations, width))
        self.gate = nn.Parameter(torch.zeros(n_perturbations))

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features (B, width) of known perturbations (B, P) and external embeddings (B, E) of all."""
        gated = perturbations * self.gate.sigmoid()
        return gated @ self.learned + self.project(external - gated @ self.table)


def summed_rows(rows: Tensor, place: Tensor, n: int) -> Tensor:
    """Sums (n, E) in float32 of rows (M, E) by place (M,), with the same bits in any order and on any device.

    The bits matter because a condition seeds the noise of its cells. A float64 sum of a few float32 numbers is exact
    enough for that.
    """
    total = torch.zeros(n, rows.shape[1], dtype=torch.float64, device=rows.device)
    return total.index_add_(0, place, rows.double()).float()
