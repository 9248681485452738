"""The launchers of a job of several nodes: they meet before every start, and each hears of it when another is gone.

Node 0 listens on the port after MASTER_PORT; the others keep a connection to it. What they say are lines of JSON. Every
launcher says something every two seconds, so a node whose connection stays open, but from which nothing comes (cut off,
stopped, without power), is lost to the others after `SILENCE_S`; one whose launcher has ended, at once.
"""

from __future__ import annotations

import abc
import contextlib
import json
import platform
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel_core.errors import ConfigError, ParallelCoreError, printable
from parallel_core.records import Record, parse_json

SILENCE_S = 20.0
"""How long a node may say nothing."""
_BEAT_S = 2.0
_MOST_BYTES = 1 << 16
_MOST_GUESTS = 64
"""Connections that have not said yet which node they are."""
_MOST_TEXT = 2000


class NodeError(ParallelCoreError, RuntimeError):
    """The nodes of a job do not come together, or one of them says what no launcher says."""


@dataclass(frozen=True)
class Wanted:
    """What must be the same on every node.

    Attributes:
        nodes: NNODES.
        ranks: NPROC.
        restarts: AUTO_RESTART.
        elastic: --elastic.
    """

    nodes: int
    ranks: int
    restarts: int = 0
    elastic: bool = False

    def __str__(self) -> str:
        more = " and --elastic" if self.elastic else ""
        return f"NNODES={self.nodes}, NPROC={self.ranks}, AUTO_RESTART={self.restarts}{more}"


@dataclass(frozen=True)
class Meeting:
    """What node 0 says of a start.

    Attributes:
        number: counts the starts, from 1.
        node: this node's place among those that take part.
        present: the names of those, in order: `node 1 (10.0.0.2, name of the host)`.
        port: of the scheduler, on node 0.
        flags: arguments that come after the command's own.
    """

    number: int
    node: int
    present: tuple[str, ...]
    port: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class News:
    """What became of another node.

    Attributes:
        node: its name.
        said: what goes after that in a sentence.
        consequence: it follows from something else.
        stop: the signal that asked that node to stop; 0 where it failed or is lost.
    """

    node: str
    said: str
    consequence: bool = False
    stop: int = 0


