"""Run report: one HTML page with the configuration, data, curves, validation and warnings of a run."""
