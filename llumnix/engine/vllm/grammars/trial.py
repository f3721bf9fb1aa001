"""A process in which grammars are compiled on trial, and which may die of it."""

import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.vllm.grammars.walk import text_lengths, walk
from llumnix.engine.vllm.processes.launcher import start_fork_server
from llumnix.engine.vllm.processes.parent_death import end_with_node

MEMORY = 2 * 2**30  # bytes of address space beyond what the process has when it is ready
START_SECONDS = 60.0  # until it has read the tokenizer
NICE = 5  # below the API server, whose streams go on meanwhile
WALL = 20  # times the limit, until a process that gets little of the machine is given up
STILL = 5.0  # seconds in which a process that computes nothing at all is given up
COMMON = "xgrammar"  # the backend of grammars for which no operator has chosen one
# vLLM's own limit of a regular expression, which is of wall-clock time: ours is of CPU time.
VLLM_TIMEOUT = "VLLM_REGEX_COMPILATION_TIMEOUT_S"
NO_MEMORY = "bad_alloc"  # in an error of a backend's that is written in C++
SENTENCE = 500  # characters of an error that are told


_NONE = object()


class TrialFailed(Exception):
    """A grammar that can't be used; the message is one sentence for its client."""


class TrialUnavailable(Exception):
    """Nothing can be told of a grammar now: it may be as good as any."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What validation has made of a request's grammar."""

    changed: dict[str, Any]  # fields of StructuredOutputsParams, and their new values


