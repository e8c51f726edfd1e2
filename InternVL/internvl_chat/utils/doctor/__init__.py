"""Inspections of a machine for `m3llm doctor`: hardware and software, with advice for each problem."""
