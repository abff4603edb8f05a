"""Between tensors and biology: conditions, generated cells, expression."""
