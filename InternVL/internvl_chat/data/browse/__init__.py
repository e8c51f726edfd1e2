"""Data browser: pages that show records as the model sees them."""
