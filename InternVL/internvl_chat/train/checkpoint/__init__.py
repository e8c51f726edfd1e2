"""Checkpoints: saving in the background, integrity, resuming, and the output folder."""
