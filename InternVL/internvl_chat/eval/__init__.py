"""Figures for a checkpoint: losses and answers over data sets."""
