"""What counts as an answer that unwelcome clients should not have had."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chaos.mob import Mob


@contextmanager
def server(answer: bytes) -> Iterator[int]:
    """Answers one request, whatever it is."""

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        thread.join(20)


@pytest.mark.parametrize(
    ("answer", "counted", "wrong"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n{}", "refused", False),
        (b"HTTP/1.1 413 Too Large\r\n\r\n{}", "refused", False),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", "unavailable", False),
        (b"", "no answer", False),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "", True),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n{}", "", True),
    ],
)
def test_what_an_answer_counts_as(answer: bytes, counted: str, wrong: bool) -> None:
    mob = Mob({"a": "http://127.0.0.1:1"}, seed=1)
    with server(answer) as port:
        mob._send(port, random.Random(1))
    assert (dict(mob.counts), bool(mob.wrongs)) == ({counted: 1} if counted else {}, wrong)
