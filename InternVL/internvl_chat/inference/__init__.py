"""Answer generation."""
