"""Synthetic figures, questions and answers for the quickstart and the tests."""
