"""How a subset is made: one builder a model family."""
