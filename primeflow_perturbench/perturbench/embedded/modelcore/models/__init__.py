"""Models: the base class and the baselines."""

from .base import PerturbationModel
from .decoder_only import DecoderOnly
from .latent_additive import LatentAdditive
from .linear_additive import LinearAdditive

__all__ = ["DecoderOnly", "LatentAdditive", "LinearAdditive", "PerturbationModel"]
