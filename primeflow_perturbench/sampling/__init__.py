"""Sampling of cells, to memory and to disk."""
