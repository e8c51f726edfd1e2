"""M3LLM: fine-tuning InternVL3 into a medical model that understands compound figures."""

__version__ = "0.1.0"
