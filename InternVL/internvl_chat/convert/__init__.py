"""Conversions between checkpoint formats (merge, export) and their verification (parity)."""
