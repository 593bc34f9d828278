"""Fixtures of the tests of tasks."""

from tests.small_inputs import small_models

__all__ = ["small_models"]
