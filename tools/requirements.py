"""Prints what `pyproject.toml` asks for to build, and for the extras named: one requirement a line.

python tools/requirements.py test lint
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    unknown = [name for name in sys.argv[1:] if name not in extras]
    if unknown:
        sys.exit(f"requirements: pyproject.toml has no extra {', '.join(unknown)}; it has {', '.join(extras)}")
    wanted = [*project["build-system"]["requires"], *(item for name in sys.argv[1:] for item in extras[name])]
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main()
