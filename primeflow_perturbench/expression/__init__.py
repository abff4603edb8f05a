"""Expression values: the space of the flow, the detection limit and training statistics."""
