"""Velocity networks: ``forward(x (B, G), t (B,), condition (B, C)) -> (B, G)``."""
