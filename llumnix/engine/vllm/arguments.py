"""The command line: vLLM's own arguments, unchanged, with llumnix's beside them.

ConfigArgParse gives the order of precedence: command line, environment, YAML file, default.
"""

import argparse
import dataclasses
import enum
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import configargparse
import yaml
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from llumnix import config
from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.compat import client_errors, server_symbol

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "LLUMNIX_"

# What says that a configuration cannot work.
_REFUSALS: tuple[type[Exception], ...] = (config.ConfigError, OSError, *client_errors())

# What may stand in the environment beside the options: names of the tests, the benchmarks and the
# engines, and those that Kubernetes makes for services whose names begin with llumnix.
_TOLERATED = re.compile(
    r"LLUMNIX_(INSTANCE|URL|SIM_PROFILE|TEST_.*|BENCH_.*"
    r"|(.+_)?(SERVICE_(HOST|PORT)(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_.*)?)?))"
)


class _YamlFile(configargparse.ConfigFileParser):
    """A YAML file of options; a mapping as a value stands for its JSON text."""

    def get_syntax_description(self) -> str:
        return "The file is a YAML mapping of options to values."

    def parse(self, stream: Any) -> dict[str, str | list[str]]:
        name = getattr(stream, "name", "the file")
        try:
            loaded = yaml.safe_load(stream)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise configargparse.ConfigFileParserException(f"{name} is no YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise configargparse.ConfigFileParserException(
                f"{name} is no YAML mapping of options to values"
            )
        return {str(k): _argument(v) for k, v in loaded.items() if v is not None}


def _argument(value: Any) -> str | list[str]:
    """A value of the file as ConfigArgParse takes it."""
    if isinstance(value, list):
        return [json.dumps(v) if isinstance(v, dict) else str(v) for v in value]
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


class NodeArgumentParser(configargparse.ArgumentParser, FlexibleArgumentParser):
    """vLLM's parser (dashes or underscores, dotted JSON keys) with ConfigArgParse's sources."""

    def __init__(self, **kwargs: Any) -> None:
        # ConfigArgParse calls argparse's constructor by name, past the one of vLLM's parser.
        self._deprecated: set[argparse.Action] = set()
        self.add_json_tip = False
        self._show_serve_task_hint = False
        super().__init__(**kwargs)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse like vLLM's parser, which ends in ConfigArgParse's parse_known_args.

        With priority classes the engines schedule by priority, unless the user chose otherwise: a
        priority that orders no queue would be none.
        """
        namespace = namespace or argparse.Namespace(scheduling_policy=None)  # None: not chosen
        parsed: argparse.Namespace = FlexibleArgumentParser.parse_args(self, args, namespace)
        self._refuse_unknown_environment()
        if parsed.scheduling_policy is None:
            default = self.get_default("scheduling_policy")
            parsed.scheduling_policy = "priority" if parsed.priority_classes else default
        return parsed

    def _refuse_unknown_environment(self) -> None:
        known = {getattr(action, "env_var", None) for action in self._actions}
        for name in sorted(os.environ):
            if not name.startswith(ENVIRONMENT_PREFIX) or _TOLERATED.fullmatch(name):
                continue
            if name not in known:
                self.error(f"the environment variable {name} belongs to no option")

    def _pull_args_from_config(self, args: list[str]) -> list[str]:
        return args  # --config is ConfigArgParse's here, for which the environment comes first

    def error(self, message: str) -> NoReturn:
        """One clear sentence and exit status 2."""
        sys.stderr.write(f"{self.prog}: {' '.join(message.split())}\n")
        sys.exit(2)


def make_parser(prog: str) -> NodeArgumentParser:
    """The parser of a node's command line."""
    parser = NodeArgumentParser(
        prog=prog,
        description="One node of a llumnix cluster: an OpenAI-compatible server over vLLM.",
        auto_env_var_prefix=ENVIRONMENT_PREFIX,
        config_file_parser_class=_YamlFile,
        conflict_handler="resolve",
    )
    server_symbol("make_arg_parser")(parser)
    parser.add_argument(
        "--config", is_config_file_arg=True, help="YAML file with the same keys as the options"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resulting configuration and exit"
    )
    parser.add_argument(
        "--validate-config", action="store_true", help="check the configuration and exit"
    )
    config.add_arguments(parser)
    return parser


def check(parser: NodeArgumentParser, arguments: argparse.Namespace) -> config.Config:
    """Check the whole configuration, llumnix's and vLLM's; ends with status 2 if it can't work."""
    try:
        node = config.from_arguments(arguments)
        load_parsers(arguments)
        server_symbol("validate_parsed_serve_args")(arguments)
        check_ignored(parser, arguments)
    except _REFUSALS as error:
        parser.error(_sentence(error))
    return node


