"""Compression of trained models; each function returns the new model and a report of what changed and what did not."""
