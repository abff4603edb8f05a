"""Simulated screens and atlases with known truth."""
