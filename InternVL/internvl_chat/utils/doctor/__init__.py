"""Hardware and software checks of `m3llm doctor`, with advice for each problem."""
