"""Fixtures of the kill tests."""

from tests.small_inputs import demo_subset, small_models

__all__ = ["demo_subset", "small_models"]
