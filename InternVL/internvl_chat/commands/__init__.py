"""One module per `m3llm` subcommand. Libraries with slow imports are imported inside functions."""
