"""What a run reports: metrics, ledger, trackers, console, NaN guard, watchdog, plots."""
