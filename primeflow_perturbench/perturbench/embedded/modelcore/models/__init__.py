"""The base class of models, and baselines."""

from .base import PerturbationModel
from .decoder_only import DecoderOnly
from .latent_additive import LatentAdditive
from .linear_additive import LinearAdditive

__all__ = ["DecoderOnly", "LatentAdditive", "LinearAdditive", "PerturbationModel"]
