"""lowra: the open benchmark for pre-fine-tuning weight recovery."""

__version__ = "0.1.0"
