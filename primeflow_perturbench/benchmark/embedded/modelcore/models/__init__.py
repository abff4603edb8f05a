"""Models: the base class and the baselines."""

from .base import PerturbationModel

__all__ = ["PerturbationModel"]
