"""Checks of this machine: software, cores, memory, shared memory, ports, disk, Ascend."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from parallel_core.doctor.ascend_versions import versions_fit
from parallel_core.doctor.finding import BAD, GOOD, NOTE, Finding
from parallel_core.errors import ConfigError, printable
from parallel_core.launch.host_memory import RANK_BYTES, host_memory
from parallel_core.launch.plan import device_target, is_listening, master_port

_PYTHONS = ((3, 10), (3, 12))
_REQUIRED = {
    "mindspore": ((2, 10), (2, 11)),
    "numpy": ((1, 24), (2, 0)),
    "pyyaml": ((6, 0), (7, 0)),
    "sentencepiece": ((0, 2), (1, 0)),
    "safetensors": ((0, 4), (1, 0)),
}
"""Package -> the first version that works, the first one that is not known to."""
_LEAST_MEMORY = 2 << 30
_LEAST_DISK = 2 << 30
_PROBE_BYTES = 64 << 20
_SLOW_DISK = 50e6


def python() -> Iterator[Finding]:
    """The interpreter is one that MindSpore has packages for."""
    version = ".".join(map(str, sys.version_info[:3]))
    fits = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]
    advice = "" if fits else "use Python 3.10, 3.11 or 3.12: MindSpore has no packages for others"
    yield Finding("Python", GOOD if fits else BAD, f"{version} ({sys.executable})", advice)


def packages() -> Iterator[Finding]:
    """What the package needs is installed, in versions that work together."""
    for name, (first, beyond) in _REQUIRED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, BAD, "is not installed", f"pip install '{_wanted(name, first, beyond)}'")
            continue
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        fits = first <= numbers < beyond
        advice = "" if fits else f"pip install '{_wanted(name, first, beyond)}'"
        yield Finding(name, GOOD if fits else BAD, version, advice)


def _wanted(name: str, first: tuple[int, int], beyond: tuple[int, int]) -> str:
    return f"{name}>={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}"


def kernels() -> Iterator[Finding]:
    """The C++ kernels are there, or can be compiled."""
    advice = "apt-get install g++ (or your system's compiler): a step takes about half the time with compiled kernels"
    begun = time.monotonic()
    try:
        from parallel_core.ops.build import BuildError, compiler_version, load
    except ImportError as error:
        yield Finding("compiler", NOTE, f"not looked at: {error}", "install what is missing above first")
        return
    try:
        compiler = compiler_version()
        load()
    except BuildError as error:
        yield Finding("compiler", NOTE, str(error), advice)
        return
    yield Finding("compiler", GOOD, f"{compiler}; kernels loaded in {time.monotonic() - begun:.1f} s")


def cores() -> Iterator[Finding]:
    """How many cores a run may use, by affinity and by the container's quota, and how busy they are."""
    allowed = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    text = f"{allowed} of {os.cpu_count()} may be used" + ("" if quota is None else f", a quota of {quota:g}")
    busy = os.getloadavg()[0]
    if quota is not None and quota < allowed:
        yield Finding("cores", NOTE, text, f"start at most {max(1, int(quota))} ranks here: the quota is less than the "
                      "cores, so ranks would take them from each other")  # fmt: skip
    elif busy > allowed:
        yield Finding("cores", NOTE, f"{text}; load average {busy:.1f}", "other programs use the cores: ranks that "
                      "wait for each other wait for those too")  # fmt: skip
    else:
        yield Finding("cores", GOOD, f"{text}; load average {busy:.1f}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > allowed:
        yield Finding("OMP_NUM_THREADS", NOTE, threads, "unset it: the launcher gives every rank its share")


def _cpu_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> Iterator[Finding]:
    """There is memory for a rank, whatever the container allows."""
    host = host_memory()
    free, total, limit, where = host.free, host.total, host.limit, ""
    if limit is not None and limit[0] - limit[1] < free:
        free, total, where = limit[0] - limit[1], limit[0], " (the container's)"
    found = f"{_size(free)} of {_size(total)} free{where}"
    if free < _LEAST_MEMORY:
        yield Finding("memory", BAD, found, f"end other programs: a rank takes {_size(RANK_BYTES)} before its model")
    else:
        yield Finding("memory", GOOD, found)


_OPEN_ANOTHERS = "import os, sys; os.close(os.open(f'/proc/{sys.argv[1]}/fd/{sys.argv[2]}', os.O_RDWR))"


def shared_memory() -> Iterator[Finding]:
    """Ranks of one host can map each other's anonymous memory."""
    try:
        descriptor = os.memfd_create("parallel_core_doctor")
    except OSError as error:
        yield Finding("shared memory", NOTE, f"memfd_create: {error.strerror}", _OVER_MCCL)
        return
    try:
        os.truncate(descriptor, 1 << 20)
        command = [sys.executable, "-I", "-c", _OPEN_ANOTHERS, str(os.getpid()), str(descriptor)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.close(descriptor)
    if done.returncode:
        reason = printable((done.stderr.strip().splitlines() or ["no message"])[-1])
        yield Finding("shared memory", NOTE, f"one process cannot open another's: {reason}", _OVER_MCCL)
    else:
        yield Finding("shared memory", GOOD, "processes of this user can share anonymous memory")


_OVER_MCCL = "ranks of this host will use MCCL, several times slower; allow it in the container's seccomp profile"


def ports() -> Iterator[Finding]:
    """There is a port for the scheduler, and this machine reaches itself."""
    environment = dict(os.environ)
    try:
        port = master_port(environment, check=environment.get("NODE_RANK", "0") in ("", "0"))
    except ConfigError as error:
        yield Finding("ports", BAD, str(error))
        return
    listens = is_listening(port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        try:
            socket.create_connection(server.getsockname(), timeout=5).close()
        except OSError as error:
            yield Finding("ports", BAD, f"127.0.0.1 does not answer: {error}", "bring the loopback device up: "
                          "ip link set lo up")  # fmt: skip
            return
    name = "MASTER_PORT" if environment.get("MASTER_PORT") else "a free port"
    yield Finding("ports", GOOD, f"{name}: {port}{' (something listens on it)' if listens else ''}; loopback answers")


def files() -> Iterator[Finding]:
    """A process may have enough files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    state, advice = (GOOD, "") if soft >= 1024 else (NOTE, f"ulimit -n {min(max(hard, soft), 65536)}")
    yield Finding("open files", state, f"at most {soft} a process", advice)


def disk(folder: Path) -> Iterator[Finding]:
    """Checkpoints and logs have room in `folder`, and it takes them at a speed."""
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".parallel_core_doctor") as file:
            block, begun = os.urandom(1 << 20), time.monotonic()
            for _ in range(min(_PROBE_BYTES, free // 4) >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
            speed = written / max(time.monotonic() - begun, 1e-9)
    except OSError as error:
        yield Finding("disk", BAD, f"{folder}: {error.strerror or error}", "name one that can be written: --folder")
        return
    found = f"{folder}: {_size(free)} free, {speed / 1e6:.0f} MB/s written"
    if free < _LEAST_DISK:
        yield Finding("disk", BAD, found, "make room, or save elsewhere (--save, LOG_DIR): a checkpoint takes 12 "
                      "bytes a parameter")  # fmt: skip
    elif speed < _SLOW_DISK:
        yield Finding("disk", NOTE, found, "checkpoints will be slow: --async-save writes them in the background")
    else:
        yield Finding("disk", GOOD, found)


_ASCEND = Path("/usr/local/Ascend")


def ascend(root: Path = _ASCEND, devices: Path = Path("/dev")) -> Iterator[Finding]:
    """Driver and CANN are there where there is an NPU, and CANN knows where it is."""
    found = sorted(path.name for path in devices.glob("davinci[0-9]*"))
    target = device_target(os.environ)
    if not found:
        if target == "Ascend":
            yield Finding("Ascend", BAD, "asked for or npu-smi is there, and /dev/davinci* is not",
                          "load the driver, give the container its devices, or set DEVICE_TARGET=CPU")  # fmt: skip
        else:
            yield Finding("Ascend", GOOD, "no NPU here: runs compute on the CPU")
        return
    yield Finding("Ascend", GOOD, f"{len(found)} NPU(s): {', '.join(found)}")
    home = Path(os.environ.get("ASCEND_HOME_PATH") or root / "ascend-toolkit" / "latest")
    versions = []
    for what, places, advice in (
        ("driver", [root / "driver" / "version.info"], "install the driver (npu-smi info then shows the devices)"),
        ("CANN", [home / "version.cfg", home / "compiler" / "version.info",
                  *sorted(home.glob("*/ascend_toolkit_install.info"))],
         f"install CANN, then source {root}/ascend-toolkit/set_env.sh"),
    ):
        version = next(filter(None, map(_version_in, places)), "")
        versions.append(version)
        yield Finding(what, GOOD if version else BAD, version or f"not found at {places[0]}", "" if version else advice)
    if all(versions):
        yield from versions_fit(versions[0], versions[1])
    if not os.environ.get("ASCEND_HOME_PATH"):
        yield Finding("CANN's environment", BAD, "ASCEND_HOME_PATH is not set",
                      f"source {root}/ascend-toolkit/set_env.sh")  # fmt: skip


def _version_in(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")[:65536]
    except OSError:
        return ""
    match = re.search(r"version\w*\s*=\s*\[?([\w.:-]+)", text, re.IGNORECASE)
    return printable(match[1]) if match else ""


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GB"
