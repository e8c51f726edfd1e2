"""`m3llm web`: ask one or two models about figures, in a web browser."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from internvl_chat.commands.common import (
    add_model_arguments,
    add_preprocessing_arguments,
    add_server_arguments,
    load_preprocessing,
    model_name,
    require_packages,
)
from internvl_chat.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `web`."""
    add = parser.add_argument
    add("model", help="model folder, adapter folder or hub id")
    add("other", nargs="?", help="second model, to compare the answers")
    add_server_arguments(parser, port=8020)
    add_preprocessing_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the demo until the process is interrupted."""
    require_packages("web", "fastapi", "uvicorn", "jinja2")
    from internvl_chat.inference.engine import Engine
    from internvl_chat.inference.scheduler import Scheduler
    from internvl_chat.inference.web.app import create_app
    from internvl_chat.model.io.folders import model_folder
    from internvl_chat.utils.web import open_socket, run_app

    with ExitStack() as stack:
        opened = stack.enter_context(open_socket(args.host, args.port))
        given = [args.model] if args.other is None else [args.model, args.other]
        folders = [model_folder(name) for name in given]
        names = _names(given, folders)
        options = [load_preprocessing(args, folder) for folder in folders]
        engines = [
            Engine.from_checkpoint(folder, device=args.device, base=args.base, preprocessing=preprocessing)
            for folder, preprocessing in zip(folders, options, strict=True)
        ]
        schedulers = [stack.enter_context(Scheduler(engine)) for engine in engines]

        def stop() -> None:
            for scheduler in schedulers:
                scheduler.stop()

        run_app(create_app(dict(zip(names, schedulers, strict=True))), opened, on_interrupt=stop)
    return 0


def _names(given: list[str], folders: list[Path]) -> list[str]:
    """Return the names of the models on the page; if they are equal, the models as given on the command line.

    Raises:
        UsageError: both models are the same.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError(f"both models are {given[0]}; give two different ones to compare them")
    names = [model_name(name, folder) for name, folder in zip(given, folders, strict=True)]
    return names if len({*names}) == len(names) else given
