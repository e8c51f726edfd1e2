"""Checkpoints: saving in the background, the manifest, resuming, the run folder."""
