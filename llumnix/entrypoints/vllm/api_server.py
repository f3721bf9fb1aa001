"""The command that takes the place of `python -m vllm.entrypoints.openai.api_server`."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

from llumnix import log_lines

if TYPE_CHECKING:
    import argparse

    from vllm.config import VllmConfig

    from llumnix.config import Config
    from llumnix.node.runtime import Node

logger = logging.getLogger("llumnix")

_ONLY_LOOKS = ("-h", "--help", "--print-config", "--validate-config")


def main(argv: list[str] | None = None) -> int:
    """Run a node until SIGTERM or SIGINT; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    log_lines.to_stderr()
    os.umask(0o077)  # logs, keys and etcd's data are for this user alone
    # Actors' threads run beside a busy event loop: hand the interpreter over more often.
    sys.setswitchinterval(0.001)
    looks = any(word.partition("=")[0] in _ONLY_LOOKS for word in argv)
    several = not looks and _several(argv)
    if several:
        _share_metrics()
    if not looks and (several or not _modelled(argv)):
        from llumnix.engine.vllm.processes.launcher import start_fork_server

        start_fork_server(several)  # it imports vLLM on another core while this process does too
    if not looks:
        logger.info("loading vLLM")

    from llumnix.engine.vllm import arguments

    _warn_of_version()
    parser = arguments.make_parser(arguments.main_program())
    parsed = parser.parse_args(argv)
    config = arguments.check(parser, parsed)
    if parsed.print_config:
        print(arguments.show(parser, parsed), end="")
        return 0
    _check(parser, config, parsed)
    if (parsed.api_server_count or 1) > 1 and not several and not looks:
        parser.error("--api-server-count was not understood; give it in the command line")
    engines = arguments.engine_config(parser, parsed)
    if parsed.validate_config:
        return _validate(config, engines)
    return _run(config, parsed, engines)


def _warn_of_version() -> None:
    """Say it if this is a vLLM that llumnix was not written for."""
    import vllm

    from llumnix.engine.vllm import compat

    if not compat.supported():
        oldest, newest = (".".join(map(str, v)) for v in (compat.OLDEST, compat.NEWEST))
        text = "vLLM %s is not one that llumnix was written for: those are %s to %s"
        logger.warning(text, vllm.__version__, oldest, newest)


def _modelled(argv: list[str]) -> bool:
    """Whether the modelled engine is asked for, as far as that shows before vLLM is imported."""
    given: list[str] = re.findall(r"--engine[= ](\w+)", " ".join(argv))
    return (given or [os.environ.get("LLUMNIX_ENGINE", "")])[-1] == "sim"


def _several(argv: list[str]) -> bool:
    """Whether several API servers are asked for, as far as that shows before vLLM is imported.

    By the command line, or else the environment, or else a file, as all options.
    """
    words = " ".join(argv)
    given: list[str] = re.findall(r"--api[-_]server[-_]count[= ](\d+)|-asc[= ](\d+)", words)
    found = ["".join(each) for each in given][-1:]
    found += [os.environ.get("LLUMNIX_API_SERVER_COUNT", "")]
    for path in re.findall(r"--config[= ](\S+)", words):
        with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
            found += re.findall(r"(?m)^\s*api[-_]server[-_]count:\s*(\d+)", file.read())
    first = next((number for number in found if number.isdecimal()), "1")
    return int(first) > 1


def _share_metrics() -> None:
    """Have the metrics of all processes of this node added up.

    Before prometheus_client is imported, which looks at its variable once. A folder of somebody
    else's may hold the files of others.
    """
    from llumnix.engine.vllm.processes.socket_folder import scratch

    folder = os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(scratch() / "metrics")
    os.makedirs(folder, mode=0o700, exist_ok=True)


def _check(
    parser: "argparse.ArgumentParser", config: "Config", parsed: "argparse.Namespace"
) -> None:
    """End with status 2 if a policy is not known, or keys and the doors for them don't fit.

    Before a model is looked at, which takes longer.
    """
    from llumnix.config import ConfigError
    from llumnix.node.options import read_policies
    from llumnix.server.door.access import AccessRules

    try:
        read_policies(config)
        AccessRules(config, parsed)
    except ConfigError as error:
        parser.error(str(error))


def _validate(config: "Config", engines: "VllmConfig") -> int:
    from llumnix.config import ConfigError
    from llumnix.node.engines import engine_maker

    try:
        engine_maker(config, engines)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    print("the configuration is valid")
    return 0


def _run(config: "Config", parsed: "argparse.Namespace", engines: "VllmConfig") -> int:
    import uvloop

    from llumnix.config import ConfigError
    from llumnix.control.etcd.errors import EtcdError

    try:
        return uvloop.run(_serve(config, parsed, engines))
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except (EtcdError, OSError) as error:
        logger.error("the node did not end cleanly: %s", _said(error))
        return 1


def _said(error: Exception) -> str:
    """The message of an error, which a timeout has not."""
    return str(error) or type(error).__name__


async def _serve(config: "Config", parsed: "argparse.Namespace", engines: "VllmConfig") -> int:
    from llumnix.node.garbage_collection import Garbage
    from llumnix.node.runtime import Node

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Not told by `ended`: when the node has given up, the first signal is yet to come.
    signalled: list[str] = []

    def on_signal(number: int) -> None:
        name = signal.Signals(number).name
        if signalled:
            logger.warning("a second %s: ending at once", name)
            # Engines and the embedded etcd die with this process; nothing else has to be done.
            os._exit(128 + number)
        signalled.append(name)
        logger.info("%s: finishing what runs, for at most %.0f s", name, config.drain_timeout)
        ended.set()

    failed: list[str] = []

    def on_giving_up(sentence: str) -> None:
        failed.append(sentence)
        ended.set()

    node = Node(config, parsed, engines, on_giving_up)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    collecting: list[asyncio.Task[None]] = []
    try:
        if not await _started(node):
            return 1
        garbage = Garbage(lambda: node.requests)
        collecting.append(loop.create_task(garbage.watch(), name="garbage"))
        await ended.wait()
    finally:
        await node.stop()
        for task in collecting:
            task.cancel()
        await asyncio.gather(*collecting, return_exceptions=True)
    logger.info("the node has left the cluster")
    return 1 if failed else 0


async def _started(node: "Node") -> bool:
    from llumnix.control.etcd.errors import EtcdError

    try:
        await node.start()
    except (EtcdError, OSError) as error:
        logger.error("the node cannot start: %s", _said(error))
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
