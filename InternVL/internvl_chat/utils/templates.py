"""Jinja templates of the HTML pages in a package."""

from importlib.resources import files

import jinja2


def templates(package: str) -> jinja2.Environment:
    """Return a Jinja environment for the HTML templates in the folder `templates` of a package."""
    folder = files(package) / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(folder)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
