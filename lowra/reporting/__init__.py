"""Tables and figures from records, and the paper's own numbers."""
