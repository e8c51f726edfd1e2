"""Parallel layouts (DDP, FSDP2, DeepSpeed), the launcher and stop signals."""
