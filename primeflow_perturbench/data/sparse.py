"""CSR matrices that grow row by row in an HDF5 file, so that memory holds one block of cells at a time."""

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.io import sparse_dataset, write_elem


def append_rows(parent: h5py.Group, name: str, rows: sp.csr_matrix, **storage: object) -> None:
    """Append rows to the matrix ``parent[name]``; the first call creates it.

    Parameters
    ----------
    parent
        Open and writable: the file, or its group ``layers``.
    name
        Name of the matrix.
    rows
        Shape (n_rows, n_genes). The first call fixes the type of the values.
    **storage
        Chunks and compression of a new matrix, as `h5py.Group.create_dataset` takes them.
    """
    if name in parent:
        sparse_dataset(parent[name]).append(rows)
        return
    first = sp.csr_matrix(rows)  # shares its arrays with rows
    # Row pointers outgrow 32 bits in a file of a million cells; column indices never do.
    first.indptr = first.indptr.astype(np.int64)
    write_elem(parent, name, first, dataset_kwargs=storage)
