"""Recovery from merges stored in half precision."""

from lowra.methods.subspace_intersection.half.cavity import SURE
from lowra.methods.subspace_intersection.half.recovery import HalfAnswer, Recoverer, formats

__all__ = ["SURE", "HalfAnswer", "Recoverer", "formats"]
