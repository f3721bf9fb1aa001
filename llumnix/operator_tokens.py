"""Operators' tokens in files: where a node leaves the one made, and how llumnixctl finds one."""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from llumnix.config import default_state_dir
from llumnix.secrecy import SecretError, read_secret

logger = logging.getLogger(__name__)


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
