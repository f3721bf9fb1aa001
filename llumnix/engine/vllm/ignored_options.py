"""Options of vLLM's own server that would do nothing here: refused, or told of by name."""

import argparse
import logging

from llumnix.config import ConfigError

logger = logging.getLogger(__name__)

# What somebody would count on; the value that is harmless, and what to do instead.
_REFUSED = {
    "api_server_count": (1, "each node is one API server: start more nodes"),
    "headless": (False, "a node always has its API server"),
    "grpc": (False, "a node speaks HTTP alone"),
    "grpc_port": (None, "a node speaks HTTP alone"),
    "enable_ssl_refresh": (False, "restart the nodes one after the other for a new certificate"),
    "data_parallel_size": (1, "it belongs to vLLM's own scale-out; use --initial-instances"),
    "data_parallel_multi_port_external_lb": (False, "it belongs to vLLM's own scale-out"),
    "data_parallel_external_lb": (False, "it belongs to vLLM's own scale-out"),
    "data_parallel_hybrid_lb": (False, "it belongs to vLLM's own scale-out"),
}

# What changes nothing that anybody relies on.
_WARNED = (
    *("uvicorn_log_level", "disable_access_log_for_endpoints"),
    *("data_parallel_supervisor_port", "dp_supervisor_probe_interval_s"),
    *("dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold"),
)


def check_ignored(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Say what of the command line has no effect. Raises ConfigError where that would mislead."""
    for name, (harmless, instead) in _REFUSED.items():
        if getattr(arguments, name, None) not in (None, harmless):
            raise ConfigError(f"{_option(name)} does nothing here: {instead}")
    for name in _WARNED:
        if getattr(arguments, name, None) != parser.get_default(name):
            logger.warning("%s does nothing here: the server is not vLLM's", _option(name))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
