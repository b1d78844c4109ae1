"""Model folders as files: reading, matching, writing; always in the checkpoint's own names."""
