"""Initial gene embeddings from vectors that describe genes, such as embeddings of their proteins."""

import torch
from torch import Tensor


def projected_vectors(vectors: Tensor, channels: int) -> Tensor:
    """Project gene vectors (G, W) to initial embeddings (G, channels), in float64.

    The vectors are centered, because what all genes share distinguishes none of them, and multiplied by a random
    orthogonal matrix that is always the same. The result has unit mean square, like a random initial embedding. Genes
    without a vector (rows of zeros) stay zero.
    """
    known, width = vectors.any(dim=1), vectors.shape[1]
    vectors = vectors.double()
    generator = torch.Generator().manual_seed(0)
    shape = (max(width, channels), min(width, channels))
    basis, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    projected = (vectors - vectors[known].mean(0)) @ (basis if width > channels else basis.T)
    scale = projected[known].square().mean().sqrt().clamp(min=1e-12)
    return torch.where(known[:, None], projected / scale, 0.0)


def check_vectors(vectors: Tensor, n_genes: int) -> None:
    """Raise `ValueError` unless there is one finite vector per gene and not all of them are zero."""
    if vectors.ndim != 2 or len(vectors) != n_genes:
        raise ValueError(f"gene vectors need shape ({n_genes}, W), got {tuple(vectors.shape)}")
    if not vectors.isfinite().all() or not vectors.any():
        raise ValueError("gene vectors need finite numbers that are not all zero")
