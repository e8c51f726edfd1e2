"""LoRA adapters: injection, layers and parameter names."""
