"""Launchers of several nodes among each other, without ranks: meetings, news, losses."""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel_core.errors import ConfigError
from parallel_core.launch import nodes
from parallel_core.launch.nodes import FirstNode, News, NodeError, OtherNode, Wanted
from parallel_core.launch.plan import is_listening


def free_pair() -> int:
    """Return a port that is free, as the one after it is."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        if not is_listening(port) and not is_listening(port + 1):
            return port


@pytest.fixture
def meet():
    """Return a function (number of nodes) -> nodes that have met; all are closed in the end."""
    opened = []

    def meet(count: int):
        wanted, port = Wanted(count, 2 * count, restarts=1), free_pair()
        first = FirstNode("127.0.0.1", port, wanted)
        others = [OtherNode(node, "127.0.0.1", port, wanted) for node in range(1, count)]
        opened.extend([first, *others])
        with ThreadPoolExecutor(count) as pool:
            answers = [pool.submit(other.meet, 20) for other in others]
            assert first.wait_for(range(1, count), 20) == []
            own = first.begin(range(1, count), 8848, ["--micro-batch-size", "2"])
            return first, others, [own, *(answer.result() for answer in answers)]

    yield meet
    for one in opened:
        one.close()


def news_of(node) -> list[News]:
    deadline = time.monotonic() + 30
    while not (found := node.take_news()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_nodes_that_meet_hear_the_same(meet):
    _, _, answers = meet(3)
    assert [answer.node for answer in answers] == [0, 1, 2]
    assert {(one.number, one.present, one.port, one.flags) for one in answers} == {
        (1, answers[0].present, 8848, ("--micro-batch-size", "2"))
    }
    assert [name.split(" (127.0.0.1, ")[0] for name in answers[0].present] == ["node 0", "node 1", "node 2"]


def test_what_one_tells_reaches_every_other(meet):
    first, (second, third), answers = meet(3)
    second.tell("has failed: rank 2: killed by signal 9", consequence=False)
    for other in (first, third):
        assert news_of(other) == [News(answers[0].present[1], "has failed: rank 2: killed by signal 9")]
    second.close()  # it has told of its end: it is not lost as well
    first.tell("was asked to stop (SIGTERM)", stop=15)
    assert news_of(third) == [News(answers[0].present[0], "was asked to stop (SIGTERM)", stop=15)]
    assert first.take_news() == []


@pytest.mark.parametrize("gone", [0, 1])
def test_a_launcher_that_has_gone_is_lost_to_the_others_at_once(gone, meet):
    first, others, answers = meet(3)
    everyone = [first, *others]
    everyone[gone].close()
    for other in everyone:
        if other is not everyone[gone]:
            assert news_of(other) == [News(other_name(answers, gone, other is first), "is lost: its launcher has gone")]


def other_name(answers, gone: int, is_first: bool) -> str:
    """The others know node 0 by MASTER_ADDR alone: nobody tells them its host."""
    return answers[0].present[gone] if gone or is_first else "node 0 (127.0.0.1)"


def test_a_node_that_says_nothing_is_lost(meet, monkeypatch):
    first, (second, third), answers = meet(3)
    monkeypatch.setattr(nodes, "SILENCE_S", 2.0)
    monkeypatch.setattr(nodes, "_BEAT_S", 0.1)
    monkeypatch.setattr(second, "_every_link", lambda: [])  # it is stopped: it reads nothing and says nothing
    monkeypatch.setattr(second, "_look_at_clock", lambda: None)
    for other in (first, third):
        assert [(news.node, news.said.split(" for ")[0]) for news in news_of(other)] == [
            (answers[0].present[1], "is lost: nothing has come from it")
        ]


def test_everyone_is_done_when_all_are(meet):
    first, (second,), _ = meet(2)
    first.tell_done()
    time.sleep(0.3)
    assert not first.everyone_is_done
    second.tell_done()
    deadline = time.monotonic() + 30
    while not (first.everyone_is_done and second.everyone_is_done):
        assert time.monotonic() < deadline
    first.close()
    time.sleep(0.3)
    assert second.take_news() == []


def test_a_node_that_comes_again_takes_part_in_the_next_start(meet):
    first, (second,), answers = meet(2)
    again = OtherNode(1, "127.0.0.1", second._port - 1, second.wanted)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(again.meet, 20)
        assert news_of(first) == [News(answers[0].present[1], "is lost: its launcher was started anew")]
        first.leave_start()
        assert first.wait_for([1], 20) == []
        assert first.begin([1], 9000).number == answer.result().number == 2
    first.end("enough")
    assert again.meet(20) == "enough"
    again.close()


def test_what_is_given_must_be_the_same_everywhere(meet):
    first, (second,), _ = meet(2)
    stranger = OtherNode(1, "127.0.0.1", second._port - 1, Wanted(2, 8, restarts=1))
    with pytest.raises(ConfigError, match=r"node 1 has NNODES=2, NPROC=8, AUTO_RESTART=1, and node 0 .*NPROC=4"):
        stranger.meet(20)
    stranger.close()
    said = (b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 1}\n', b"[" * 70_000, b'{"hello": "1", "host": "\\u0007"}\n')
    for garbage in said:
        with socket.create_connection(("127.0.0.1", second._port)) as connection:
            connection.sendall(garbage)
            connection.settimeout(20)
            assert not answers_of(connection)
    assert first.take_news() == []


def answers_of(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""


def test_where_nobody_is():
    with pytest.raises(NodeError, match=r"node 0 at 127.0.0.1, port \d+, cannot be reached for 0.1 s"):
        OtherNode(1, "127.0.0.1", free_pair(), Wanted(2, 2)).meet(0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 1
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port + 1} cannot be listened on"):
            FirstNode("127.0.0.1", port, Wanted(2, 2))
    with pytest.raises(ConfigError, match="give a lower one"):
        FirstNode("127.0.0.1", 65535, Wanted(2, 2))
