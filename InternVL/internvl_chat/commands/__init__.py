"""One module per `m3llm` subcommand; slow libraries are imported inside functions."""
