"""The steps of a migration over a real link: what is asked, answered and refused arrives."""

from typing import Any

import pytest

from llumnix.cluster import InstanceId
from llumnix.engine.base import EngineDead, EngineError, NoRoom, RequestEnded, SetupFailed, Transfer
from llumnix.migration.errors import BLAMELESS, Ended, FailureKind, MigrationError, kind_of
from llumnix.migration.messages import (
    Done,
    Failure,
    Meet,
    Move,
    Moved,
    Receive,
    Received,
    Reserve,
    Reserved,
    ask,
    serve,
)
from tests.kit.loop import on_loop
from tests.kit.mesh import mesh

both = pytest.mark.parametrize("node", ["a", "b"])  # which is asked, by a


@both
@on_loop
async def test_a_step_and_its_reply_arrive_as_they_were(node: str) -> None:
    async with mesh("a", "b") as nodes:
        asked: list[Any] = []

        async def reserve(instance: InstanceId, step: Reserve) -> Reserved:
            asked.append((instance, step))
            return Reserved(1)

        async def move(instance: InstanceId, step: Move) -> Moved:
            asked.append((instance, step))
            return Moved("r", instance, step.destination, "moved", 0.5, 1, 2, 3, 4)

        for one in nodes:
            serve(one.exchange, Reserve, reserve)
            serve(one.exchange, Move, move)
        hashes, any_room = Reserve("m", [b"\x00\xff", b""]), Move("b-1", "drain")
        exchange = nodes[0].exchange
        assert await ask(exchange, node, "b-0", hashes, 5.0) == Reserved(1)
        moved = await ask(exchange, node, "b-0", any_room, 5.0)
        assert moved == Moved("r", "b-0", "b-1", "moved", 0.5, 1, 2, 3, 4)
        assert asked == [("b-0", hashes), ("b-0", any_room)], "with bytes, and any number of blocks"


@both
@pytest.mark.parametrize(
    ("error", "kind", "arrives"),
    [
        (Ended("request r-1 has ended"), FailureKind.ENDED, MigrationError),
        (RequestEnded("request r-1 has ended"), FailureKind.ENDED, MigrationError),
        (NoRoom("13 KV blocks are needed and 0 are free"), FailureKind.NO_ROOM, MigrationError),
        (MigrationError("4 come", FailureKind.NO_ROOM), FailureKind.NO_ROOM, MigrationError),
        (SetupFailed("no way"), FailureKind.NO_WAY, SetupFailed),
        (EngineDead("instance b-0 is gone"), FailureKind.DEAD, EngineDead),
        (MigrationError("after 3 stages 9 blocks are left"), FailureKind.OTHER, MigrationError),
        (EngineError("13 KV blocks are needed"), FailureKind.OTHER, MigrationError),
    ],
)
@on_loop
async def test_a_failure_arrives_with_its_sentence_and_its_kind(
    node: str, error: EngineError, kind: FailureKind, arrives: type[EngineError]
) -> None:
    """Only what says nothing about the pair of instances is held against neither."""
    async with mesh("a", "b") as nodes:

        async def meet(instance: InstanceId, step: Meet) -> Done:
            raise error

        for one in nodes:
            serve(one.exchange, Meet, meet)
        with pytest.raises(EngineError) as failed:
            await ask(nodes[0].exchange, node, "b-0", Meet("p", "g", 1.0, 0), 5.0)
        assert str(failed.value) == str(error) and type(failed.value) is arrives
        assert kind_of(failed.value) is kind
        blameless = kind in (FailureKind.ENDED, FailureKind.NO_ROOM)
        assert (kind_of(failed.value) in BLAMELESS) is blameless


@on_loop
async def test_a_node_of_another_version() -> None:
    """It sends more, or less, or knows other kinds of failures, or no such step."""
    async with mesh("a", "b") as (a, b):
        answer: dict[str, Any] = {"reply": {"bytes": 7, "new": 1}, "failure": None}

        async def procedure(instance: InstanceId, fields: Any) -> Any:
            return answer

        step = Receive.of("m", Transfer("p", "g", 1, 2, 3.0))
        with pytest.raises(EngineError, match=r"a peer may not call migration\.Receive"):
            await ask(a.exchange, "b", "b-0", step, 5.0)
        b.exchange.procedures["migration.Receive"] = procedure
        assert await ask(a.exchange, "b", "b-0", step, 5.0) == Received(7)
        answer = {"failure": {"kind": "too cold", "sentence": "it is cold"}}
        with pytest.raises(MigrationError, match="it is cold") as cold:
            await ask(a.exchange, "b", "b-0", step, 5.0)
        assert kind_of(cold.value) is FailureKind.OTHER
        answer = {"reply": {}}
        with pytest.raises(EngineError, match="a Received of another version"):
            await ask(a.exchange, "b", "b-0", step, 5.0)

        async def receive(instance: InstanceId, step: Receive) -> Received:
            raise AssertionError("not to be called")

        serve(b.exchange, Receive, receive)
        reply = await a.exchange.call("b", "b-0", "migration.Receive", ({"migration": "m"},), 5.0)
        failure = Failure(**reply["failure"])
        assert "a Receive of another version of llumnix" in failure.sentence
