"""What the pieces need, on a machine that has a GPU and no package registry.

`make gpu-wheels` fills a folder elsewhere, which is carried along with the checkout. Nothing that
the machine's Python has is replaced: what it lacks goes into `build/gpu/site`.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WHEELS = ROOT / "build" / "gpu" / "wheels"
SITE = ROOT / "build" / "gpu" / "site"
MOST_WHEELS_MIB = 60
PYTHON = "3.12"
"""The Python of the GPU machine."""
OF_TORCH = (
    "filelock", "jinja2", "markupsafe", "mpmath", "networkx", "numpy", "setuptools", "sympy",
    "torch", "typing-extensions",
)  # fmt: skip
"""What is left out because it comes with torch there."""
NOT_NEEDED = ("grpcio", "googleapis-common-protos", "hf-xet", "opentelemetry-", "pillow")
"""What is left out because no piece uses it."""
FOR_TESTS = (
    "attrs", "hypothesis", "iniconfig", "pluggy", "pytest", "pytest-timeout", "regex",
    "sortedcontainers", "transformers",
)  # fmt: skip


def wanted() -> list[str]:
    """The pinned requirements whose wheels are carried."""
    base = _pinned("base.txt")
    chosen = [
        line
        for name, line in base.items()
        if name not in OF_TORCH and not name.startswith(NOT_NEEDED)
    ]
    return [*chosen, *(line for name, line in _pinned("dev.txt").items() if name in FOR_TESTS)]


def _pinned(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text().split()
    return {line.partition("==")[0]: line for line in lines if "==" in line}


def download() -> int:
    """Fill the folder of wheels; returns an exit code."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    glibc = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"),
            *("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}"),
            *("--implementation=cp", *glibc, "--platform=manylinux2014_x86_64"),
            *("--platform=manylinux1_x86_64", "-d", str(WHEELS), *wanted()),
        ],
        check=True,
    )
    size = sum(path.stat().st_size for path in WHEELS.glob("*.whl")) / 2**20
    print(f"{len(list(WHEELS.glob('*.whl')))} wheels, {size:.0f} MiB, in {WHEELS}")
    if size > MOST_WHEELS_MIB:
        print(f"more than {MOST_WHEELS_MIB} MiB are not carried: leave something out of OF_TORCH")
    return int(size > MOST_WHEELS_MIB)


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def environment() -> dict[str, str]:
    """The environment of the processes of pieces."""
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _imports() -> str:
    """The last line of what importing the package fails with; empty if it works."""
    tried = subprocess.run(
        [sys.executable, "-c", "import holdfast._native, holdfast.trainer.config"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if tried.returncode == 0 else last_line(tried.stderr)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output").strip()


def prepare(timeout_s: float) -> str:
    """Make the package importable. Returns why it is not; empty if it is.

    What Python lacks is installed from the carried wheels; the extension is built where a compiler
    is.
    """
    for old in SITE.glob("holdfast*"):  # of an earlier state of the checkout
        shutil.rmtree(old)
    if not _imports():
        return ""
    SITE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    into = ["--no-deps", "--no-index", "--no-compile", "--upgrade", "--target", str(SITE)]
    missing = [
        str(wheel)
        for wheel in sorted(WHEELS.glob("*.whl"))
        if not _has(re.sub(r"[_.]", "-", wheel.name.partition("-")[0]))
    ]
    try:
        if missing:
            subprocess.run([*pip, *into, *missing], check=True, timeout=timeout_s, cwd=ROOT)
        if "_native" in (reason := _imports()) or "holdfast" in reason:
            built = subprocess.run(
                [*pip, *into, "--no-build-isolation", "."],
                env=environment(),
                cwd=ROOT,
                timeout=timeout_s,
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                return f"the extension was not built: {last_line(built.stderr)}"
    except (subprocess.SubprocessError, OSError) as error:
        return str(error)
    return _imports()


if __name__ == "__main__":
    sys.exit(download())
