"""LoRA adapters: injection, layers and names."""
