"""Recovery methods, one file each, named as their config key in `conf/methods`."""

from lowra.methods.base import (
    FunctionMethod,
    Method,
    Observation,
    Recovery,
    as_method,
    check_observation,
    check_recovery,
)

__all__ = ["FunctionMethod", "Method", "Observation", "Recovery", "as_method", "check_observation", "check_recovery"]
