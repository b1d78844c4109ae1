"""How a recovery is scored, one metric a file."""
