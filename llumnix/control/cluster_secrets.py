"""The cluster's secrets in etcd: by which its nodes know one another, and which operators show."""

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection

from llumnix.control.codec import decode_text, encode_text
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdRefused

LEAST = 16  # characters of a token that is given, of which so many different:
DIFFERENT = 6
POLL = 0.1  # seconds between looks whether a token was put back
_ROUNDS = 100_000  # of PBKDF2: a mark can be read by many, and must not be quick to guess from


def ensure_token(etcd: Etcd, key: str) -> bytes:
    """What the key holds; the first node to ask puts a random token there.

    Raises EtcdUnavailable.
    """
    found = etcd.get(key)
    if found is None:
        _, found = etcd.put_if_absent(key, encode_text(secrets.token_urlsafe(32)))
    return found.value


def made_token(etcd: Etcd, key: str) -> str:
    """The token in the key, likewise.

    Raises EtcdUnavailable, or EtcdRefused when the key holds no token.
    """
    try:
        return decode_text(ensure_token(etcd, key))
    except ValueError as error:
        raise EtcdRefused(f"{key} holds no token: {error}") from None


def agreed_token(etcd: Etcd, key: str, others: Callable[[], Collection[str]], within: float) -> str:
    """The token in etcd, once it is the one that the other nodes have, whose marks `others` gives.

    They put it back if it was overwritten. Raises EtcdRefused if it is not theirs for `within`
    seconds: with another token than theirs, this node would be in the cluster and yet alone.
    """
    deadline = time.monotonic() + within
    while True:
        marks = {mark for mark in others() if mark}
        try:
            token = made_token(etcd, key)
        except EtcdRefused:
            if not marks or time.monotonic() >= deadline:
                raise
        else:
            if not marks or token_mark(token) in marks:
                return token
        if time.monotonic() >= deadline:
            raise EtcdRefused(
                f"{key} is not the token that the nodes of this cluster have: put theirs "
                "back, or stop them all before the first starts with the new one"
            )
        time.sleep(POLL)


def weakness(given: str) -> str | None:
    """One sentence for a token that can be guessed; None for one that is long enough.

    A node proves itself to whoever dials it, and who has such a proof can try tokens on it at
    leisure: stretching makes each try slow, but not a short token long.
    """
    if len(given) >= LEAST and len(set(given)) >= DIFFERENT:
        return None
    return (
        f"the cluster token can be guessed by whoever reaches a node: give one of {LEAST} or more "
        "random characters, such as `openssl rand -hex 32` makes"
    )


def token_mark(token: str) -> str:
    """A mark that shows which token a node has, without giving it away."""
    raw = hashlib.pbkdf2_hmac("sha256", token.encode(), b"llumnix token mark", _ROUNDS)
    return raw[:8].hex()


def prevails(mark: str, marks: Collection[str]) -> bool:
    """Whether a token is the one to put back: that of most nodes."""
    counts = Counter(each for each in marks if each)
    return not counts or mark == max(counts, key=lambda each: (counts[each], each))


def same_token(found: bytes, token: str) -> bool:
    """Whether a key's value is that token."""
    try:
        return decode_text(found) == token
    except ValueError:
        return False
