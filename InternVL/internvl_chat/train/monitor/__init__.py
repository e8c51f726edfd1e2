"""Monitoring: metrics, ledger, trackers, console, NaN guard, watchdog and plots."""
