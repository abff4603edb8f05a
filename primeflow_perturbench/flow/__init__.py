"""The mathematics of flow matching: paths, losses, guidance and sampling of plain tensors."""
