"""The InternVL-Chat model: vision tower, projector, language model, LoRA and checkpoints."""
