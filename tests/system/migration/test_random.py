"""Many requests, moves and faults at once, at random: no token is lost, doubled or wrong."""

import secrets

import pytest

from llumnix.control.keys import Keys
from llumnix.migration.source import MigrationLimits
from tests.kit.chaos import Chaos
from tests.kit.loop import on_loop
from tests.kit.migrating import Control, cluster

THINGS = 500
ROUNDS = 4  # at most: on a machine that is busy otherwise, many moves are given up for want of time


@pytest.mark.parametrize("seed", [1, 2, 3, 4, "a new one"])
@on_loop
async def test_whatever_happens(controls: dict[str, Control], keys: Keys, seed: int | str) -> None:
    number = seed if isinstance(seed, int) else secrets.randbelow(2**32)
    print(f"the seed is {number}")
    limits = MigrationLimits(max_stages=2, last_stage_max_blocks=1, within=1.0)
    async with cluster(controls, keys, limits=limits, requests_limit=3) as whole:
        for node in "aabbcc":
            await whole.host(node)
        chaos = Chaos(whole, number)
        for _ in range(ROUNDS):
            await chaos.run(THINGS)
            assert not chaos.wrong()
            moved = chaos.outcomes().count("moved")
            ended = sum(s.finish is not None for s in chaos.streams.values())
            print(f"{moved} moves of {len(chaos.moves)}; {ended} ended of {len(chaos.streams)}")
            if moved > 10 and ended > 10:
                return
        pytest.fail("hardly anything has moved, or come to its end")
