"""What runs here: the package, MindSpore, the kernels."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from parallel_core import __version__


def describe_versions() -> str:
    """Return a line each for the package, Python, MindSpore, NumPy and the compiled kernels. Starts no MindSpore."""
    lines = [
        f"parallel_core {__version__} ({Path(__file__).resolve().parent})",
        f"Python {platform.python_version()} ({platform.machine()})",
        *(f"{title} {_version(name)}" for title, name in (("MindSpore", "mindspore"), ("NumPy", "numpy"))),
        f"kernels: {kernels()}",
    ]
    return "\n".join(lines)


def kernels() -> str:
    """Return in one line which compiled kernels a run on CPU has here."""
    try:
        from parallel_core.ops.build import BuildError, cached_library, compiler_version
    except ImportError as error:
        return f"cannot be told: {error}"
    try:
        compiler = compiler_version()
        library = cached_library()
    except (BuildError, OSError, importlib.metadata.PackageNotFoundError) as error:
        return f"plain MindSpore operators ({error})"
    if library is None:
        return f"compiled by the first run, by {compiler}"
    return f"{library} in the cache, by {compiler}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
