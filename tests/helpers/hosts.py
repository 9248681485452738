"""Hosts on this machine: each has network, processes, mounts and a host name of its own, joined by a bridge.

The namespaces belong to processes and have no names, so they go with those, at the latest when the test process ends;
nothing of the machine's own network is touched. It takes root; `why_no_hosts` says what is missing.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from parallel_core.launch.processes import children

# Reaps whoever loses its parent, as the first process of a host does, until the test process has gone.
_FIRST = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
_OWN = ("--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def _hold(*flags: str) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    holder = subprocess.Popen(["unshare", *flags, sys.executable, "-c", _FIRST], **pipes)
    holder.stdout.readline()
    return holder


class Host:
    """One host, until `kill`."""

    def __init__(self, network: Network, number: int) -> None:
        self.address = f"10.77.0.{number + 1}"
        self.name = f"host-{number}"
        self._network, self._device = network, f"h{number}"
        self._holder = _hold(*_OWN)
        self.first = children(self._holder.pid)[0].pid
        """Its first process, as this machine counts."""
        link = ("link", "add", self._device, "type", "veth", "peer", "name", "eth0", "netns", str(self.first))
        network.ip(*link)
        network.ip("link", "set", self._device, "master", "wire", "up")
        for words in (
            ("hostname", self.name),
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{self.address}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
        ):
            _run(*self._inside(), *words)

    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--net", "--pid", "--mount", "--uts"]

    def start(
        self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host; what it prints goes to the end of `output`."""
        with output.open("ab") as file:
            return subprocess.Popen(
                [*self._inside(), "--wd=.", *command],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Unplug the host: nothing leaves it any more, not even the end of a connection."""
        self._network.ip("link", "set", self._device, "down")

    def kill(self) -> None:
        """End the host with all of its processes, by SIGKILL."""
        if self._holder.poll() is None:
            os.kill(self.first, signal.SIGKILL)
        self._holder.wait()
        with suppress(subprocess.CalledProcessError):  # The kernel takes it away too, later than the next host comes.
            self._network.ip("link", "delete", self._device)


class Network:
    """A bridge that no host is on yet; a context, at the end of which all hosts are gone."""

    def __init__(self) -> None:
        self._hosts: list[Host] = []

    def __enter__(self) -> Network:
        self._holder = _hold("--net")
        self.ip("link", "add", "wire", "type", "bridge")
        self.ip("link", "set", "wire", "up")
        return self

    def ip(self, *words: str) -> None:
        """Run `ip` where the bridge is."""
        _run("nsenter", "--target", str(self._holder.pid), "--net", "ip", *words)

    def host(self, number: int) -> Host:
        """Return host `number`; where it was killed, a new one."""
        self._hosts.append(Host(self, number))
        return self._hosts[-1]

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.kill()
        self._holder.kill()
        self._holder.wait()


@functools.cache
def why_no_hosts() -> str:
    """Return why there can be no hosts here; empty where there can."""
    missing = [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"no {', no '.join(missing)} on this machine"
    try:
        _run("unshare", *_OWN, "true")
        with Network() as network:
            network.host(0)
    except (subprocess.CalledProcessError, OSError, IndexError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"namespaces of networks and processes cannot be made here: {said.strip()}"
    return ""
