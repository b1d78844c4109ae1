"""Half-precision merges."""
