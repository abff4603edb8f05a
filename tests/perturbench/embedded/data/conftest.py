"""Hand-made cells, whose expression values identify cell and gene."""

from collections.abc import Callable, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

GENES = ["g0", "g1", "g2", "g3"]


@pytest.fixture
def make_cells() -> Callable[..., ad.AnnData]:
    """Return a function from (label, group) pairs to cells, with the value 10 c + g + 1 for gene g in cell c."""

    def make(rows: Sequence[tuple[str, str]], kind: Callable = sp.csr_matrix, **obs) -> ad.AnnData:
        table = pd.DataFrame(rows, columns=["condition", "cell_type"]).assign(**obs)
        table.index = [f"cell{number}" for number in range(len(rows))]
        values = 10 * np.arange(len(rows))[:, None] + np.arange(len(GENES)) + 1
        return ad.AnnData(kind(values.astype(np.float32)), obs=table, var=pd.DataFrame(index=GENES))

    return make


@pytest.fixture
def cells(make_cells) -> ad.AnnData:
    """Two groups, each with controls, two single perturbations and their combination."""
    labels = ["P", "control", "P+Q", "Q", "control", "P"]
    return make_cells([(label, group) for group in ("b", "a") for label in labels])
