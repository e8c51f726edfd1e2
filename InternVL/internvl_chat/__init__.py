"""M3LLM: fine-tuning of InternVL3 on compound medical figures.

The names in `__all__` form the public Python API (docs/python_api.md). Each is imported on first use.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_chat.api import evaluate, finetune, load, open_datasets
    from internvl_chat.convert.export import export_hf
    from internvl_chat.convert.merge import merge
    from internvl_chat.inference.engine import ask
    from internvl_chat.inference.sampling import Sampling

__version__ = "0.1.0"

__all__ = ["Sampling", "ask", "evaluate", "export_hf", "finetune", "load", "merge", "open_datasets"]

# Importing peft imports torchao and bitsandbytes, which log warnings that no user can act on. Importing torch
# resets the levels of its loggers, but not their filters.
for _name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)

_MODULES = {"Sampling": "inference.sampling", "ask": "inference.engine", "export_hf": "convert.export",
            "merge": "convert.merge"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
