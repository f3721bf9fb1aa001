"""The knobs of who may call a node: keys of clients, and what makes an operator."""

import argparse
from dataclasses import dataclass

from llumnix.knob import ConfigError, knob


@dataclass(frozen=True, kw_only=True)
class CallerConfig:
    """Who may call a node, beside vLLM's --api-key."""

    api_key_file: str = knob(
        "",
        "file with the keys of clients, name:key in each line, beside those of --api-key; read "
        "again when it changes",
    )
    admin_token: str = knob(
        "",
        "secret that operators show (default: generated if clients need a key, kept in etcd, and "
        "written to a file in --state-dir)",
        secret=True,
    )
    admin_token_file: str = knob("", "file with the secret that operators show")
    admin_address: str = knob(
        "",
        "host:port at which alone operators' routes answer, to anybody who reaches it unless there "
        "is an --admin-token",
    )
    open_admin: bool = knob(
        False,
        "let everybody who reaches this node be an operator: drain it, reset it, see all requests",
        action=argparse.BooleanOptionalAction,
    )
    public_metrics: bool = knob(
        False, "let everybody read /metrics", action=argparse.BooleanOptionalAction
    )
    public_status: bool = knob(
        False, "let everybody read /status", action=argparse.BooleanOptionalAction
    )

    def check_callers(self) -> None:
        """Raise ConfigError for knobs that contradict each other."""
        if self.open_admin and (self.admin_token or self.admin_address):
            raise ConfigError(
                "--open-admin lets everybody be an operator: it goes neither with --admin-token "
                "nor with --admin-address"
            )
