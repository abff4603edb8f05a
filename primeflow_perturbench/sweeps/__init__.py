"""Sweeps: Hydra's multirun over ablations, leaderboards and searches, with a record of every trial."""
