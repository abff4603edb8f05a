"""From gene values to a sequence that a convolution can read, and back; here genes keep their identity.

A convolution shares its weights along the gene axis. Without weights of a gene's own the network
could not tell genes apart, and a permutation of genes would only permute its output.
"""

import torch
from torch import Tensor, nn

from primeflow_perturbench.networks.layers import normalisation, zero_initialised


def read_out_norm(length: int, channels: int) -> nn.GroupNorm:
    """Group normalisation of a sequence; of one position over all channels, since one value has no spread."""
    return normalisation(channels, groups=32 if length > 1 else 1)


class GeneTokens(nn.Module):
    """One token a gene: ``token_g = x_g a + e_g`` with a shared vector ``a`` and the gene's own embedding ``e_g``.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    channels
        Width of a token.
    """

    def __init__(self, n_genes: int, channels: int):
        super().__init__()
        self.length = n_genes
        self.value = nn.Parameter(torch.randn(channels))
        self.embedding = nn.Parameter(torch.randn(channels, n_genes))
        self.read_out = nn.Sequential(
            read_out_norm(self.length, channels), nn.SiLU(), zero_initialised(nn.Conv1d(channels, 1, 3, padding=1))
        )

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, G) of expression (B, G)."""
        return x[:, None, :] * self.value[:, None] + self.embedding

    def values(self, hidden: Tensor) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, G)."""
        return self.read_out(hidden)[:, 0, :]


class GenePatches(nn.Module):
    """Genes in patches of consecutive ones, each gene with a read-in and a read-out vector of its own.

    ``token_p = sum_{g in p} x_g a_g + e_p`` and ``v_g = <h_p, b_g> + c_g``. Nothing is shared between
    genes, and the sequence is ``patch`` times shorter than with a token a gene.

    Parameters
    ----------
    n_genes
        Number of genes, G; the last patch is padded.
    channels
        Width of a token.
    patch
        Genes in a patch.

    Raises
    ------
    ValueError
        If ``patch`` is not positive.
    """

    def __init__(self, n_genes: int, channels: int, patch: int = 8):
        super().__init__()
        if patch < 1:
            raise ValueError(f"gene patches need a patch of at least one gene, got {patch}")
        self.n_genes, self.patch = n_genes, patch
        self.length = -(-n_genes // patch)
        self.read_in = nn.Parameter(torch.randn(self.length, patch, channels) / patch**0.5)
        self.embedding = nn.Parameter(torch.randn(self.length, channels))
        self.norm = read_out_norm(self.length, channels)
        self.read_out = nn.Parameter(torch.zeros(self.length, channels, patch))
        self.bias = nn.Parameter(torch.zeros(n_genes))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, channels, patches) of expression (B, G)."""
        x = nn.functional.pad(x, (0, self.length * self.patch - self.n_genes))
        x = x.view(-1, self.length, self.patch).transpose(0, 1)
        return (torch.bmm(x, self.read_in) + self.embedding[:, None, :]).permute(1, 2, 0)

    def values(self, hidden: Tensor) -> Tensor:
        """Gene values (B, G) of hidden tokens (B, channels, patches)."""
        hidden = nn.functional.silu(self.norm(hidden)).permute(2, 0, 1)
        values = torch.bmm(hidden, self.read_out).transpose(0, 1).flatten(1)
        return values[:, : self.n_genes] + self.bias
