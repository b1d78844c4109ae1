"""Real checkpoints in, the base model out: what `lowra.recover` and `lowra.recover_checkpoints` do."""
