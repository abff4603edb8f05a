"""Scores of generated cells, references and the Virtual Cell Challenge."""
