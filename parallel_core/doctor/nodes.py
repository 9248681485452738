"""Checks between nodes: every one runs the doctor with the variables of the launch, and node 0 waits for the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from parallel_core import __version__
from parallel_core.doctor.finding import BAD, GOOD, NOTE, Finding
from parallel_core.errors import ConfigError, printable
from parallel_core.launch.plan import integer

_MOST_SKEW_S = 1.0
_MOST_BYTES = 1 << 16
_PROBE_BYTES = 8 << 20


def nodes(wait_s: float, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """The nodes of NNODES reach node 0 at MASTER_ADDR and MASTER_PORT; clocks and versions agree.

    Args:
        wait_s: seconds that the nodes wait for each other.
        clock: tells this node's time.
    """
    environment = os.environ
    try:
        count = integer(environment, "NNODES", 1)
        own = integer(environment, "NODE_RANK", 0, minimum=0, example=0)
        port = integer(environment, "MASTER_PORT", 0, example=8848)
    except ConfigError as error:
        yield Finding("nodes", BAD, str(error))
        return
    if count == 1:
        return
    address = environment.get("MASTER_ADDR", "")
    if not address or not port:
        yield Finding("nodes", BAD, f"NNODES={count} without MASTER_ADDR and MASTER_PORT", "set both, alike everywhere")
        return
    if own == 0:
        yield from _as_first(address, port, count, wait_s, clock)
    else:
        yield from _as_other(address, port, own, wait_s, clock)


def _about(node: int, clock: Callable[[], float]) -> dict[str, Any]:
    return {
        "node": node,
        "host": platform.node(),
        "time": clock(),
        "version": __version__,
        "mindspore": _mindspore(),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _mindspore() -> str:
    try:
        return importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _as_first(address: str, port: int, count: int, wait_s: float, clock: Callable[[], float]) -> Iterator[Finding]:
    deadline = time.monotonic() + wait_s
    missing = set(range(1, count))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
        except OSError as error:
            yield Finding("nodes", BAD, f"{address}:{port} cannot be listened on: {error.strerror}", "MASTER_ADDR is "
                          "an address of node 0 itself, and nothing else uses MASTER_PORT")  # fmt: skip
            return
        server.listen()
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection, (peer, *_) = server.accept()
                with connection:
                    connection.settimeout(30)
                    stream = connection.makefile("rwb")
                    theirs = _read(stream)
                    _write(stream, _about(0, clock))
                    length = int(theirs.get("probe", 0))
                    received = 0
                    while received < min(length, _PROBE_BYTES):
                        block = stream.read1(1 << 20)
                        if not block:
                            break
                        received += len(block)
                    _write(stream, {"received": received})
                    node = theirs.get("node")
                    if node in missing:
                        missing.discard(node)
                        found = f"{printable(str(theirs.get('host')))} at {peer} reaches this node"
                        yield from _compare(f"node {node}", found, _about(0, clock), theirs)
    for node in sorted(missing):
        yield Finding(f"node {node}", BAD, f"did not call within {wait_s:g} s", "run the doctor there at the same time "
                      f"with NODE_RANK={node}; is a firewall in front of {address}:{port}?")  # fmt: skip


def _as_other(address: str, port: int, own: int, wait_s: float, clock: Callable[[], float]) -> Iterator[Finding]:
    deadline, reason = time.monotonic() + wait_s, "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, wait_s)) as connection:
                connection.settimeout(30)
                stream = connection.makefile("rwb")
                begun, sent = time.monotonic(), clock()
                _write(stream, {**_about(own, clock), "probe": _PROBE_BYTES})
                theirs = _read(stream)
                trip = time.monotonic() - begun
                begun = time.monotonic()
                stream.write(bytes(_PROBE_BYTES))
                stream.flush()
                _read(stream)
                speed = _PROBE_BYTES / (time.monotonic() - begun)
        except (OSError, ValueError) as error:
            reason = str(error)
            time.sleep(0.5)
            continue
        mine = {**_about(own, clock), "time": sent + trip / 2}
        found = f"{printable(str(theirs.get('host')))} answers in {trip * 1e3:.1f} ms, takes {speed / 1e6:.0f} MB/s"
        yield from _compare("node 0", found, mine, theirs, trip)
        return
    yield Finding("node 0", BAD, f"{address}:{port} cannot be reached: {reason}", "run the doctor on node 0 at the "
                  "same time; check the address, the route and the firewall")  # fmt: skip


def _compare(
    what: str, found: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], trip: float = 0.0
) -> Iterator[Finding]:
    yield Finding(what, GOOD, found)
    for name in ("version", "mindspore", "python"):
        if mine[name] != theirs.get(name):
            yield Finding(what, BAD, f"{name} {printable(str(theirs.get(name)))} there, {mine[name]} here",
                          "install the same versions on every node")  # fmt: skip
    skew = float(theirs.get("time", 0.0)) - mine["time"]
    if abs(skew) > _MOST_SKEW_S + trip:
        yield Finding(what, NOTE, f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}", "synchronise "
                      "the clocks (NTP, chrony): the first failure of a run is found by its time")  # fmt: skip


def _write(stream: Any, value: Mapping[str, Any]) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def _read(stream: Any) -> dict[str, Any]:
    value = json.loads(stream.readline(_MOST_BYTES))
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
