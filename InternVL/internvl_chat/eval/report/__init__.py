"""Evaluation reports: tables, plots, and an HTML page with every item."""
