"""Compiles the C++ kernels once per user and machine, and loads them.

The library is plain C functions over raw pointers, loaded with ctypes; `Tensor.data_ptr()` and synchronous PyNative
make that safe on CPU. Compiling takes about 5 s, a call 3 us; an operator built with MindSpore's `ops.CustomOpBuilder`
compiles its headers too (28 s) and passes the operator dispatch at every call (20 us).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from parallel_core.bundled import cache_folder
from parallel_core.errors import printable
from parallel_core.ops.cache import (
    CacheError,
    building_lock,
    in_memory,
    open_private_folder,
    read_sealed,
    scratch_folder,
    write_sealed,
)

logger = logging.getLogger(__name__)

SOURCE_FOLDERS = ("ops/csrc", "comm/csrc")
"""Folders of C++ sources, relative to the package."""

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fopenmp-simd",
    "-pthread",
)
COMPILE_LIMIT_S = 300.0


class BuildError(Exception):
    """The kernels cannot be compiled or loaded here; the message is one line that says why."""


def load() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them when this user's cache has none for these sources and this machine.

    Several processes may call this at once: one compiles, the others wait for it.

    Raises:
        BuildError: without a compiler, without a folder that is private, or if compiling or loading fails.
    """
    try:
        descriptor = _built_library()
    except (OSError, subprocess.SubprocessError, CacheError) as error:
        raise BuildError(f"the kernels cannot be built here: {error}") from error
    # Loaded by its descriptor: what was checked, not what stands under its name by now.
    path = f"/proc/self/fd/{descriptor}"
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise BuildError(f"the compiled kernels cannot be loaded: {error}") from error
    finally:
        os.close(descriptor)


def compiler_version() -> str:
    """Return the first line of what the compiler says of itself.

    Raises:
        BuildError: without a compiler.
    """
    said = subprocess.run([_compiler(), "--version"], capture_output=True, check=False, timeout=60, text=True).stdout
    return printable(said.splitlines()[0]) if said else "an unknown compiler"


def cached_library() -> str | None:
    """Return the name of the kernels that are compiled already for these sources and this machine, or None.

    Raises:
        BuildError: without a compiler.
    """
    name = f"kernels-{_fingerprint(_compiler())}.so"
    return name if (cache_folder() / name).is_file() else None


def sources() -> list[Path]:
    """Return the C++ files in a fixed order."""
    package = Path(__file__).resolve().parent.parent
    return [path for folder in SOURCE_FOLDERS for path in sorted((package / folder).glob("*.cpp"))]


def _built_library() -> int:
    """Return a descriptor of the library in the cache."""
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    folder = _private_folder()
    try:
        library = read_sealed(folder, name)
        if library is None:
            if name in os.listdir(folder):
                logger.warning("kernels: the cached library %s is damaged and is made again", name)
            known = partial(_is_there, folder, name)
            with building_lock(folder, f"{name}.lock", COMPILE_LIMIT_S, known):
                library = read_sealed(folder, name) or _compile_into(folder, name, compiler)
    finally:
        os.close(folder)
    return library


def _compile_into(folder: int, name: str, compiler: str) -> int:
    data = _compile(compiler)
    try:
        write_sealed(folder, name, data)
    except OSError as error:  # a full disk, a quota
        logger.warning("kernels: %s cannot be kept (%s); every process compiles for itself", name, error.strerror)
        return in_memory(data)
    return read_sealed(folder, name) or in_memory(data)


def _is_there(folder: int, name: str) -> bool:
    library = read_sealed(folder, name)
    if library is not None:
        os.close(library)
    return library is not None


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler (g++, c++ or clang++) is installed")


def _private_folder() -> int:
    """Return a descriptor of the cache folder, or of one that lives as long as the machine's temporary files.

    A folder that the user has named is taken or refused; the usual one, where it cannot be used, is replaced.
    """
    if os.environ.get("PARALLEL_CORE_CACHE"):
        try:
            return open_private_folder(cache_folder())
        except CacheError as error:
            raise BuildError(f"PARALLEL_CORE_CACHE={error}; name a folder that only you can write") from None
    reasons = []
    for folder in (cache_folder(), Path(tempfile.gettempdir()) / f"parallel_core-{os.getuid()}"):
        try:
            descriptor = open_private_folder(folder)
        except CacheError as error:
            reasons.append(str(error))
            continue
        if reasons:
            logger.warning("kernels: %s; kept in %s instead", reasons[0], folder)
        return descriptor
    raise BuildError("; ".join(reasons))


def _fingerprint(compiler: str) -> str:
    """Return a hash of everything that the machine code depends on."""
    digest = hashlib.sha256()
    for path in sources():
        for file in (path, *sorted(path.parent.glob("*.h"))):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    mindspore = importlib.metadata.version("mindspore")
    for part in (version, repr(FLAGS).encode(), mindspore.encode(), platform.machine().encode(), cpu_flags()):
        digest.update(part)
    return digest.hexdigest()[:20]


def cpu_flags() -> bytes:
    """Return the line of /proc/cpuinfo that lists what the CPU can do; without one, its name."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _compile(compiler: str) -> bytes:
    """Return the library, compiled from all sources at once and linked."""
    with scratch_folder() as name:
        scratch = Path(name)
        deadline = time.monotonic() + COMPILE_LIMIT_S
        running = []
        for i, source in enumerate(sources()):
            command = [compiler, *FLAGS, "-c", str(source), "-o", str(scratch / f"{i}.o")]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running.append((source.name, process))
        failures = [_outcome(compiler, f"on {source}", process, deadline) for source, process in running]
        failure = next(filter(None, failures), "")
        if failure:
            raise BuildError(failure)
        built = scratch / "kernels.so"
        objects = [str(scratch / f"{i}.o") for i in range(len(running))]
        command = [compiler, *FLAGS, "-shared", *objects, "-o", str(built)]
        link = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        failure = _outcome(compiler, "to link", link, deadline)
        if failure:
            raise BuildError(failure)
        return built.read_bytes()


def _outcome(compiler: str, what: str, process: subprocess.Popen[str], deadline: float) -> str:
    """Wait for a compiler's process, end it at the deadline, and return what went wrong, or ""."""
    try:
        _, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{compiler} {what} took longer than {COMPILE_LIMIT_S:g} s"
    return f"{compiler} failed {what}: {_first_error(errors)}" if process.returncode else ""


def _first_error(output: str) -> str:
    lines = [printable(line.strip()) for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
