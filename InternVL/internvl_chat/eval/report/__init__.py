"""What an evaluation leaves behind for people: a table, plots, and a page with every item."""
