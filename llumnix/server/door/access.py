"""Who may call a node, out of its configuration: keys of clients, the token of operators, doors."""

import argparse
import socket

from vllm import envs

from llumnix.addresses import parts
from llumnix.config import Config, ConfigError
from llumnix.server.door.callers import AcceptedKeys, Callers
from llumnix.server.door.csrf import Pages
from llumnix.server.door.guard import Guard
from llumnix.server.door.keyring import KeyFile, Keyring
from llumnix.server.door.routes import METRICS, STATUS, RouteTable


class AccessRules:
    """The rules of one node. Raises ConfigError for keys that can't be meant."""

    def __init__(
        self,
        config: Config,
        arguments: argparse.Namespace,
        kept: str | None = None,
        keeps: bool = False,
    ) -> None:
        """`kept`, `keeps`: see KeyFile, for --api-key-file."""
        self._config = config
        self._arguments = arguments
        self._clients = _clients(config, arguments, kept, keeps)
        if envs.VLLM_ENABLE_RESPONSES_API_STORE and _are_many(config, arguments):
            raise ConfigError(
                "VLLM_ENABLE_RESPONSES_API_STORE keeps answers that every client could read and "
                "cancel, whoever asked for them: unset it, or give clients one --api-key alone and "
                "no --api-key-file"
            )
        if config.open_admin and self._clients:
            raise ConfigError(
                "--open-admin lets everybody be an operator, while clients need a key: that can't "
                "be meant; give an --admin-token"
            )
        if config.admin_address and _same_port(config, arguments):
            raise ConfigError("--admin-address must have another port than the server itself")

    def look(self) -> None:
        """Read --api-key-file again if it has changed."""
        for keys in self._clients:
            if isinstance(keys, KeyFile):
                keys.look()

    @property
    def kept(self) -> str | None:
        """What --api-key-file said when it could be used last; None without one."""
        return next((keys.kept for keys in self._clients if isinstance(keys, KeyFile)), None)

    @property
    def needs_token(self) -> bool:
        """Whether a token for operators has to be made, as there would be no way in for them."""
        config = self._config
        return bool(self._clients) and not (config.admin_token or config.admin_address)

    def guard(self, made_token: str = "") -> Guard:
        """The node's door; `made_token`: the one that was made because one is needed."""
        config = self._config
        token = config.admin_token or made_token
        opened = {METRICS: config.public_metrics, STATUS: config.public_status}
        addresses = [config.advertise_address, *filter(None, [config.admin_address])]
        names = [socket.gethostname(), *(parts(address)[0] for address in addresses)]
        return Guard(
            RouteTable(
                self._arguments.root_path or "", [p for p, is_open in opened.items() if is_open]
            ),
            Callers(
                clients=self._clients,
                operators=Keyring([("operator", token)]) if token else None,
                admin_port=parts(config.admin_address)[1] if config.admin_address else None,
                open_admin=config.open_admin,
            ),
            Pages.of(self._arguments.allowed_origins, names),
        )


def _are_many(config: Config, arguments: argparse.Namespace) -> bool:
    """Whether clients have several keys; a file of one may have more at any time."""
    return bool(config.api_key_file) or len(set(arguments.api_key or ())) > 1


def _clients(
    config: Config, arguments: argparse.Namespace, kept: str | None, keeps: bool
) -> list[AcceptedKeys]:
    """The keys of clients, each kind in its place; an empty list lets everybody in."""
    given = {f"--api-key {n}": key for n, key in enumerate(arguments.api_key or (), start=1)}
    if not given and (key := envs.VLLM_API_KEY) is not None:
        given = {"VLLM_API_KEY": key}
    for name, key in given.items():
        if not key.strip():
            raise ConfigError(f"{name.split()[0]} is empty: that would let everybody in")
        if key == config.admin_token:
            raise ConfigError(f"{name.split()[0]} and --admin-token must not be the same")
    clients: list[AcceptedKeys] = []
    if given:
        named = {key: name.removeprefix("--").replace(" ", "-") for name, key in given.items()}
        clients.append(Keyring((name, key) for key, name in named.items()))
    if config.api_key_file:
        taken = {config.admin_token: "the --admin-token"} if config.admin_token else {}
        taken |= {key: "one of --api-key" for key in given.values()}
        clients.append(KeyFile(config.api_key_file, "--api-key-file", taken, kept, keeps))
    return clients


def _same_port(config: Config, arguments: argparse.Namespace) -> bool:
    port: int = arguments.port
    return not getattr(arguments, "uds", None) and parts(config.admin_address)[1] == port
