"""Velocity networks: ``forward(x (B, G), t (B,), condition (B, C)) -> (B, G)``.

A new network is one module here, derived from `description.DescribedModule`, and one YAML in ``configs/model/network``.
"""
