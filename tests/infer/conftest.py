"""Fixtures of the inference tests."""

from tests.small_inputs import small_models

__all__ = ["small_models"]
