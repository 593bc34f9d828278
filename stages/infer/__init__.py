"""Samples and adapters in, predictions out."""
