"""Compare predicted with observed cells, condition by condition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from primeflow_perturbench.perturbench.embedded.analysis.benchmarks import metrics
from primeflow_perturbench.perturbench.embedded.errors import DataError

REFERENCE = "ref"
ONE_GROUP = "all"
AGGREGATIONS = ("average", "logfc", "scores", "logp", "pca", "pca_average", "none", "scaled", "var", "pvals")
CELL_AGGREGATIONS = ("pca", "none")
TEST_AGGREGATIONS = ("scores", "logp", "pvals")
CONTROL_AGGREGATIONS = ("logfc", *TEST_AGGREGATIONS)
SIMILARITIES = {
    "pearson": metrics.pearson,
    "cosine": metrics.cosine,
    "r2_score": metrics.r2_score,
    "top_k_recall": metrics.top_k_recall,
}
DISTANCES = {"rmse": metrics.rmse, "mse": metrics.mse, "mae": metrics.mae}
CELL_METRIC = "mmd"
METRICS = (*DISTANCES, *SIMILARITIES, CELL_METRIC)

_BLOCK = 4096


class Evaluation:
    """Aggregate the predicted and the observed cells of every condition, and compare them.

    A condition is a perturbation within a covariate group. Its key ``cov_pert`` joins the group's covariates and the
    perturbation by ``_``. Conditions are in sorted order.

    Parameters
    ----------
    model_adatas
        Predicted cells: one AnnData, a list of them or a dict by model name. A model's control cells are its controls;
        in a covariate group where it has none, the observed control cells are used.
    ref_adata
        Observed cells, including controls.
    pert_col
        Column of `obs` with the perturbation.
    model_names
        Names of the models (default: the keys of the dict, ``model``, or ``model_0``, ``model_1``, ...).
    ctrl
        Label of the control cells; without it every label is scored, and aggregations that need controls fail.
    cov_cols
        Columns of `obs` that define the covariate groups; None or empty for one group of all cells.
    features
        Genes to score (default: all).

    Attributes
    ----------
    aggr
        ``aggr[aggregation][model or "ref"][covariates][perturbation]``: array of shape (n_genes,), of shape
        (n_components,) for pca_average, (n_cells, n_components) for pca and (n_cells, n_genes) for none.
        Genes are in the reference's order; for scores, logp and pvals in alphabetical order
        (`sorted_genes`).
    evals
        ``evals[aggregation][metric]``: DataFrame with columns cov_pert, model, metric.
    pairwise_evals
        ``pairwise_evals[aggregation][metric][model][covariates]``: DataFrame of
        predictions (index) by observations (columns).
    rank_evals
        ``rank_evals[aggregation][metric]``: DataFrame with columns cov_pert, model, rank.
    conditions
        DataFrame of the scored conditions: cov_pert, covariates (the group), the covariate columns,
        perturbation.
    """

    def __init__(
        self,
        model_adatas: AnnData | Sequence[AnnData] | Mapping[str, AnnData],
        ref_adata: AnnData,
        pert_col: str,
        model_names: Sequence[str] | str | None = None,
        ctrl: str | None = None,
        cov_cols: Sequence[str] | str | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        models = _named_models(model_adatas, model_names)
        self.pert_col, self.ctrl = pert_col, None if ctrl is None else str(ctrl)
        self.cov_cols = [cov_cols] if isinstance(cov_cols, str) else list(cov_cols or [])
        self._ref = _Cells(REFERENCE, ref_adata, ref_adata.var_names, pert_col, self.cov_cols)
        genes = self._ref.select(features)
        self.genes, self.sorted_genes = genes, np.sort(genes)
        self._models = {name: _Cells(name, adata, genes, pert_col, self.cov_cols) for name, adata in models.items()}
        for cells in self._models.values():
            if features is None:
                cells.check_no_more_genes(genes)
            cells.check_finite()
        self._ref.check_finite()
        self.conditions = self._match_conditions()
        self._groups: dict[str, list[str]] = {
            group: list(rows["perturbation"])
            for group, rows in self.conditions.groupby("covariates", sort=False, observed=True)
        }
        self.aggr: dict[str, dict] = {}
        self.evals: dict[str, dict[str, pd.DataFrame]] = {}
        self.pairwise_evals: dict[str, dict] = {}
        self.rank_evals: dict[str, dict[str, pd.DataFrame]] = {}
        self._pca: dict[int, metrics.PrincipalComponents] = {}
        self._self_distances: dict[tuple, np.ndarray] = {}
        self._pairwise_kwargs: dict[tuple[str, str], dict] = {}

    @property
    def model_names(self) -> list[str]:
        """Names of the models in the given order."""
        return list(self._models)

    # ------------------------------------------------------------------------------------------- aggregation
    def aggregate(
        self,
        aggr_method: str,
        use_control_variance: bool = False,
        n_components: int = 100,
        pseudocount: float = 0.1,
        adjust_var: bool = True,
    ) -> dict:
        """Compute, store and return ``aggr[aggr_method]``.

        Parameters
        ----------
        aggr_method
            average, logfc, scores, logp, pvals, scaled, var, pca, pca_average or none. scaled is the mean after
            scaling the cells of a covariate group, controls included, as `scanpy.pp.scale` does.
        use_control_variance
            For scores, logp and pvals: use the variance of the controls for predicted genes, for models that predict
            only a mean.
        n_components
            For pca and pca_average.
        pseudocount
            For logfc.
        adjust_var
            For var: the standard deviation over the mean instead of the variance.
        """
        _check_choice("aggregation", aggr_method, AGGREGATIONS)
        if aggr_method in CONTROL_AGGREGATIONS:
            self.require_controls()
        pca = self._fit_pca(n_components) if aggr_method.startswith("pca") else None
        result: dict[str, dict] = {}
        for cells in (*self._models.values(), self._ref):
            predicted = cells is not self._ref
            result[cells.name] = {}
            for group, perturbations in self._groups.items():
                if aggr_method in CELL_AGGREGATIONS:
                    values: Iterable = (cells.of(group, p) for p in perturbations)
                    if pca is not None:
                        values = map(pca.transform, values)
                elif aggr_method in TEST_AGGREGATIONS:
                    values = self._scores(cells, group, aggr_method, use_control_variance and predicted)
                elif aggr_method == "scaled":
                    values = self._scaled(cells, group)
                elif aggr_method == "var":
                    values = np.stack([metrics.variation(cells.of(group, p), adjust_var) for p in perturbations])
                else:
                    values = np.stack([cells.mean(group, p) for p in perturbations])
                    if pca is not None:
                        values = pca.transform_mean(values)
                    elif aggr_method == "logfc":
                        control = self._control_source(cells, group).mean(group, self.ctrl)
                        values = metrics.log_fold_change(values, control, pseudocount)
                result[cells.name][group] = dict(zip(perturbations, values, strict=True))
        self.aggr[aggr_method] = result
        self._forget(aggr_method)
        return result

    def require_controls(self) -> None:
        """Raise `DataError` unless every covariate group has control cells."""
        if self.ctrl is None:
            raise DataError(f"{', '.join(CONTROL_AGGREGATIONS)} need control cells: pass their label as ctrl.")
        missing = [group for group in self._groups if (group, self.ctrl) not in self._ref.rows]
        if missing:
            raise DataError(
                f"The reference has no control cells ({self.pert_col} = {self.ctrl!r}) for {_some(missing)}: "
                "add them or leave out these covariate groups."
            )

    def _fit_pca(self, n_components: int) -> metrics.PrincipalComponents:
        if n_components not in self._pca:
            fit = metrics.PrincipalComponents.fit(self._ref.blocks, len(self.genes), n_components)
            self._pca[n_components] = fit
        return self._pca[n_components]

    def _control_source(self, cells: _Cells, group: str) -> _Cells:
        return cells if (group, self.ctrl) in cells.rows else self._ref

    def _scaled(self, cells: _Cells, group: str) -> np.ndarray:
        """Scaled means of a group's conditions; its control cells are scaled with them."""
        source = self._control_source(cells, group)
        controls = [source.of(group, self.ctrl)] if (group, self.ctrl) in source.rows else []
        perturbed = [cells.of(group, p) for p in self._groups[group]]
        return metrics.scaled_means([*perturbed, *controls])[: len(perturbed)]

    def _scores(self, cells: _Cells, group: str, aggr_method: str, use_control_variance: bool) -> np.ndarray:
        source = self._control_source(cells, group)
        spread = [(source, self.ctrl)]
        if not use_control_variance:
            spread += [(cells, p) for p in self._groups[group]]
        for owner, label in spread:
            if len(owner.rows[group, label]) < 2:
                raise DataError(
                    f"{aggr_method} compares variances, but there is one cell of {group}_{label} in "
                    f"{owner.title[0].lower()}{owner.title[1:]}: give at least two."
                )
        controls = source.of(group, self.ctrl)
        perturbed = [cells.of(group, p) for p in self._groups[group]]
        # Squares are rounded in this dtype; the variance of a constant gene is this rounding error.
        dtype = np.result_type(controls, *perturbed)
        control_mean, control_variance = metrics.mean_and_variance(controls.astype(dtype, copy=False))
        moments = [metrics.mean_and_variance(x.astype(dtype, copy=False)) for x in perturbed]
        mean = np.stack([m for m, _ in moments])
        variance = np.stack([control_variance if use_control_variance else v for _, v in moments])
        n_cells = np.array([len(x) for x in perturbed])
        scores, p_values = metrics.t_scores(mean, variance, n_cells, control_mean, control_variance)
        if aggr_method == "logp":
            values = metrics.signed_log_p(scores, p_values)
        else:
            # An infinite score counts as 0, so its p-value counts as 1.
            values = scores if aggr_method == "scores" else np.where(scores == 0, 1.0, p_values)
        return values[:, np.argsort(self.genes, kind="stable")]

    def _forget(self, aggr_method: str) -> None:
        for store in (self.evals, self.pairwise_evals, self.rank_evals):
            store.pop(aggr_method, None)
        for store in (self._self_distances, self._pairwise_kwargs):
            for key in [key for key in store if key[0] == aggr_method]:
                del store[key]

    # ------------------------------------------------------------------------------------------------ scores
    def evaluate(
        self, aggr_method: str, metric: str, n_top_degs: int | None = None, **metric_kwargs: Any
    ) -> pd.DataFrame:
        """Score every condition; store and return ``evals[aggr_method][metric]``.

        Parameters
        ----------
        aggr_method
            An aggregation; computed with default settings unless `aggregate` was called for it.
        metric
            rmse, mse, mae, pearson, cosine, r2_score, top_k_recall (keyword k = 50), or mmd for pca and none.
        n_top_degs
            Compare only this many genes of a condition: those with the largest absolute score in the reference.
        metric_kwargs
            Keyword arguments of the metric.
        """
        self._prepare(aggr_method, metric, metric_kwargs)
        top = None if n_top_degs is None else self._top_genes(aggr_method, n_top_degs)
        reuse = top is None and self._pairwise_kwargs.get((aggr_method, metric)) == metric_kwargs
        rows = []
        for model, group, perturbations in self._model_groups():
            if reuse:
                values = np.diagonal(self.pairwise_evals[aggr_method][metric][model][group])
            else:
                values = self._compare(aggr_method, metric, model, group, metric_kwargs, paired=True, top=top)
            rows += [(f"{group}_{p}", model, value) for p, value in zip(perturbations, values, strict=True)]
        frame = pd.DataFrame(rows, columns=["cov_pert", "model", "metric"])
        self.evals.setdefault(aggr_method, {})[metric] = frame
        return frame

    def evaluate_pairwise(self, aggr_method: str, metric: str, **metric_kwargs: Any) -> dict:
        """Compare each prediction with all observations of its group; store and return ``pairwise_evals``.

        Parameters are those of `evaluate`.
        """
        self._prepare(aggr_method, metric, metric_kwargs)
        result: dict[str, dict[str, pd.DataFrame]] = {model: {} for model in self._models}
        for model, group, perturbations in self._model_groups():
            values = self._compare(aggr_method, metric, model, group, metric_kwargs, paired=False)
            result[model][group] = pd.DataFrame(values, index=perturbations, columns=perturbations)
        self.pairwise_evals.setdefault(aggr_method, {})[metric] = result
        self._pairwise_kwargs[aggr_method, metric] = metric_kwargs
        return result

    def evaluate_rank(self, aggr_method: str, metric: str, **metric_kwargs: Any) -> pd.DataFrame:
        """Rank each condition's own prediction among those of its group; store and return ``rank_evals``.

        The n predictions of the group are sorted by closeness to the condition's observation. The rank is the position
        of its own prediction, counted from 0, divided by n - 1: 0 is perfect, 0.5 is chance. The only condition of a
        group has rank 0. Among equal distances the alphabetically first condition counts as closer, among equal
        similarities the last, so that identical predictions have rank 0.5 on average.

        Parameters are those of `evaluate`.
        """
        self._prepare(aggr_method, metric, metric_kwargs)
        if self._pairwise_kwargs.get((aggr_method, metric)) != metric_kwargs:
            self.evaluate_pairwise(aggr_method, metric, **metric_kwargs)
        rows = []
        for model, group, perturbations in self._model_groups():
            values = self.pairwise_evals[aggr_method][metric][model][group].to_numpy()
            ranks = _own_ranks(values, similarity=metric in SIMILARITIES)
            rows += [(f"{group}_{p}", model, rank) for p, rank in zip(perturbations, ranks, strict=True)]
        frame = pd.DataFrame(rows, columns=["cov_pert", "model", "rank"])
        self.rank_evals.setdefault(aggr_method, {})[metric] = frame
        return frame

    def _prepare(self, aggr_method: str, metric: str, metric_kwargs: dict) -> None:
        check_pipeline(aggr_method, metric)
        if metric == CELL_METRIC and metric_kwargs:
            raise DataError(f"{CELL_METRIC} takes no keywords, but got {_some(metric_kwargs)}.")
        if aggr_method not in self.aggr:
            self.aggregate(aggr_method)

    def _top_genes(self, aggr_method: str, n: int) -> dict[str, np.ndarray]:
        """Positions of each condition's n genes in the vectors of an aggregation, shape (n_conditions, n) by group."""
        if aggr_method.startswith("pca") or aggr_method in CELL_AGGREGATIONS or n < 1:
            raise DataError(
                f"n_top_degs = {n} with aggregation {aggr_method!r}: give at least one gene and an aggregation with "
                "one value per gene."
            )
        self.require_controls()
        by_name = np.argsort(self.genes, kind="stable")
        positions = np.arange(len(by_name)) if aggr_method in TEST_AGGREGATIONS else by_name
        return {
            group: positions[np.argsort(-np.abs(self._scores(self._ref, group, "scores", False)), kind="stable")[:, :n]]
            for group in self._groups
        }

    def _model_groups(self) -> Iterator[tuple[str, str, list[str]]]:
        for model in self._models:
            for group, perturbations in self._groups.items():
                yield model, group, perturbations

    def _compare(
        self,
        aggr_method: str,
        metric: str,
        model: str,
        group: str,
        metric_kwargs: dict,
        paired: bool,
        top: dict[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Scores of a group: shape (n, n), predictions by observations, or (n,) if paired."""
        predicted = list(self.aggr[aggr_method][model][group].values())
        observed = list(self.aggr[aggr_method][REFERENCE][group].values())
        if top is not None:
            predicted, observed = ([x[i] for x, i in zip(v, top[group], strict=True)] for v in (predicted, observed))
        pairs = list(zip(predicted, observed, strict=True))
        if metric == CELL_METRIC:
            if paired:
                between = np.array([metrics.mean_distances([x], [y])[0, 0] for x, y in pairs])
            else:
                between = metrics.mean_distances(predicted, observed)
            within = [self._within(aggr_method, name, group) for name in (model, REFERENCE)]
            return metrics.energy_distances(between, *within)
        function = (DISTANCES | SIMILARITIES)[metric]
        if paired:
            return np.array([function(x[None], y[None], **metric_kwargs)[0, 0] for x, y in pairs])
        return function(np.stack(predicted), np.stack(observed), **metric_kwargs)

    def _within(self, aggr_method: str, name: str, group: str) -> np.ndarray:
        key = (aggr_method, name, group)
        if key not in self._self_distances:
            self._self_distances[key] = metrics.mean_self_distances(list(self.aggr[aggr_method][name][group].values()))
        return self._self_distances[key]

    # ------------------------------------------------------------------------------------------------ checks
    def _match_conditions(self) -> pd.DataFrame:
        """The sorted conditions of the reference; `DataError` unless every model predicts exactly these."""
        wanted = {key for key in self._ref.rows if key[1] != self.ctrl}
        if not wanted:
            raise DataError(f"The reference has no perturbed cells: every {self.pert_col} is {self.ctrl!r}.")
        for cells in self._models.values():
            found = {key for key in cells.rows if key[1] != self.ctrl}
            if wanted - found:
                raise DataError(
                    f"Model {cells.name!r} predicts no cells of {_some(_keys(wanted - found))}: "
                    "predict these conditions or leave them out of the reference."
                )
            if found - wanted:
                raise DataError(
                    f"Model {cells.name!r} predicts {_some(_keys(found - wanted))}, which the reference "
                    "lacks: add the observed cells or leave out these conditions."
                )
        keys = sorted(wanted)
        frame = pd.DataFrame({"cov_pert": _keys(keys), "covariates": [group for group, _ in keys]})
        for i, column in enumerate(self.cov_cols):
            frame[column] = [self._ref.covariates[group][i] for group, _ in keys]
        frame["perturbation"] = [perturbation for _, perturbation in keys]
        repeated = frame["cov_pert"][frame["cov_pert"].duplicated()]
        if len(repeated):
            raise DataError(
                f"Two conditions share the name {repeated.iloc[0]!r}: rename labels in "
                f"{', '.join([*self.cov_cols, self.pert_col])} that contain '_'."
            )
        return frame


class _Cells:
    """Cells of one AnnData by condition, with checked labels and genes in a given order."""

    def __init__(self, name: str, adata: AnnData, genes: Iterable[str], pert_col: str, cov_cols: Sequence[str]) -> None:
        self.name, self._x = name, adata.X
        if adata.X is None:
            raise DataError(f"{self.title} has no expression matrix X.")
        self._names = pd.Index(adata.var_names)
        if not self._names.is_unique:
            duplicated = self._names[self._names.duplicated()].unique()
            raise DataError(f"{self.title} has duplicated gene names: {_some(duplicated)}.")
        self._columns: np.ndarray | slice = slice(None)
        self._take(genes)
        self.covariates: dict[str, tuple[str, ...]] = {}
        self.rows: dict[tuple[str, str], np.ndarray] = {}
        self._group_rows(adata.obs, pert_col, list(cov_cols))

    @property
    def title(self) -> str:
        """Name of these cells in messages."""
        return "The reference" if self.name == REFERENCE else f"Model {self.name!r}"

    def _take(self, genes: Iterable[str]) -> None:
        genes = pd.Index(genes)
        missing = genes.difference(self._names, sort=False)
        if len(missing):
            raise DataError(f"{self.title} lacks {len(missing)} of the {len(genes)} genes to score: {_some(missing)}.")
        columns = self._names.get_indexer(genes)
        whole = len(columns) == len(self._names) and (columns == np.arange(len(columns))).all()
        self._columns = slice(None) if whole else columns

    def check_no_more_genes(self, genes: np.ndarray) -> None:
        """Raise `DataError` if there are other genes."""
        extra = self._names.difference(genes, sort=False)
        if len(extra):
            raise DataError(
                f"{self.title} has {len(extra)} genes that the reference lacks: {_some(extra)}; pass the "
                "genes to score as features."
            )

    def select(self, features: Iterable[str] | None) -> np.ndarray:
        """Keep these genes, in the order of the data; return their names."""
        if features is not None:
            asked = pd.Index(features)
            if not len(asked):
                raise DataError("features is empty: name at least one gene or pass None for all.")
            self._take(asked.unique())
            self._take(self._names[self._names.isin(asked)])
        return self._names[self._columns].to_numpy(dtype=str)

    def _group_rows(self, obs: pd.DataFrame, pert_col: str, cov_cols: list[str]) -> None:
        for column in (*cov_cols, pert_col):
            if column not in obs:
                raise DataError(f"{self.title} has no obs column {column!r}; it has {_some(obs.columns)}.")
            if obs[column].isna().any():
                raise DataError(f"{self.title} has {obs[column].isna().sum()} cells without a {column!r}.")
        if not len(obs):
            raise DataError(f"{self.title} has no cells.")
        labels = obs[[*cov_cols, pert_col]].astype(str).reset_index(drop=True)
        for values, rows in labels.groupby([*cov_cols, pert_col], sort=False).indices.items():
            *covariates, perturbation = (values,) if isinstance(values, str) else values
            group = "_".join(covariates) if cov_cols else ONE_GROUP
            if self.covariates.setdefault(group, tuple(covariates)) != tuple(covariates):
                raise DataError(
                    f"Two covariate groups share the name {group!r}: rename labels in {', '.join(cov_cols)} "
                    "that contain '_'."
                )
            self.rows[group, perturbation] = np.sort(rows)

    def _dense(self, rows: np.ndarray | slice) -> np.ndarray:
        block = self._x[rows]
        block = block.toarray() if sparse.issparse(block) else np.asarray(block)
        block = block[:, self._columns]
        return block if block.dtype in (np.float32, np.float64) else block.astype(np.float32)

    def of(self, group: str, perturbation: str) -> np.ndarray:
        """Cells of a condition, shape (n_cells, n_genes); a view if they are adjacent in a dense X."""
        rows = self.rows[group, perturbation]
        if rows[-1] - rows[0] == len(rows) - 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        return self._dense(rows)

    def mean(self, group: str, perturbation: str) -> np.ndarray:
        """Mean of a condition's cells, float64, shape (n_genes,)."""
        return self.of(group, perturbation).mean(axis=0, dtype=np.float64)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all cells in dense blocks."""
        for start in range(0, self._x.shape[0], _BLOCK):
            yield self._dense(slice(start, start + _BLOCK))

    def check_finite(self) -> None:
        """Raise `DataError` if a value is NaN or infinite."""
        values = (self._x.data,) if sparse.issparse(self._x) else self.blocks()
        bad = sum(int(block.size - np.isfinite(block).sum()) for block in values)
        if bad:
            raise DataError(f"{self.title} has {bad} values that are NaN or infinite: remove them before scoring.")


def check_pipeline(aggregation: str, metric: str) -> None:
    """Raise `DataError` unless aggregation and metric exist and can be combined."""
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    _check_choice("metric", metric, METRICS)
    if (metric == CELL_METRIC) != (aggregation in CELL_AGGREGATIONS):
        cells = " and ".join(CELL_AGGREGATIONS)
        raise DataError(
            f"Metric {metric!r} cannot be combined with aggregation {aggregation!r}: {CELL_METRIC} compares the cells "
            f"of {cells}, every other metric one vector per condition."
        )


def _check_choice(kind: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise DataError(f"Unknown {kind} {value!r}: choose one of {', '.join(valid)}.")


def _named_models(
    adatas: AnnData | Sequence[AnnData] | Mapping[str, AnnData], names: Sequence[str] | str | None
) -> dict[str, AnnData]:
    if isinstance(adatas, Mapping):
        adatas, names = list(adatas.values()), list(adatas) if names is None else names
    elif isinstance(adatas, AnnData):
        adatas, names = [adatas], ["model"] if names is None else names
    names = [f"model_{i}" for i in range(len(adatas))] if names is None else names
    names = [names] if isinstance(names, str) else list(names)
    if not len(adatas) or len(names) != len(adatas):
        raise DataError(
            f"There are {len(adatas)} model AnnDatas and {len(names)} names: give one name for each, at least one."
        )
    if len(set(names)) < len(names) or REFERENCE in names:
        raise DataError(f"Model names must differ from each other and from {REFERENCE!r}: {_some(names)}.")
    return dict(zip(names, adatas, strict=True))


def _own_ranks(values: np.ndarray, similarity: bool) -> np.ndarray:
    """Rank of entry (j, j) in column j of a matrix of predictions by observations, from 0 to 1."""
    n = len(values)
    order = np.argsort(values, axis=0, kind="stable")
    if similarity:
        order = order[::-1]
    position = (order == np.arange(n)).argmax(axis=0)
    return position / max(n - 1, 1)


def _keys(conditions: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{group}_{perturbation}" for group, perturbation in sorted(conditions)]


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
