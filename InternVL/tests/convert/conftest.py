"""Fixtures for the conversion tests."""

from model.conftest import folder

__all__ = ["folder"]
