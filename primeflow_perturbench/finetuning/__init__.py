"""Continue training of a model on other cells, with weights matched by name."""
