"""The commands of `m3llm`, one module a subject; libraries that load slowly are imported when used."""
