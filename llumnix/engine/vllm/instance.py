"""A vLLM engine as an instance: a process, its handshake, and vLLM's own client to talk to it."""

import asyncio
import contextlib
import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

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
from llumnix.engine.base import EngineDead, EngineError, EngineEvents, EngineFacts
from llumnix.engine.vllm.launcher import EngineProcess, Placement

logger = logging.getLogger(__name__)


class _Client(AsyncMPClient):
    """vLLM's client to one engine core, which hands its outputs on at once, without a queue."""

    events: EngineEvents | None = None

    async def process_engine_outputs(self, outputs: EngineCoreOutputs) -> None:
        """Called by the base class for each message of the engine."""
        if self.events is not None and (outputs.outputs or outputs.scheduler_stats):
            self.events.outputs(
                EngineCoreOutputs(
                    outputs=outputs.outputs,
                    scheduler_stats=outputs.scheduler_stats,
                    timestamp=outputs.timestamp,
                )
            )
        # The base class queues what is left for get_output_async(), which nobody calls here.
        outputs.outputs = []
        outputs.scheduler_stats = None


class VllmEngine:
    """One vLLM EngineCore in processes of its own."""

    def __init__(
        self,
        instance: InstanceId,
        config: VllmConfig,
        placement: Placement,
        log_file: Path,
        start_timeout: float,
    ) -> None:
        self._id = instance
        # The client writes what the engine found out (blocks, lengths) into its configuration.
        self._config = copy.deepcopy(config)
        self._placement = placement
        self._start_timeout = start_timeout
        self._process = EngineProcess(instance, log_file)
        self._sockets = tempfile.TemporaryDirectory(prefix="llumnix-")  # short: ipc paths are
        self._client: _Client | None = None
        self._events: EngineEvents | None = None
        self._watching: int | None = None
        self._stopping = False

    @property
    def id(self) -> InstanceId:
        """The instance that this engine serves."""
        return self._id

    @property
    def pid(self) -> int | None:
        """The EngineCore's process id."""
        return self._process.pid

    async def start(self, events: EngineEvents) -> EngineFacts:
        """Fork the engine core, shake hands and connect. Raises EngineError."""
        self._events = events
        try:
            async with asyncio.timeout(self._start_timeout):
                await self._handshake()
                return await self._connect(events)
        except TimeoutError as error:
            await self.stop(0.0)
            raise EngineError(
                f"instance {self._id} did not start in {self._start_timeout:.0f} s; "
                f"its log is {self._process.log_file}"
            ) from error
        except BaseException:
            await self.stop(0.0)
            raise

    async def add(self, request: EngineCoreRequest) -> None:
        """Send a request to the engine core. Raises EngineDead."""
        try:
            await self._require().add_request_async(request)
        except (EngineDeadError, zmq.ZMQError) as error:
            raise EngineDead(f"instance {self._id} is dead") from error

    async def abort(self, request_ids: list[str]) -> None:
        """Abort requests; a dead engine has none."""
        with contextlib.suppress(EngineDead, EngineDeadError, zmq.ZMQError):
            await self._require().abort_requests_async(request_ids)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a utility method of the engine core. Raises EngineError."""
        try:
            return await self._require().call_utility_async(method, *args)
        except EngineError:
            raise
        except EngineDeadError as error:
            raise EngineDead(f"instance {self._id} is dead") from error
        except Exception as error:  # vLLM raises a bare Exception with the engine's message
            raise EngineError(str(error)) from error

    async def stop(self, timeout: float) -> None:
        """End the process (SIGTERM, then SIGKILL) and close the sockets."""
        self._stopping = True
        self._unwatch()
        if self._client is not None:
            self._client.shutdown()
            self._client = None
        await asyncio.to_thread(self._process.stop, timeout)
        self._sockets.cleanup()

    def _require(self) -> _Client:
        if self._client is None:
            raise EngineDead(f"instance {self._id} is not running")
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
            ended = self._watch()
            while not await self._greet(socket, ended):
                pass
        finally:
            socket.close(linger=0)
            context.term()

    async def _greet(self, socket: zmq.asyncio.Socket, ended: "asyncio.Future[None]") -> bool:
        """Answer one message of the starting engine; True once it is ready."""
        message: asyncio.Future[list[bytes]] = asyncio.ensure_future(socket.recv_multipart())
        either: set[asyncio.Future[Any]] = {message, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            message.cancel()
            raise EngineError(f"instance {self._id} did not start: {self._process.failure()}")
        identity, payload = message.result()
        status = msgspec.msgpack.decode(payload)["status"]
        if status == "HELLO":
            addresses = EngineZmqAddresses([self._address("input")], [self._address("output")])
            reply = EngineHandshakeMetadata(addresses=addresses, parallel_config={})
            await socket.send_multipart((identity, msgspec.msgpack.encode(reply)))
        return bool(status == "READY")

    async def _connect(self, events: EngineEvents) -> EngineFacts:
        self._client = _Client(
            self._config,
            Executor.get_class(self._config),
            log_stats=True,
            client_addresses={
                "input_address": self._address("input"),
                "output_address": self._address("output"),
            },
        )
        self._client.events = events
        tasks = await self._client.get_supported_tasks_async()
        cache = self._config.cache_config
        return EngineFacts(
            total_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size,
            max_model_len=self._config.model_config.max_model_len,
            tasks=tuple(tasks),
        )

    def _watch(self) -> "asyncio.Future[None]":
        """Have the loop notice the end of the process at once."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching = self._process.sentinel

        def on_end() -> None:
            self._unwatch()
            if not ended.done():
                ended.set_result(None)
            if self._client is not None and not self._stopping and self._events is not None:
                self._client.resources.engine_dead = True
                self._events.died(f"instance {self._id} died: {self._process.failure()}")

        asyncio.get_running_loop().add_reader(self._watching, on_end)
        return ended

    def _unwatch(self) -> None:
        if self._watching is not None:
            asyncio.get_running_loop().remove_reader(self._watching)
            self._watching = None
