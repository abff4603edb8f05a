"""What a velocity network reads of a condition vector: perturbations as they are, or embedded.

A condition vector is ``[perturbations (P) | external (E) | covariates | is null]``, see `conditions.condition`; all
that
draws, drops, caches or calibrates goes by it. The modules here stand between it and the network, which reads
``[embedded perturbations | covariates | is null]``. Embeddings of the parts of a combination are added, so that a pair
that training lacks has a meaning, and control cells, which have no part, get zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Unit = Literal["none", "log1p", "standardise"]
UNITS = ("none", "log1p", "standardise")


class CovariateUnits(nn.Module):
    """Covariates with their continuous ones in the units that the network is to read them in.

    ``log1p`` is ``sign(x) log(1 + |x|)``; ``standardise`` takes mean and standard deviation of the training cells. The
    null condition stays all zeros.

    Parameters
    ----------
    uniques
        Categories of each covariate by name, ``None`` for a continuous one, in the order of the condition vector.
    units
        ``none``, ``log1p`` or ``standardise`` by name of a continuous covariate; those not named stay as they are.

    Raises
    ------
    ValueError
        If a name is no continuous covariate, or a unit is not known.
    """

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
        self.logarithmic, self.standardised = wanted["log1p"], wanted["standardise"]
        if self.standardised:
            self.register_buffer("mean", torch.zeros(len(self.standardised)))
            self.register_buffer("std", torch.ones(len(self.standardised)))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and standard deviation of all covariates' features (F,) over the training cells."""
        if self.standardised:
            self.mean.copy_(mean[self.standardised])
            # A covariate that never varies stays at zero.
            self.std.copy_(torch.where(std > 0, std, 1.0)[self.standardised])

    def forward(self, covariates: Tensor) -> Tensor:
        """Features (B, F + 1) of covariates, the last of which says whether the condition is null."""
        if not self.logarithmic and not self.standardised:
            return covariates
        changed, known = covariates.clone(), covariates[:, -1:] == 0
        values = covariates[:, self.logarithmic]
        changed[:, self.logarithmic] = values.sign() * values.abs().log1p()
        if self.standardised:
            changed[:, self.standardised] = (covariates[:, self.standardised] - self.mean) / self.std
        return torch.where(known, changed, covariates)


class MultiHot(nn.Module):
    """Perturbations as they are in the condition vector: multi-hot, or the host's summed embeddings (the paper's).

    Parameters
    ----------
    n_perturbations
        Perturbations of the vocabulary, P.
    covariates
        Categories of each covariate by name, ``None`` for a continuous one, in the order of the condition vector.
    continuous
        Units of continuous covariates by name, see `CovariateUnits`.

    Attributes
    ----------
    width
        Features that the network reads.
    external_width
        Features of external embeddings in the condition vector, E.
    identity_dropout
        Share of training cells whose perturbation is seen by its external embedding alone.
    """

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
        """Let perturbations be embedded in ``width`` features."""
        if width < 1:
            raise ValueError(f"an embedding of perturbations needs a width of at least 1, got {width}")
        self.width = width + self.covariates.width + 1

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features of perturbations (B, P) and of their external embeddings (B, E)."""
        return perturbations

    def forward(self, condition: Tensor) -> Tensor:
        """What the network reads, (B, width), of condition vectors (B, C); float32 also under a lower precision."""
        with torch.autocast(condition.device.type, enabled=False):
            sizes = [self.n_perturbations, self.external_width, self.covariates.width + 1]
            perturbations, external, covariates = condition.split(sizes, dim=1)
            return torch.cat([self.embed(perturbations, external), self.covariates(covariates)], dim=1)


class Learned(MultiHot):
    """An embedding of each perturbation that is learnt; those of the parts of a combination are added.

    Parameters
    ----------
    n_perturbations, covariates, continuous
        As for `MultiHot`.
    width
        Features of an embedding.
    """

    def __init__(
        self,
        n_perturbations: int,
        covariates: Mapping[str, Sequence[Any] | None],
        width: int = 128,
        continuous: Mapping[str, Unit] | None = None,
    ):
        super().__init__(n_perturbations, covariates, continuous)
        self._set_width(width)
        self.learnt = nn.Parameter(torch.randn(n_perturbations, width))

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features (B, width) of perturbations (B, P)."""
        return perturbations @ self.learnt


class External(MultiHot):
    """A linear projection of embeddings that are known beforehand, also of perturbations that training lacks.

    The external embedding of a perturbation has the columns of K tables side by side, standardised over the vocabulary
    and zeros where a table lacks the perturbation; then, for each table, whether it has the perturbation, so that one
    with the mean of all embeddings still differs from control: ``E = W_1 + ... + W_K + K``. The rows of the vocabulary
    are kept as a part of the model.

    Parameters
    ----------
    n_perturbations, covariates, continuous
        As for `MultiHot`.
    width
        Features that embeddings are projected to.
    embeddings
        Tables, which are not read here but by `conditions.embedding_tables`, which hands their rows to `set_rows` and
        their
        widths to ``table_widths``.
    table_widths
        Columns of each table.

    Raises
    ------
    ValueError
        If there is no table, or a size is not positive.
    """

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
        """Take the tables' rows of the vocabulary (P, W_1 + ... + W_K), NaN where a table lacks the perturbation."""
        count = rows.isfinite().sum(0).clamp(min=1)
        mean = rows.nansum(0) / count
        std = ((rows - mean).square().nansum(0) / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1.0))
        self.table.copy_(self.standardised(rows))

    def set_seen(self, seen: Tensor) -> None:
        """Take which perturbations of the vocabulary (P,) training has; the others go by their rows alone."""
        self.seen.copy_(seen)

    def standardised(self, rows: Tensor) -> Tensor:
        """External embeddings (N, E) of rows as for `set_rows`, of any perturbations (N, W_1 + ... + W_K)."""
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
    """Of each perturbation a part that is learnt and a part that is projected, in a ratio that is learnt.

    The sum over the parts of a combination of ``g_p learnt_p + (1 - g_p) project(external_p)``, with ``g_p`` the
    sigmoid of a number of the perturbation's own that starts at 0; for perturbations that training lacks ``g_p`` is 0.

    Parameters
    ----------
    n_perturbations, covariates, width, embeddings, table_widths, continuous
        As for `External`.
    identity_dropout
        Share of training cells whose perturbation is seen as if training lacked it, so that this case is trained.

    Raises
    ------
    ValueError
        As `External`, and if ``identity_dropout`` is not at least 0 and at most 1.
    """

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
        self.learnt = nn.Parameter(torch.randn(n_perturbations, width))
        self.gate = nn.Parameter(torch.zeros(n_perturbations))

    def embed(self, perturbations: Tensor, external: Tensor) -> Tensor:
        """Features (B, width) of perturbations (B, P) and of the external embeddings (B, E) of these and others."""
        gated = perturbations * self.gate.sigmoid()
        return gated @ self.learnt + self.project(external - gated @ self.table)


def summed_rows(rows: Tensor, place: Tensor, n: int) -> Tensor:
    """Sums (n, E) in float32 of rows (M, E) by place (M,), the same bits in any order and on any device.

    The sums of a few float32 numbers in float64 are as good as exact. A condition's vector seeds its cells' noise.
    """
    total = torch.zeros(n, rows.shape[1], dtype=torch.float64, device=rows.device)
    return total.index_add_(0, place, rows.double()).float()
