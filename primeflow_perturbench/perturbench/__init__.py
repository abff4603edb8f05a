"""PerturBench: the one doorway to it, and an embedded subset that answers at its names."""
