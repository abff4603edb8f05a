"""A batch of cells."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of B cells over G genes, with P perturbations and n categories of a covariate.

    ``len(batch)`` is the number of fields, not of cells.

    Attributes
    ----------
    gene_expression
        Expression: a dense float32 tensor (B, G) after the transform, a matrix as stored in the file before.
    perturbations
        Multi-hot (B, P), or summed embedding rows (B, W); zero for control cells. Before the transform a list of
        tuples of perturbations.
    covariates
        One-hot (B, n) by covariate name, (B, 1) for a numeric one. Before the transform the values.
    controls
        Expression of matched control cells (B, G), if the data set pairs controls.
    id
        Names of the cells.
    gene_names
        Names of the genes, length G.
    embeddings, control_embeddings
        Embeddings of the cells and of their controls (B, E), if the file has them.
    """

    gene_expression: Any
    perturbations: Any
    covariates: dict[str, Any] | None = None
    controls: Any = None
    id: list[str] | None = None
    gene_names: list[str] | None = None
    embeddings: Any = None
    control_embeddings: Any = None
