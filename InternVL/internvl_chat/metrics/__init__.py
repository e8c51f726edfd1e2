"""Figures for answers by comparison with what they should be."""
