"""A vLLM engine as an instance: a process, its handshake, and vLLM's own client to talk to it."""

import asyncio
import contextlib
import copy
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import EngineHandshakeMetadata, EngineZmqAddresses
from vllm.v1.executor import Executor

from llumnix.cluster import InstanceId
from llumnix.engine.base import Death, EngineDead, EngineError, EngineEvents, EngineFacts
from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous, VllmBlocks
from llumnix.engine.vllm.processes import fault, segments
from llumnix.engine.vllm.processes.launcher import EngineProcess, Placement
from llumnix.engine.vllm.processes.socket_folder import EngineFolder
from llumnix.engine.vllm.processes.watchdog import Machine, Patience, Watchdog, activity
from llumnix.engine.vllm.resume import with_generated

logger = logging.getLogger(__name__)

T = TypeVar("T")

BASE_PATH = "VLLM_RPC_BASE_PATH"
CLOSE_SECONDS = 10.0  # for the threads behind closed sockets to end


class _Client(AsyncMPClient):
    """vLLM's client to one engine core, which hands its outputs on at once, without a queue."""

    on_outputs: Callable[[EngineCoreOutputs], None] | None = None

    async def process_engine_outputs(self, outputs: EngineCoreOutputs) -> None:
        """Called by the base class for each message of the engine."""
        if self.on_outputs is not None and (outputs.outputs or outputs.scheduler_stats):
            self.on_outputs(
                EngineCoreOutputs(
                    outputs=outputs.outputs,
                    scheduler_stats=outputs.scheduler_stats,
                    timestamp=outputs.timestamp,
                )
            )
        # The base class queues what is left for get_output_async(), which nobody calls here.
        outputs.outputs = []
        outputs.scheduler_stats = None

    def end(self) -> None:
        """End what is behind the sockets, after a shutdown; blocks until its threads have ended.

        vLLM leaves it to the garbage collector, which does not find what something still refers to:
        the threads and descriptors of each engine that had hung stayed.
        """
        # The one that owns it: a shadow of it, which the sockets are of, would leave it dangling.
        self.resources.ctx.term()


