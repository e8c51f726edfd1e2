"""Write `constraints.txt`: the installed versions of all packages in the image.

python InternVL/docker/make_constraints.py
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("eval", "quantization", "remote", "ui")
FILE = Path(__file__).with_name("constraints.txt")


def closure(name: str, extras: frozenset[str], found: dict[str, str]) -> None:
    """Add the versions of a package's dependencies, including indirect ones, to `found`, keyed by name."""
    package = distribution(name)
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key in found and not requirement.extras:
            continue
        try:
            found[key] = distribution(requirement.name).version.partition("+")[0]
        except PackageNotFoundError as error:
            raise SystemExit(f"{requirement.name} is not installed: pip install -e '.[dev]'") from error
        closure(requirement.name, frozenset(requirement.extras), found)


def main() -> None:
    """Write the file."""
    found: dict[str, str] = {}
    closure("m3llm", frozenset(EXTRAS), found)
    found.pop("m3llm", None)
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    header = "# Tested versions, written by make_constraints.py.\n"
    FILE.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
