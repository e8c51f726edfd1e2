"""Conversions between checkpoint formats: merge, export, parity."""
