"""Web demo."""
