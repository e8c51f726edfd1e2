"""Hardware and software inspections for `m3llm doctor`, with advice for each problem."""
