"""Compiles the C++ kernels once per user and machine, and loads them.

The library is plain C functions over raw pointers, loaded with ctypes; `Tensor.data_ptr()` and synchronous PyNative
make that safe on CPU. Compiling takes about 5 s, a call 3 us; an operator built with MindSpore's `ops.CustomOpBuilder`
compiles its headers too (28 s) and passes the operator dispatch at every call (20 us).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        BuildError: without a compiler, or if compiling or loading fails.
    """
    path = _built_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def cache_folder() -> Path:
    """Return where compiled kernels are kept: $PARALLEL_CORE_CACHE, else parallel_core in the user's cache folder."""
    chosen = os.environ.get("PARALLEL_CORE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallel_core"


def sources() -> list[Path]:
    """Return the C++ files in a fixed order."""
    package = Path(__file__).resolve().parent.parent
    return [path for folder in SOURCE_FOLDERS for path in sorted((package / folder).glob("*.cpp"))]


def _built_library() -> Path:
    compiler = _compiler()
    folder = _writable_folder()
    library = folder / f"kernels-{_fingerprint(compiler)}.so"
    if library.exists():
        return library
    with _lock(library.with_suffix(".lock")):
        if not library.exists():
            _compile(compiler, library)
    return library


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler (g++, c++ or clang++) is installed")


def _writable_folder() -> Path:
    """Return the cache folder, or a private one that lives as long as the machine's temporary files."""
    for folder in (cache_folder(), Path(tempfile.gettempdir()) / f"parallel_core-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # A folder that somebody else owns could hold a library of theirs.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise BuildError(f"neither {cache_folder()} nor {tempfile.gettempdir()} can be written to")


def _fingerprint(compiler: str) -> str:
    """Return a hash of everything that the machine code depends on."""
    digest = hashlib.sha256()
    for path in sources():
        for file in (path, *sorted(path.parent.glob("*.h"))):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    mindspore = importlib.metadata.version("mindspore")
    for part in (version, repr(FLAGS).encode(), mindspore.encode(), platform.machine().encode(), _cpu_flags()):
        digest.update(part)
    return digest.hexdigest()[:20]


def _cpu_flags() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the operating system drops it when the holder dies."""
    deadline = time.monotonic() + COMPILE_LIMIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {COMPILE_LIMIT_S:g} s") from None
                time.sleep(0.05)
        yield


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = _compile_and_link(compiler, Path(scratch))
        os.replace(built, library)  # atomic: a reader sees the whole library or none


def _compile_and_link(compiler: str, scratch: Path) -> Path:
    """Compile the sources, all at once, and link them."""
    running = []
    for i, source in enumerate(sources()):
        command = [compiler, *FLAGS, "-c", str(source), "-o", str(scratch / f"{i}.o")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        running.append((source.name, process))
    failure = ""
    for name, process in running:
        try:
            _, errors = process.communicate(timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        if process.returncode:
            failure = failure or f"{compiler} failed on {name}: {_first_error(errors)}"
    if failure:
        raise BuildError(failure)
    built = scratch / "kernels.so"
    objects = [str(scratch / f"{i}.o") for i in range(len(running))]
    link = subprocess.run(
        [compiler, *FLAGS, "-shared", *objects, "-o", str(built)],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMPILE_LIMIT_S,
    )
    if link.returncode:
        raise BuildError(f"{compiler} failed to link: {_first_error(link.stderr)}")
    return built


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
