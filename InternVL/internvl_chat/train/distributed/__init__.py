"""Process groups, parallelism (DDP, FSDP2, DeepSpeed), the launcher and its signals."""
