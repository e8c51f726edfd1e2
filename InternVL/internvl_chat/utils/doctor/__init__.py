"""Inspections of hardware and software for `m3llm doctor`."""