class _Link:
    """A connection to another launcher. Nothing that is done with it blocks."""

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._partial = connection, b""
        self.address = printable(str(connection.getpeername()[0]))
        self.name = name
        self.heard = time.monotonic()
        self.told = 0
        """The start whose end it has told of itself."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a line. One that does not fit into the system's buffer goes to somebody who does not read."""
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._socket.send(line) != len(line):
                self._socket.shutdown(socket.SHUT_RDWR)  # the rest would be taken for another line

    def hear(self) -> list[dict[str, Any]] | None:
        """Return the lines that have arrived; None when the connection is of no more use."""
        try:
            data = self._socket.recv(_MOST_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data or len(self._partial) > _MOST_BYTES:
            return None
        self.heard = time.monotonic()
        try:
            said = [parse_json(line, f"what {self.address} says", NodeError) for line in lines]
        except NodeError:
            return None
        return said if all(isinstance(message, dict) for message in said) else None

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come for too long."""
        return time.monotonic() - self.heard > SILENCE_S

    def close(self) -> None:
        self._socket.close()


class Nodes(abc.ABC):
    """This launcher's connection with those of the other nodes; a thread keeps it, all else is one caller's."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._changed = threading.Condition()
        self._start = 0
        """Number of the start under way; 0 outside of one."""
        self._news: list[News] = []
        self._everyone_is_done = False
        self._closed = False
        self._beat_at = 0.0
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    # ---- during a start ---------------------------------------------------------------------------------------------
    def take_news(self) -> list[News]:
        """Return what became of other nodes in this start since the last call."""
        with self._changed:
            found, self._news = self._news, []
            return found

    @property
    def everyone_is_done(self) -> bool:
        """Whether the ranks of every node have ended well."""
        with self._changed:
            return self._everyone_is_done

    @abc.abstractmethod
    def tell_done(self) -> None:
        """Say that the ranks of this node have ended well."""

    @abc.abstractmethod
    def tell(self, said: str, *, consequence: bool = False, stop: int = 0) -> None:
        """Say what became of this node's part of the start.

        Args:
            said: what goes after its name in a sentence.
            consequence: something else led to it.
            stop: the signal by which it was asked to stop.
        """

    def leave_start(self) -> None:
        """Take note that this node's part of the start has ended: what comes now belongs to none."""
        with self._changed:
            self._start, self._news = 0, []

    def close(self) -> None:
        """Leave the other nodes for good."""
        with self._changed:
            self._closed = True
            for link in self._every_link():
                link.close()
        if self._thread.is_alive():
            self._thread.join()

    def _begin(self, number: int) -> None:
        self._start, self._news, self._everyone_is_done = number, [], False

    # ---- the thread -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                sources = self._every_link()
            try:
                readable = select.select(sources, [], [], 0.2)[0]
            except (OSError, ValueError):
                continue  # one of them was closed meanwhile
            with self._changed:
                if self._closed:
                    return
                for source in readable:
                    self._read(source)
                self._look_at_clock()
                if time.monotonic() - self._beat_at >= _BEAT_S:
                    self._beat_at = time.monotonic()
                    for link in self._every_link():
                        if isinstance(link, _Link):
                            link.say({"beat": 1})
                self._changed.notify_all()

    @abc.abstractmethod
    def _every_link(self) -> list[Any]:
        """Return what the thread waits for."""

    @abc.abstractmethod
    def _read(self, source: Any) -> None:
        """Take what has come by one of them."""

    @abc.abstractmethod
    def _look_at_clock(self) -> None:
        """Give up those from whom nothing has come."""


class FirstNode(Nodes):
    """Node 0, where the others meet.

    Args:
        address: MASTER_ADDR.
        port: MASTER_PORT; the one after it is listened on.
        wanted: what every node must say.

    Raises:
        ConfigError: the port after MASTER_PORT cannot be listened on.
    """

    def __init__(self, address: str, port: int, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.name = _name(0, address, platform.node())
        self._starts = 0
        self._server = _listen(address, port)
        self._guests: list[_Link] = []
        self._links: dict[int, _Link] = {}
        self._ready: set[int] = set()
        self._members: set[int] = set()
        """Other nodes that take part in the start."""
        self._done: set[int] = set()
        self._names: dict[int, str] = {}
        self._thread.start()

    def named(self, nodes: Sequence[int]) -> str:
        """Return nodes in words, with their addresses where they have been here."""
        with self._changed:
            return ", ".join(self._names.get(node, f"node {node}") for node in nodes)

    def wait_for(self, nodes: Sequence[int], seconds: float) -> list[int]:
        """Wait until `nodes` are ready for a start, and return those of them that are not.

        Args:
            nodes: by NODE_RANK.
            seconds: how long, at most.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while set(nodes) - self._ready and time.monotonic() < deadline:
                self._changed.wait(0.2)
            return sorted(set(nodes) - self._ready)

    def ready(self) -> list[int]:
        """Return the other nodes that are ready for a start."""
        with self._changed:
            return sorted(self._ready)

    def begin(self, nodes: Sequence[int], port: int, flags: Sequence[str] = ()) -> Meeting | None:
        """Begin a start; None when one of the nodes is not ready any more.

        Args:
            nodes: the others that take part.
            port: of the scheduler.
            flags: what every node adds to its command.
        """
        with self._changed:
            if set(nodes) - self._ready:
                return None
            self._starts += 1
            self._begin(self._starts)
            self._members, self._done = set(nodes), set()
            self._ready -= self._members
            present = [self.name, *(self._links[node].name for node in sorted(nodes))]
            for place, node in enumerate(sorted(nodes), 1):
                said = {"start": self._starts, "node": place, "present": present, "port": port, "flags": [*flags]}
                self._links[node].say(said)
            return Meeting(self._starts, 0, tuple(present), port, tuple(flags))

    def end(self, said: str = "") -> None:
        """Tell every node that there is no further start, and why."""
        with self._changed:
            for link in self._links.values():
                link.say({"end": said[:_MOST_TEXT]})

    def tell_done(self) -> None:
        """Say that the ranks of this node have ended well."""
        with self._changed:
            self._note_done(0)

    def tell(self, said: str, *, consequence: bool = False, stop: int = 0) -> None:
        """Say to every other node what became of this one's part."""
        with self._changed:
            self._pass_on(News(self.name, said[:_MOST_TEXT], consequence, stop), 0)

    def _note_done(self, node: int) -> None:
        self._done.add(node)
        if self._done >= {0, *self._members}:
            self._everyone_is_done = True
            for member in self._members & self._links.keys():
                self._links[member].say({"done": self._start})

    def _pass_on(self, news: News, source: int) -> None:
        for node in (self._members & self._links.keys()) - {source}:
            self._links[node].say({**vars(news), "news": self._start})

    # ---- what the others say ----------------------------------------------------------------------------------------
    def _every_link(self) -> list[Any]:
        return [self._server, *self._guests, *self._links.values()]

    def _read(self, source: Any) -> None:
        if source is self._server:
            with contextlib.suppress(OSError):
                guest = _Link(self._server.accept()[0])
                for oldest in self._guests[: len(self._guests) - _MOST_GUESTS + 1]:
                    self._drop(oldest, "")
                self._guests.append(guest)
            return
        messages = source.hear()
        try:
            for message in messages or ():
                if source in self._guests:
                    self._welcome(source, message)
                elif (node := self._node_of(source)) is not None:
                    self._take(node, source, message)
        except NodeError:
            messages = None
        if messages is None:
            self._drop(source, "its launcher has gone")

    def _node_of(self, link: _Link) -> int | None:
        return next((node for node, one in self._links.items() if one is link), None)

    def _welcome(self, link: _Link, message: Mapping[str, Any]) -> None:
        """Take a connection for the node that it says it is, or refuse it."""
        said = Record(message, "a greeting", NodeError)
        node, name = said.integer("hello"), printable(said.text("host"))[:256]
        theirs = Wanted(said.integer("nodes"), said.integer("ranks"), said.integer("restarts"), said.flag("elastic"))
        if theirs != self.wanted or not 0 < node < self.wanted.nodes:
            link.say({"refused": f"node {node} has {theirs}, and node 0 {self.wanted}; give every node the same, and a "
                      "NODE_RANK of its own"})  # fmt: skip
            self._drop(link, "")
            return
        if node in self._links:
            self._drop(self._links[node], "its launcher was started anew")
        self._guests.remove(link)
        link.name = self._names[node] = _name(node, link.address, name)
        self._links[node] = link
        self._ready.add(node)

    def _take(self, node: int, link: _Link, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            self._ready.add(node)
        elif not self._start or node not in self._members:
            return
        elif message.get("done") == self._start:
            self._note_done(node)
        elif message.get("news") == self._start:
            link.told = self._start
            news = _decode(message, link.name)
            self._news.append(news)
            self._pass_on(news, node)

    def _drop(self, link: _Link, why: str) -> None:
        """Close a connection; where it was that of a node that takes part, everybody hears why."""
        node = self._node_of(link)
        link.close()
        self._guests = [one for one in self._guests if one is not link]
        if node is None:
            return
        del self._links[node]
        self._ready.discard(node)
        if self._start and node in self._members and link.told != self._start and not self._everyone_is_done:
            news = News(link.name, f"is lost: {why}")
            self._news.append(news)
            self._pass_on(news, node)

    def _look_at_clock(self) -> None:
        for link in [link for link in (*self._guests, *self._links.values()) if link.is_silent]:
            self._drop(link, _SILENT)


class OtherNode(Nodes):
    """A node but the first.

    Args:
        node: NODE_RANK.
        address: MASTER_ADDR.
        port: MASTER_PORT.
        wanted: what this node is told.
    """

    def __init__(self, node: int, address: str, port: int, wanted: Wanted) -> None:
        super().__init__(wanted)
        self._node, self._address, self._port = node, address, port + 1
        self._link: _Link | None = None
        self._answer: Mapping[str, Any] | None = None
        self._thread.start()

    def meet(self, seconds: float) -> Meeting | str:
        """Wait until node 0 begins a start, and return what it says of it, or why there is none any more.

        A node that node 0 goes on without waits for the next start.

        Args:
            seconds: how long node 0 may not be there.

        Raises:
            ConfigError: node 0 is given other variables.
            NodeError: node 0 cannot be reached, or says what it never says.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            if self._link is not None:
                self._link.say({"ready": self._node})
        while True:
            reason = self._connect()
            with self._changed:
                while self._answer is None and self._link is not None:
                    self._changed.wait(0.2)
                    deadline = time.monotonic() + seconds
                answer, self._answer = self._answer, None
                if answer is not None:
                    return self._read_answer(answer)
            if time.monotonic() > deadline:
                raise NodeError(
                    f"node 0 at {self._address}, port {self._port}, cannot be reached for {seconds:g} s: {reason}"
                )
            time.sleep(0.2)

    def _connect(self) -> str:
        """Connect to node 0 unless that is done, and return why it cannot be done, if so."""
        if self._link is not None or self._answer is not None:
            return ""
        try:
            connection = socket.create_connection((self._address, self._port), timeout=_BEAT_S)
            link = _Link(connection, _name(0, self._address, ""))
        except OSError as error:
            return str(error.strerror or error)
        with self._changed:
            self._link = link
            link.say({"hello": self._node, "host": platform.node(), **vars(self.wanted)})
        return ""

    def _read_answer(self, answer: Mapping[str, Any]) -> Meeting | str:
        said = Record(answer, "what node 0 says", NodeError)
        if "refused" in answer:
            raise ConfigError(printable(said.text("refused")))
        if "end" in answer:
            return printable(str(answer["end"]))
        present, flags = _texts(said, "present"), _texts(said, "flags")
        place = said.integer("node", minimum=1, maximum=len(present) - 1)
        port = said.integer("port", minimum=1, maximum=65535)
        self._begin(said.integer("start", minimum=1))
        return Meeting(self._start, place, tuple(map(printable, present)), port, flags)

    def tell_done(self) -> None:
        """Say that the ranks of this node have ended well."""
        with self._changed:
            if self._link is not None:
                self._link.say({"done": self._start})

    def tell(self, said: str, *, consequence: bool = False, stop: int = 0) -> None:
        """Say to node 0, which passes it on, what became of this node's part."""
        with self._changed:
            if self._link is not None:
                self._link.say({**vars(News("", said[:_MOST_TEXT], consequence, stop)), "news": self._start})

    # ---- what node 0 says -------------------------------------------------------------------------------------------
    def _every_link(self) -> list[Any]:
        return [] if self._link is None else [self._link]

    def _read(self, source: Any) -> None:
        if self._link is None or source is not self._link:
            return
        messages = self._link.hear()
        try:
            for message in messages or ():
                self._take(self._link, message)
        except NodeError:
            messages = None
        if messages is None:
            self._drop("its launcher has gone")

    def _take(self, link: _Link, message: Mapping[str, Any]) -> None:
        if {"start", "end", "refused"} & message.keys():
            self._answer = message
        elif not self._start:
            return
        elif message.get("done") == self._start:
            self._everyone_is_done = True
        elif message.get("news") == self._start:
            news = _decode(message)
            if news.node.startswith("node 0 "):
                link.told = self._start
            self._news.append(news)

    def _drop(self, why: str) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        link.close()
        if self._start and link.told != self._start and not self._everyone_is_done:
            self._news.append(News(link.name, f"is lost: {why}"))

    def _look_at_clock(self) -> None:
        if self._link is not None and self._link.is_silent:
            self._drop(_SILENT)


_SILENT = f"nothing has come from it for {SILENCE_S:g} s"


def _name(node: int, address: str, host: str) -> str:
    return f"node {node} ({printable(address)}{', ' if host else ''}{printable(host)})"


def _decode(message: Mapping[str, Any], node: str = "") -> News:
    said = Record(message, "news", NodeError)
    return News(
        node=node or printable(said.text("node"))[:_MOST_TEXT],
        said=printable(said.text("said"))[:_MOST_TEXT],
        consequence=said.flag("consequence"),
        stop=said.integer("stop", minimum=0, maximum=64),
    )


def _texts(said: Record, key: str) -> tuple[str, ...]:
    found = said.sequence(key)
    if not all(isinstance(item, str) for item in found):
        said.refuse(key, "a list of texts")
    return tuple(found)


def _listen(address: str, port: int) -> socket.socket:
    """Return a server at the port after `port`."""
    if port >= 65535:
        raise ConfigError(f"MASTER_PORT={port}: the launchers of nodes meet at the port after it; give a lower one")
    try:
        family, *_, where = socket.getaddrinfo(address, port + 1, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={address} is no address: {error.strerror or error}") from None
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(where)
        server.listen(_MOST_GUESTS)
        server.setblocking(False)
    except OSError as error:
        server.close()
        raise ConfigError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: the launchers of several nodes meet at the port after it, and "
            f"{address}:{port + 1} cannot be listened on ({error.strerror or error}); MASTER_ADDR is an address of "
            "node 0 itself, and nothing else uses these two ports"
        ) from None
    return server
