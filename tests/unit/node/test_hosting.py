"""What a node reports of its instances when one of them is no more."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import pytest

from llumnix.cluster import InstanceLoad
from llumnix.dataplane.frames import Submit
from llumnix.engine.sim.instance import SimEngine
from llumnix.node.hosting import Hosting
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import SMALL, Gate
from tests.kit.requests import core_request


class Nobody:
    """An API server that does not care what becomes of its requests."""

    node = "a"

    def deliver(self, frame: object, stats: object = None) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("how", ["dies", "stops", "goes"])
def test_no_request_stays_in_the_report_of_an_instance_that_is_gone(how: str) -> None:
    """A drain would wait for it, and new requests would go elsewhere."""

    @on_loop
    async def check() -> None:
        reports: list[Sequence[InstanceLoad]] = []
        home = Nobody()
        exchange: Any = Namespace(hosted={})
        servers: Any = Namespace(home=lambda: home, tried=True)
        registry: Any = Namespace(report_loads=reports.append, withdraw_instance=lambda i: None)
        gate = Gate()
        hosting = Hosting(
            *(exchange, servers, registry),
            make_engine=lambda instance, slot: SimEngine(instance, SMALL, gate.clock()),
            by_priority=False,
            look=lambda: None,
        )
        hosted = hosting.make("a-0", 0)
        await hosted.start(lambda reason: None)
        await hosted.submit(home, Submit("a-0", 1, 1, core_request("r1", [1, 2])))
        await soon(lambda: reports and reports[-1][0].waiting == 1)
        if how == "dies":
            assert isinstance(hosted.engine, SimEngine)
            hosted.engine.die("instance a-0 died: killed")
        elif how == "stops":
            await hosted.stop(1.0)
        else:
            hosting.withdraw("a-0")
        await soon(lambda: not any(load.waiting for load in reports[-1]))
        assert len(reports[-1]) == (how != "goes")
        await hosted.engine.stop(1.0)
        hosting.stop()
        before = len(reports)
        hosting._reporter.changed()
        assert hosting._reporter._timer is None and len(reports) == before

    check()
