"""Links installed packages into another environment, which then has those and no more.

Run as `python link_packages.py ENVIRONMENT NAME==VERSION ...` by the Python that has them. They
need not be unpacked and compiled again. What a `.pth` beside them adds does not come along.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path


def link_packages(environment: Path, requirements: list[str]) -> None:
    """Link what each requirement has installed, for the Python that runs this.

    Raises:
        SystemExit: a package is installed in another version.
    """
    paths = {"base": str(environment), "platbase": str(environment)}
    target = Path(sysconfig.get_path("purelib", vars=paths))
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        found = distribution(name)
        if found.version.partition("+")[0] != version:  # "+cpu" is another build of it
            raise SystemExit(f"{name} is installed in version {found.version}, not {version}")
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link = target / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))


if __name__ == "__main__":
    link_packages(Path(sys.argv[1]), sys.argv[2:])
