"""`m3llm serve`: serve a model through an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import os

from internvl_chat.commands.common import (
    add_model_arguments,
    add_preprocessing_arguments,
    add_server_arguments,
    load_preprocessing,
    model_name,
    positive,
    require_packages,
)
from internvl_chat.constants import API_KEY_VARIABLE
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    add = parser.add_argument
    add("model", help="model folder, adapter folder or hub id")
    add_server_arguments(parser, port=8000)
    add("--api_key", help=f"API key that clients must send (default: ${API_KEY_VARIABLE}; if unset, none)")
    add("--served_model_name", metavar="NAME",
        help="name of the model in requests (default: name of the folder, or hub id)")  # fmt: skip
    add("--max_queue", type=positive, default=100, metavar="N",
        help="maximum number of queued requests (default: 100)")  # fmt: skip
    add_preprocessing_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve a model until the process is interrupted."""
    require_packages("serve", "fastapi", "uvicorn")
    from internvl_chat.inference.engine import Engine
    from internvl_chat.inference.scheduler import Scheduler
    from internvl_chat.inference.serve.app import create_app
    from internvl_chat.model.io.folders import model_folder
    from internvl_chat.utils.web import open_socket, run_app

    opened = open_socket(args.host, args.port)
    folder = model_folder(args.model)
    preprocessing = load_preprocessing(args, folder)
    engine = Engine.from_checkpoint(folder, device=args.device, base=args.base, preprocessing=preprocessing)
    key = args.api_key or os.environ.get(API_KEY_VARIABLE) or None
    name = args.served_model_name or model_name(args.model, folder)
    logger.info("model name in requests: %s", name)
    with Scheduler(engine, max_queue=args.max_queue) as scheduler:
        app = create_app(scheduler, name, key)
        run_app(app, opened, on_interrupt=scheduler.stop, has_key=key is not None)
    return 0