class VllmEngine:
    """One vLLM EngineCore in processes of its own."""

    def __init__(
        self,
        instance: InstanceId,
        config: VllmConfig,
        placement: Placement,
        log_file: Path,
        patience: Patience,
        rendezvous: Rendezvous,
        machine: Machine | None = None,  # what it shares with the other engines of its node
    ) -> None:
        self.id = instance
        # The client writes what the engine found out (blocks, lengths) into its configuration.
        self._config = copy.deepcopy(config)
        self._patience = patience
        self._process = EngineProcess(instance, log_file)
        self._sockets = EngineFolder()
        # vLLM's own sockets, between an engine core and its workers, lie beside ours.
        environment = {
            BASE_PATH: os.environ.get(BASE_PATH, self._sockets.name),
            fault.VARIABLE: f"{self._sockets.name}/{fault.FILE}",
            "TMPDIR": self._sockets.name,  # where vLLM leaves files when it is killed
            segments.VARIABLE: segments.prefix(Path(self._sockets.name)),
        }
        self._placement = replace(placement, environment=environment | placement.environment)
        self.blocks = VllmBlocks(self.call, config.parallel_config.world_size, rendezvous)
        self._client: _Client | None = None
        self._watchdog = Watchdog(
            instance,
            lambda: self.call("is_sleeping"),  # answered as soon as no step is under way
            lambda: activity(self._process.pid or 0),
            lambda finding: self._die(f"instance {instance} hangs: {finding}"),
            patience,
            machine or Machine(),
        )
        self._events: EngineEvents | None = None  # from when it is up until it has died
        self._watching: int | None = None
        self._ended: asyncio.Future[None] | None = None  # done when the process is, or stopped
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The EngineCore's process id."""
        return self._process.pid

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Fork the engine core, shake hands and connect. Raises EngineError."""
        try:
            async with asyncio.timeout(self._patience.start):
                self.blocks.open(Path(self._sockets.name))
                await self._handshake()
                facts = await self._connect()
                self._events = events
                self._watchdog.start()
                return facts
        except BaseException as error:
            await self.stop(0.0)
            if isinstance(error, TimeoutError):
                within = f"{self._patience.start:.0f} s; its log is {self._process.log_file}"
                raise EngineError(f"instance {self.id} did not start in {within}") from error
            raise

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        """Send a request to the engine core. Raises EngineDead, EngineError for a bad one."""
        try:
            await self._require().add_request_async(with_generated(request, generated))
        except (EngineDeadError, zmq.ZMQError) as error:
            raise EngineDead(f"instance {self.id} is dead") from error
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            raise EngineError(f"the request can't be sent to an engine: {error}") from error

    async def abort(self, request_ids: list[str]) -> None:
        """Abort requests; a dead engine has none."""
        with contextlib.suppress(EngineDead, EngineDeadError, zmq.ZMQError):
            await self._require().abort_requests_async(request_ids)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a utility method of the engine core. Raises EngineError."""
        try:
            return await self._answer(self._require().call_utility_async(method, *args))
        except EngineError:
            raise
        except EngineDeadError as error:
            raise EngineDead(f"instance {self.id} is dead") from error
        except Exception as error:  # vLLM raises a bare Exception with the engine's message
            raise EngineError(str(error)) from error

    async def _answer(self, work: Awaitable[T], starts: bool = False) -> T:
        """Wait for an answer, which never comes from a process that has ended meanwhile.

        Raises EngineDead, or EngineError that says why it has not come up if it `starts`.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._ended} if self._ended else {task}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if starts:
                self._check_running()
            if not task.done():
                raise EngineDead(f"instance {self.id} is dead")
            return task.result()
        finally:
            task.cancel()

    async def stop(self, timeout: float) -> None:
        """End the process (SIGTERM, then SIGKILL) and close the sockets."""
        self._stopping = True
        self._unwatch()
        self._watchdog.stop()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)  # a start under way ends here
        client, self._client = self._client, None
        if client is not None:
            client.shutdown()
        self.blocks.close()
        await asyncio.to_thread(self._process.stop, timeout)
        if client is not None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await asyncio.to_thread(client.end)
            except TimeoutError:
                logger.error("the sockets of instance %s could not be closed", self.id)
        self._sockets.cleanup()

    def _require(self) -> _Client:
        if self._client is None:
            raise EngineDead(f"instance {self.id} is not running")
        return self._client

    def _address(self, name: str) -> str:
        return f"ipc://{self._sockets.name}/{name}"

    async def _handshake(self) -> None:
        """Start the process; answer its HELLO with addresses; wait until it says READY."""
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        try:
            socket.bind(self._address("handshake"))
            await asyncio.to_thread(
                self._process.start,
                self._placement,
                vllm_config=self._config,
                local_client=True,
                handshake_address=self._address("handshake"),
                executor_class=Executor.get_class(self._config),
                log_stats=True,
            )
            self._watch()
            status = ""
            while status != "READY":
                identity, payload = await self._answer(socket.recv_multipart(), starts=True)
                status = msgspec.msgpack.decode(payload)["status"]
                if status == "HELLO":
                    ours = [self._address("input")], [self._address("output")]
                    addresses = EngineZmqAddresses(*ours)
                    reply = EngineHandshakeMetadata(addresses=addresses, parallel_config={})
                    await socket.send_multipart((identity, msgspec.msgpack.encode(reply)))
        finally:
            socket.close(linger=0)
            context.term()

    def _check_running(self) -> None:
        if self._stopping:
            raise EngineError(f"instance {self.id} was stopped while it started")
        if not self._process.alive:
            raise EngineError(f"instance {self.id} did not start: {self._process.failure()}")

    async def _connect(self) -> EngineFacts:
        # The constructor waits for the engine's first message without yielding to the loop: one
        # that dies between here and that message, which follows READY at once, would stop the
        # node's loop for VLLM_ENGINE_READY_TIMEOUT_S.
        self._check_running()
        self._config.cache_config.num_gpu_blocks = None  # an engine's are added to what it says
        self._client = _Client(
            self._config,
            Executor.get_class(self._config),
            log_stats=True,
            client_addresses={
                "input_address": self._address("input"),
                "output_address": self._address("output"),
            },
        )
        self._client.on_outputs = self._on_outputs
        tasks = await self._answer(self._client.get_supported_tasks_async(), starts=True)
        if "generate" in tasks:
            await self._answer(self._client.call_utility_async("compile_ahead"), starts=True)
        cache = self._config.cache_config
        return EngineFacts(
            total_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size,
            max_model_len=self._config.model_config.max_model_len,
            tasks=tuple(tasks),
            resumes=scheduler.installed(self._config),
            max_running=self._config.scheduler_config.max_num_seqs,
        )

    def _on_outputs(self, outputs: EngineCoreOutputs) -> None:
        self._watchdog.heard()
        if self._events is None:
            return
        try:
            self._events.outputs(outputs)
        except Exception as error:  # else vLLM's task ends, and the instance is mute for ever
            logger.exception("the outputs of instance %s could not be handled", self.id)
            text = f"{type(error).__name__}: {error}"
            self._die(f"instance {self.id} died: its outputs could not be handled: {text}")

    def _die(self, reason: str) -> None:
        """Report the death of an engine that was up, once."""
        events, self._events = self._events, None
        if self._client is not None:
            self._client.resources.engine_dead = True
        if events is not None and not self._stopping:
            # It may have said so long before its process ends, or is taken for one that hangs.
            left = fault.read(Path(self._sockets.name))
            exception, requests = (left.exception, left.requests) if left else ("", [])
            events.died(Death(reason, exception, frozenset(requests)))

    def _watch(self) -> None:
        """Have the loop notice the end of the process at once."""
        self._check_running()  # it may have been stopped while it was forked
        ended = self._ended = asyncio.get_running_loop().create_future()
        self._watching = self._process.sentinel

        def on_end() -> None:
            self._unwatch()
            if not ended.done():
                ended.set_result(None)
            if self._events is not None:
                self._die(f"instance {self.id} died: {self._process.failure()}")

        asyncio.get_running_loop().add_reader(self._watching, on_end)

    def _unwatch(self) -> None:
        if self._watching is not None:
            asyncio.get_running_loop().remove_reader(self._watching)
            self._watching = None
