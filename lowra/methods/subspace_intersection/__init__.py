"""Subspace intersection: recovery in closed form, exact from three models on. See `method` for the idea."""

from lowra.methods.subspace_intersection.method import SubspaceIntersection

__all__ = ["SubspaceIntersection"]
