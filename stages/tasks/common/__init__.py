"""Shared by tasks: reading data, metrics, handling of text, and defaults for the contract."""
