"""What an engine core says of the exception that ends it, by which a poisonous request is known."""

import asyncio
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llumnix.engine.base import Death, EngineEvents
from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.instance import Patience, VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes import fault
from llumnix.engine.vllm.processes.launcher import Placement
from tests.chaos.orders import FOLDER, POISON
from tests.kit.deaths import DEADLINE, engine_config
from tests.kit.requests import core_request


def test_what_a_core_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, str(tmp_path / fault.FILE))
    core: Any = Namespace(
        scheduler=Namespace(at_hand=lambda: {"r2", "r1"}), model_executor=Namespace()
    )
    fault.write(core)
    assert fault.read(tmp_path) is None, "nothing has been raised"
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        core.model_executor.is_failed = True
        fault.write(core)
        assert fault.read(tmp_path) is None, "a worker was killed"
        core.model_executor.is_failed = False
        fault.write(core)
    assert fault.read(tmp_path) == fault.Fault("ZeroDivisionError", ["r1", "r2"])
    (tmp_path / fault.FILE).write_bytes(b"{")
    assert fault.read(tmp_path) is None


class Base:
    """A scheduler of vLLM's that fails where it is told to."""

    fails = ""
    running: tuple[str, ...] = ()
    structured_output_manager = None

    def _do(self, what: str) -> Any:
        if self.fails == what:
            raise RuntimeError(what)
        return Namespace(scheduled_new_reqs=[], num_scheduled_tokens={"r1": 4, "r2": 1})

    def add_request(self, request: Any) -> None:
        self._do("add")

    def schedule(self) -> Any:
        return self._do("schedule")

    def update_from_output(self, step: Any, output: Any) -> Any:
        return self._do("update")


@pytest.mark.parametrize(
    ("fails", "blamed"),
    [("add", {"new"}), ("schedule", set()), ("step", {"r1", "r2"}), ("update", {"r1", "r2"})],
)
def test_what_a_scheduler_has_at_hand(
    monkeypatch: pytest.MonkeyPatch, fails: str, blamed: set[str]
) -> None:
    class Failing(scheduler._Moving, Base):
        """As the real ones are made."""

    monkeypatch.setattr(scheduler, "BlockHolds", lambda scheduler: None)
    monkeypatch.setattr(scheduler, "put_in_place", lambda request, manager: None)
    one = Failing()
    new: Any = Namespace(request_id="new", num_output_tokens=0, structured_output_request=None)
    one.add_request(new)
    one.update_from_output(one.schedule(), None)
    assert one.at_hand() == set()
    one.fails = fails
    if fails == "add":
        with pytest.raises(RuntimeError):
            one.add_request(new)
    elif fails == "schedule":
        with pytest.raises(RuntimeError):
            one.schedule()
    else:
        step = one.schedule()
        if fails == "update":
            with pytest.raises(RuntimeError):
                one.update_from_output(step, None)
    assert one.at_hand() == blamed


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["poison", "signal"])
def test_a_real_core_names_its_exception_and_the_step(model: str, tmp_path: Path, how: str) -> None:
    async def check() -> None:
        config = engine_config(model, "tests.chaos.executor.FaultyExecutor")
        assert scheduler.install(config)
        died: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        engine = VllmEngine(
            *("a-0", config, Placement({FOLDER: str(tmp_path)}), tmp_path / "a-0.log"),
            *(Patience(DEADLINE), Rendezvous("", {}, "")),
        )
        begun = asyncio.Event()
        try:
            await engine.start(EngineEvents(lambda outputs: begun.set(), died.set_result))
            await engine.add(core_request("other", [1, 2], 400))
            await asyncio.wait_for(begun.wait(), DEADLINE)
            if how == "poison":
                await engine.add(core_request("poison", [*POISON, 5], 4))
            else:
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
            death = await asyncio.wait_for(died, DEADLINE)
        finally:
            await engine.stop(0.0)
        if how == "poison":
            assert death.exception == "RuntimeError" and "poison" in death.requests
        else:
            assert (death.exception, death.requests) == ("", frozenset())

    asyncio.run(check())  # a first engine leaves this process its fork server
