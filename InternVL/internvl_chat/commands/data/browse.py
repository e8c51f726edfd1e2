"""`m3llm data browse`: page through records as the model sees them, in a web browser."""

import argparse
from pathlib import Path

from internvl_chat.commands.common import (
    add_data_root,
    add_length_arguments,
    add_preprocessing_arguments,
    add_server_arguments,
    add_tokenizer_model,
    load_encoder,
    require_packages,
)
from internvl_chat.utils.errors import DataError, format_problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data browse`."""
    help_text = "meta file (like PMC-data.json), or annotation file with --image_root"
    parser.add_argument("meta", metavar="META", type=Path, help=help_text)
    add_tokenizer_model(parser)
    add_server_arguments(parser, port=8010)
    add_data_root(parser)
    add_preprocessing_arguments(parser)
    add_length_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the data browser until it is interrupted."""
    require_packages("data browse", "fastapi", "uvicorn", "jinja2")
    from internvl_chat.data.audit.checks import open_readable_sets
    from internvl_chat.data.browse.app import create_app
    from internvl_chat.data.browse.catalog import BackgroundIndex, Catalog
    from internvl_chat.data.browse.pages import Pages
    from internvl_chat.data.sources.meta import load_meta
    from internvl_chat.utils.web import open_socket, run_app

    with open_socket(args.host, args.port) as opened:
        specs, encoder = load_meta(args.meta, args.data_root, args.image_root), load_encoder(args)
        sets, problems = open_readable_sets(specs, encoder)
        if not sets:
            raise DataError(format_problems([str(problem) for problem in problems]))
        catalog = Catalog(sets, problems)
        run_app(create_app(Pages(catalog, BackgroundIndex(catalog), args.meta.name)), opened)
    return 0
