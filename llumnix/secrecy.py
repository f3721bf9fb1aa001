"""Secrets: of options, out of files, as a list of processes shows the rest; and operators' tokens.

A node leaves the token that its cluster has made in a file, where llumnixctl finds it.
"""

import argparse
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

LARGEST = 4096  # bytes of a secret


class SecretError(Exception):
    """A secret that can't be used; the message is one sentence without it."""


def secret(text: str) -> str:
    """An option's value that is a secret; an empty one would be none, and is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; leave the option out to have none")
    return text


def read_secret(option: str, path: str) -> str:
    """The one line of a file. Raises SecretError."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST + 1).decode().strip()
    except OSError as error:
        raise SecretError(f"{option} {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecretError(f"{option} {path} holds no text") from None
    if not text:
        raise SecretError(f"{option} {path} is empty")
    if len(text) > LARGEST or len(text.splitlines()) > 1:
        raise SecretError(f"{option} {path} must hold one line of at most {LARGEST} bytes")
    return text


def sounds_secret(name: str) -> bool:
    """Whether an option of that name has a secret for its value, going by the name."""
    words = name.lower().replace("-", "_")
    if words.endswith("_file"):
        return False
    # Not every token is a secret: max_num_batched_tokens, decode_token_threshold.
    return re.search(r"(^|_)token$|password|secret|api_?key", words) is not None


def default_state_dir() -> str:
    """The user's folder for state, unless --state-dir names another."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return str(Path(base) / "llumnix")


def token_file(state_dir: str, cluster: str) -> Path:
    """Where the token that a cluster has made for its operators lies, for the node's user alone."""
    return Path(state_dir) / "admin-tokens" / cluster


def write_token(token: str, state_dir: str, cluster: str) -> Path:
    """Leave the token where llumnixctl finds it. Raises OSError."""
    path = token_file(state_dir, cluster)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    new = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w") as file:
            file.write(f"{token}\n")
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    logger.info("operators show the token in %s, which llumnixctl finds by itself", path)
    return path


def find_token(token: str, file: str, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The token an operator has, and what to tell if it does not do. Raises SecretError.

    Taken is the first of: what is given, the environment (LLUMNIX_ADMIN_TOKEN,
    LLUMNIX_ADMIN_TOKEN_FILE), the file that a node of this user and machine has left.
    """
    token = token or environment.get("LLUMNIX_ADMIN_TOKEN", "")
    file = file or ("" if token else environment.get("LLUMNIX_ADMIN_TOKEN_FILE", ""))
    if token:
        return token, "the token given is not the one that the node was started with"
    if file:
        return read_secret("--admin-token-file", file), f"the token in {file} is not the node's"
    state = environment.get("LLUMNIX_STATE_DIR") or default_state_dir()
    path = token_file(state, environment.get("LLUMNIX_CLUSTER") or "default")
    try:
        return read_secret("the token", str(path)), f"the token in {path} is not the node's"
    except SecretError:
        return None, (
            f"there is no token at hand (none in {path}): give --admin-token-file, or set "
            "LLUMNIX_ADMIN_TOKEN"
        )