class Trial:
    """One process, started when it is needed, and again after it has died. For one thread."""

    def __init__(self, config: bytes, seconds: float, memory: int = MEMORY) -> None:
        """`config` is vLLM's configuration, pickled: to do that at a start would hold the loop up.

        `seconds`: of CPU, the longest that a grammar may take: that a busy machine is slow is not
        its fault. `memory`: what it may take, in bytes.
        """
        self._config = config
        self._seconds = seconds
        self._memory = memory
        self._process: ForkServerProcess | None = None
        self._unwanted = False  # the process that is being started
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._process.pid if self._process else None

    def start(self) -> Connection:
        """Have a process that is ready. Raises TrialUnavailable."""
        if self._pipe is not None:
            return self._pipe
        ours, theirs = multiprocessing.Pipe()
        context = start_fork_server()
        arguments = (theirs, self._config, self._seconds, self._memory)
        process = context.Process(target=_serve, args=arguments, name="grammars", daemon=True)
        process.start()
        self._process = process  # from now on others may end it
        if self._unwanted:
            self._unwanted = False
            process.kill()
        theirs.close()
        try:
            if ours.poll(START_SECONDS) and ours.recv() is None:
                self._pipe = ours
                return ours
        except (EOFError, OSError):
            pass
        ours.close()
        self.close()
        raise TrialUnavailable("no process could be started in which to try a grammar")

    def run(self, params: StructuredOutputsParams) -> Verdict:
        """Compile a grammar. Raises TrialFailed, TrialUnavailable."""
        pipe = self.start()
        try:
            pipe.send(params)
            if not self._answers(pipe):
                self.close()
                raise TrialUnavailable("the machine is too busy to try a grammar; try again soon")
            answer: Verdict | str = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._why_it_ended() from error
        if isinstance(answer, str):
            raise TrialFailed(answer)
        return answer

    def _answers(self, pipe: Connection) -> bool:
        """Wait for an answer, or the end of the process by one of its limits.

        Not for ever, and not for a process that hangs, as where a machine's memory has ended. That
        says nothing of the grammar, as its limit is of CPU time.
        """
        deadline = time.monotonic() + WALL * self._seconds
        used = None
        while time.monotonic() < deadline:
            if pipe.poll(min(STILL, WALL * self._seconds)):
                return True
            used, before = self._computed(), used
            if used == before:
                return False
        return False

    def _computed(self) -> int:
        """The CPU time that the process has taken, in ticks; 0 if it is gone."""
        try:
            with open(f"/proc/{self.pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])

    def _why_it_ended(self) -> TrialFailed | TrialUnavailable:
        """What a process that has ended says of its grammar: nothing, if it was killed."""
        assert self._process is not None
        self._process.join(1.0)
        code = self._process.exitcode
        self.close()
        if code == -signal.SIGXCPU:
            return TrialFailed(
                f"the grammar or schema takes longer than {self._seconds:g} s to compile and to "
                "begin; make it simpler"
            )
        if code in (None, -signal.SIGKILL, -signal.SIGTERM):  # by a machine without memory, or us
            return TrialUnavailable("the trial of a grammar was cut off; try again soon")
        text = "the grammar or schema takes too much memory to compile; make it simpler"
        return TrialFailed(text)

    def kill(self) -> None:
        """Have the process end, from any thread; what it tries has failed."""
        process = self._process
        if process is None:
            self._unwanted = True  # the one that is being started
            return
        with contextlib.suppress(OSError, ValueError):
            process.kill()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self.kill()
            self._process.join()
            self._process.close()
            self._process = None


def _serve(pipe: Connection, config: bytes, seconds: float, memory: int) -> None:
    """The main function of the process."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # a Ctrl-C at the terminal is the node's business
    end_with_node()
    os.nice(NICE)
    os.environ[VLLM_TIMEOUT] = "0"
    compiler = Compiler(pickle.loads(config))
    compiler.warm()
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            params = pipe.recv()
        except EOFError:
            return
        _allow(seconds)
        try:
            answer: Verdict | str = compiler.try_out(params)
        except Exception as error:  # vLLM's, or its backend's, whatever it is
            if isinstance(error, MemoryError) or NO_MEMORY in str(error):
                return  # what is left of the process is not to be trusted
            words = " ".join(str(error).split())[:SENTENCE]
            answer = f"the grammar or schema can't be used: {words or type(error).__name__}"
        pipe.send(answer)


def _allow(seconds: float) -> None:
    """Have the kernel end this process when it has computed for so many seconds more."""
    used = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), most))


class Compiler:
    """Does with a grammar what vLLM's frontend and its engine core will do with it."""

    def __init__(self, config: VllmConfig) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        self._config = config
        self._manager = StructuredOutputManager(config)
        self._backends: dict[str, Any] = {}
        vocabulary = config.model_config.get_vocab_size()
        self._lengths = text_lengths(self._manager.tokenizer, vocabulary)

    def warm(self) -> None:
        """Make the backend that most grammars take, so that the first one does not pay for it."""
        with contextlib.suppress(Exception):  # whoever needs it hears what is wrong with it
            self._backend(COMMON)

    def try_out(self, params: StructuredOutputsParams) -> Verdict:
        """Validate and compile. Raises whatever vLLM and its backends raise."""
        from vllm.v1.structured_output.request import get_structured_output_key

        before = dict(vars(params))
        sampling = SamplingParams(structured_outputs=params)
        sampling._validate_structured_outputs(
            self._config.model_config,
            self._config.structured_outputs_config,
            self._manager.tokenizer,
        )
        checked = sampling.structured_outputs
        if checked._backend_was_auto and self._is_common():
            # An engine has one backend, of its first grammar, for all that come later: what vLLM
            # would choose for this one counts only where it is the first. So it is always the same.
            checked._backend = COMMON
        kind, spec = get_structured_output_key(checked)
        backend = self._backend(checked._backend)
        walk(backend, lambda: backend.compile_grammar(kind, spec), self._lengths)
        after = vars(checked)
        # What no constructor has made, as /generate's, lacks the fields that only have defaults.
        changed = {n: value for n, value in after.items() if before.get(n, _NONE) != value}
        return Verdict(changed)

    def _is_common(self) -> bool:
        """Whether most grammars take the usual backend; Mistral's own tokenizers have rules."""
        return "Mistral" not in type(self._manager.tokenizer).__name__

    def _backend(self, name: str) -> Any:
        if name not in self._backends:
            self._backends[name] = self._make(name)
        return self._backends[name]

    def _make(self, name: str) -> Any:
        from importlib import import_module

        module, cls = {
            "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
            "guidance": ("backend_guidance", "GuidanceBackend"),
            "outlines": ("backend_outlines", "OutlinesBackend"),
            "lm-format-enforcer": ("backend_lm_format_enforcer", "LMFormatEnforcerBackend"),
        }[name]
        backend = getattr(import_module(f"vllm.v1.structured_output.{module}"), cls)
        return backend(
            self._config,
            tokenizer=self._manager.tokenizer,
            vocab_size=self._config.model_config.get_vocab_size(),
        )
