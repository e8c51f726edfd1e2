"""Conversions between checkpoint formats, and their verification: merge, export, parity."""
