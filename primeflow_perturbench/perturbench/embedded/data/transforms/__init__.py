"""Transforms of batches."""
