"""Samples in, adapters out."""
