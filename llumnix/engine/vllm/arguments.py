"""The command line: vLLM's own arguments, unchanged, with llumnix's beside them.

ConfigArgParse gives the order of precedence: command line, environment, YAML file, default.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import configargparse
import yaml
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from llumnix import config
from llumnix.engine.vllm.compat import server_symbol

ENVIRONMENT_PREFIX = "LLUMNIX_"


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
        """Parse like vLLM's parser, which ends in ConfigArgParse's parse_known_args."""
        parsed: argparse.Namespace = FlexibleArgumentParser.parse_args(self, args, namespace)
        return parsed

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
        config_file_parser_class=configargparse.YAMLConfigFileParser,
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
        server_symbol("validate_parsed_serve_args")(arguments)
        if arguments.data_parallel_size > 1:
            raise config.ConfigError(
                "--data-parallel-size belongs to vLLM's own scale-out; use --initial-instances"
            )
    except (config.ConfigError, ValueError, TypeError) as error:
        parser.error(_sentence(error))
    return node


def engine_config(parser: NodeArgumentParser, arguments: argparse.Namespace) -> VllmConfig:
    """vLLM's configuration of one instance; ends with status 2 if vLLM refuses it."""
    try:
        engine_arguments = AsyncEngineArgs.from_cli_args(arguments)
        return engine_arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError) as error:
        parser.error(_sentence(error))


def _sentence(error: Exception) -> str:
    """The part of an error message that a person needs; pydantic's has a heading and a footer."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(_name(e.get("loc", ())) + str(e.get("msg", e)) for e in errors())
    return str(error)


def _name(location: Sequence[Any]) -> str:
    """The option that pydantic means, as it stands on the command line."""
    return f"--{str(location[-1]).replace('_', '-')}: " if location else ""


def show(parser: NodeArgumentParser, arguments: argparse.Namespace) -> str:
    """The configuration as YAML: llumnix's knobs, and what differs from vLLM's defaults."""
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
            shown = "***" if value and config.is_secret(name) else value
            values[name.replace("_", "-")] = shown
    text: str = yaml.safe_dump(values, default_flow_style=False, allow_unicode=True)
    return text


def main_program() -> str:
    """The name under which the command shows itself."""
    return f"{sys.executable.rsplit('/', 1)[-1]} -m llumnix.entrypoints.vllm.api_server"
