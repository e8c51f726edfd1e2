"""Metrics that compare answers with references."""
