"""A worker that reads another one's memory: it learns at once whether the other is still there."""

import socket
import time

from llumnix.engine.vllm.kv.memory_carrier import Lender


def test_a_look_at_the_other_end_never_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname(), 5.0)
        here, _ = server.accept()
    here.settimeout(5.0)  # as a transfer leaves it
    lender = Lender(here)
    try:
        began = time.monotonic()
        assert not lender.gone
        there.sendall(b"x")
        assert not lender.gone, "something has come, so the other lives"
        assert here.recv(1) == b"x", "and a look takes nothing away"
        there.shutdown(socket.SHUT_RDWR)
        while not lender.gone and time.monotonic() - began < 2.0:
            pass
        assert lender.gone
        assert time.monotonic() - began < 2.0
    finally:
        there.close()
        lender.close()
    assert lender.gone
