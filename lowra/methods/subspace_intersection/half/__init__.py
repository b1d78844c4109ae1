"""Recovery from merges stored in half precision."""

from lowra.methods.subspace_intersection.half.recovery import HalfAnswer, Recoverer, formats

__all__ = ["HalfAnswer", "Recoverer", "formats"]
