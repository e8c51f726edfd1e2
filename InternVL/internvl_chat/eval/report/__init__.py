"""Reports of an evaluation: tables, plots, and an HTML page with every item."""