def load_parsers(arguments: argparse.Namespace) -> None:
    """Make the operator's own parsers known by name, as vLLM's server does at its start."""
    if arguments.tool_parser_plugin:
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    if arguments.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)
    for option, name, known in (
        ("tool-call", arguments.tool_call_parser, ToolParserManager.list_registered()),
        ("reasoning", arguments.reasoning_parser, ReasoningParserManager.list_registered()),
    ):
        if name and name not in known:
            raise config.ConfigError(f"--{option}-parser: there is no parser {name}")


def engine_config(parser: NodeArgumentParser, arguments: argparse.Namespace) -> VllmConfig:
    """vLLM's configuration of one instance; ends with status 2 if vLLM refuses it."""
    try:
        engine_arguments = AsyncEngineArgs.from_cli_args(arguments)
        engines = engine_arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except _REFUSALS as error:
        parser.error(_sentence(error))
    # An engine that is told to end does so at once: what it runs goes on elsewhere.
    engines.shutdown_timeout = 0
    if engines.model_config.is_multimodal_model:
        # As with several API servers: else the frontend keeps an image to itself that one engine
        # has had already, and any other engine would miss it.
        engines.parallel_config._api_process_count = 2
    if not scheduler.install(engines):
        logger.warning(
            "with a scheduler class or a worker extension of your own, no request can move once "
            "it has begun to generate"
        )
    return engines


def _sentence(error: Exception) -> str:
    """The part of an error message that a person needs; pydantic's has a heading and a footer."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(_name(e.get("loc", ())) + str(e.get("msg", e)) for e in errors())
    return str(error)


def _name(location: Sequence[Any]) -> str:
    """The option that pydantic means, as it stands on the command line."""
    return f"--{str(location[-1]).replace('_', '-')}: " if location else ""


# Options of vLLM's own server that would do nothing here, and that somebody would count on; the
# value that is harmless, and what to do instead.
_MISLEADING = {
    "headless": (False, "a node always has its API server"),
    "grpc": (False, "a node speaks HTTP alone"),
    "grpc_port": (None, "a node speaks HTTP alone"),
    "enable_ssl_refresh": (False, "restart the nodes one after the other for a new certificate"),
    "data_parallel_size": (1, "it belongs to vLLM's own scale-out; use --initial-instances"),
    "data_parallel_multi_port_external_lb": (False, "it belongs to vLLM's own scale-out"),
    "data_parallel_external_lb": (False, "it belongs to vLLM's own scale-out"),
    "data_parallel_hybrid_lb": (False, "it belongs to vLLM's own scale-out"),
}

# Variables of vLLM's under which one of several API servers would know what the others do not.
_OF_ONE_SERVER = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "a stored response",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "an adapter that is loaded",
}

# Those that change nothing that anybody relies on.
_HARMLESS = (
    *("uvicorn_log_level", "disable_access_log_for_endpoints"),
    *("data_parallel_supervisor_port", "dp_supervisor_probe_interval_s"),
    *("dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold"),
)


def check_ignored(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Say what of the command line has no effect. Raises ConfigError where that would mislead."""
    for name, (harmless, instead) in _MISLEADING.items():
        if getattr(arguments, name, None) not in (None, harmless):
            raise config.ConfigError(f"{_option(name)} does nothing here: {instead}")
    servers = getattr(arguments, "api_server_count", None)
    if servers is not None and servers < 1:
        raise config.ConfigError(f"--api-server-count is {servers}, but must be 1 or more")
    if (servers or 1) > 1:
        for variable, what in _OF_ONE_SERVER.items():
            if os.environ.get(variable, "0").lower() in ("1", "true"):
                raise config.ConfigError(
                    f"{variable} goes with one API server alone: {what} is known to the server "
                    "that was asked, not to the others of --api-server-count"
                )
    for name in _HARMLESS:
        if getattr(arguments, name, None) != parser.get_default(name):
            logger.warning("%s does nothing here: the server is not vLLM's", _option(name))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def show(parser: NodeArgumentParser, arguments: argparse.Namespace) -> str:
    """The configuration as YAML: llumnix's options, and what differs from vLLM's defaults."""
    values: dict[str, Any] = {}
    own = {
        action.dest
        for group in parser._action_groups
        if group.title == "llumnix"
        for action in group._group_actions
    }
    for name, value in sorted(vars(arguments).items()):
        if name in ("print_config", "validate_config", "config"):
            continue
        if name in own or value != parser.get_default(name):
            values[name.replace("_", "-")] = _plain(value, name)
    text: str = yaml.safe_dump(values, default_flow_style=False, allow_unicode=True)
    return text


def _plain(value: Any, name: str = "") -> Any:
    """A value in what YAML knows, without secrets."""
    if value and not isinstance(value, bool) and config.is_secret(name):
        return "***"
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return {f: _plain(getattr(value, f), f) for f in fields}
    if isinstance(value, dict):
        return {str(k): _plain(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value)


def main_program() -> str:
    """The name under which the command shows itself."""
    return f"{sys.executable.rsplit('/', 1)[-1]} -m llumnix.entrypoints.vllm.api_server"
