"""The names other packages import today; they move to `lowra.checkpoints.reading`."""

from lowra.checkpoints.reading import StoredState, component_folder, load_state_dict, resolve, with_weights

__all__ = ["StoredState", "component_folder", "load_state_dict", "resolve", "with_weights"]
