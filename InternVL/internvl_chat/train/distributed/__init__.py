"""Parallel training strategies (DDP, FSDP2, DeepSpeed), the launcher, and stop signals."""
