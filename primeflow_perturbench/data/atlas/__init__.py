"""Many h5ad files as one set of cells, described by a manifest and read as training asks for them."""
