"""Fixtures of the engines' tests."""

from tests.small_inputs import small_models

__all__ = ["small_models"]
