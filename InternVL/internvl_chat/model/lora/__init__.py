"""LoRA adapters: injection, layer and parameter names."""
