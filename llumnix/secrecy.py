"""Secrets among the options: out of files, as a list of processes shows the rest, and unprinted."""

import argparse
import re
from pathlib import Path

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
