"""How two nodes prove to each other that they have the cluster's token, which neither ever sends.

1. The dialler says who it is, whom it dials and at which address, and adds a nonce.
2. The accepter answers with a challenge and with its proof, an HMAC over all of that. It answers
   only if it is the node that is meant, at its own address: so whoever has put another address
   into etcd can't have the real node prove for it.
3. The dialler, convinced, comes again with its own proof and asks for a WebSocket.
4. The first frame in there is a Hello with a last proof: it is still the same accepter.

Nothing is kept for a dialler that has proved nothing, and no more of it is read than an HTTP head.
What follows is not protected by this: without TLS, who sits on the wire can read and change it.
"""

import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from enum import StrEnum

from llumnix.cluster import NodeId

CHALLENGE_SECONDS = 5.0  # for which a challenge can be answered, once
CHALLENGE = "X-Llumnix-Challenge"
LIFE = "X-Llumnix-Life-There"
PROOF = "X-Llumnix-Proof"

_ROUNDS = 200_000  # of PBKDF2, once for a process: a short token must not be quick to guess
_LONGEST = 512  # characters of a header; a node's name and its address are shorter


class GreetingError(Exception):
    """The other end does not prove what it should; the message says in a clause what is missing."""


class Role(StrEnum):
    """What a proof is for: none can be used in place of another."""

    ACCEPTER = "llumnix peer 1: accepter"
    DIALLER = "llumnix peer 1: dialler"
    OPENED = "llumnix peer 1: opened"


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a dialler says of itself and of whom it wants."""

    node: NodeId
    life: str  # of the dialler's process: the links of one process belong together
    version: str
    to: NodeId
    address: str  # that is dialled, as in the registry
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))

    def headers(self) -> dict[str, str]:
        """As headers of an HTTP request."""
        return {_header(f.name): getattr(self, f.name) for f in fields(self)}

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> "Introduction":
        """That of a request. Raises GreetingError."""
        try:
            return cls(**{f.name: read(headers, _header(f.name)) for f in fields(cls)})
        except GreetingError as error:
            if "Authorization" in headers:
                raise GreetingError(
                    "it shows a token itself, as older versions of llumnix do, instead of a proof"
                ) from None
            raise error


@dataclass(frozen=True, slots=True)
class Challenge:
    """What an accepter wants to be answered, and the life of its process."""

    text: str
    life: str


class Key:
    """The cluster's token, as a key that makes and checks proofs."""

    def __init__(self, token: str) -> None:
        self._key = _stretched(token)

    def proof(self, role: Role, who: Introduction, challenge: Challenge) -> str:
        """Shows that whoever makes it has the token, in that role, here and now."""
        said = [role, *astuple(who), *astuple(challenge)]
        raw = [_raw(part) for part in said]
        message = b"".join(len(part).to_bytes(4) + part for part in raw)
        return hmac.digest(self._key, message, "sha256").hex()

    def check(self, proof: str, role: Role, who: Introduction, challenge: Challenge) -> None:
        """Raises GreetingError for any other proof than the right one."""
        right = self.proof(role, who, challenge).encode()
        if not hmac.compare_digest(_raw(proof), right):
            raise GreetingError("wrong token: its proof is not that of the cluster's token")


class Door:
    """The accepter's side. It remembers nobody but those who have proved themselves."""

    def __init__(self, key: Key, node: NodeId, life: str, address: str) -> None:
        self._key = key
        self._node = node
        self._life = life
        self._address = address
        self._seal = secrets.token_bytes(32)  # this process's own: shows that it made a challenge
        self._answered: dict[str, float] = {}  # challenges, until when they would be good

    def ask(self, who: Introduction) -> dict[str, str]:
        """The headers that answer an introduction. Raises GreetingError."""
        self._is_meant(who)
        ends = time.monotonic() + CHALLENGE_SECONDS
        dated = f"{secrets.token_hex(16)}-{ends:.3f}"
        challenge = Challenge(f"{dated}-{self._sealed(dated)}", self._life)
        proof = self._key.proof(Role.ACCEPTER, who, challenge)
        return {CHALLENGE: challenge.text, LIFE: challenge.life, PROOF: proof}

    def admit(self, who: Introduction, headers: Mapping[str, str]) -> str:
        """The last proof, for the Hello, to a dialler that has proved itself.

        Raises GreetingError.
        """
        self._is_meant(who)
        challenge = Challenge(read(headers, CHALLENGE), self._life)
        self._key.check(read(headers, PROOF), Role.DIALLER, who, challenge)
        self._use(challenge.text)
        return self._key.proof(Role.OPENED, who, challenge)

    def _is_meant(self, who: Introduction) -> None:
        if (who.to, who.address) != (self._node, self._address):
            raise GreetingError(
                f"it wants node {who.to!r} at {who.address!r}, but this is node {self._node!r} "
                f"at {self._address!r}"
            )

    def _use(self, text: str) -> None:
        """Take a challenge as answered: it is ours, in time, and for the first time."""
        dated, _, seal = text.rpartition("-")
        if not hmac.compare_digest(_raw(seal), self._sealed(dated).encode()):
            raise GreetingError("this process has not made the challenge that it answers")
        now, ends = time.monotonic(), float(dated.rpartition("-")[2])
        self._answered = {t: e for t, e in self._answered.items() if e > now}
        if ends <= now:
            raise GreetingError(f"it took longer than {CHALLENGE_SECONDS:g} s")
        if text in self._answered:
            raise GreetingError("the challenge has been answered already")
        self._answered[text] = ends

    def _sealed(self, dated: str) -> str:
        return hmac.digest(self._seal, _raw(dated), "sha256").hex()


def convinced(key: Key, who: Introduction, status: int, headers: Mapping[str, str]) -> Challenge:
    """The dialler's look at the answer to its introduction: what to answer to a real peer.

    Raises GreetingError.
    """
    if CHALLENGE not in headers:
        raise GreetingError(
            f"what is at {who.address} answers with status {status} and no challenge: it is "
            "another node, another version of llumnix, or none"
        )
    challenge = Challenge(read(headers, CHALLENGE), read(headers, LIFE))
    try:
        key.check(read(headers, PROOF), Role.ACCEPTER, who, challenge)
    except GreetingError as error:
        raise GreetingError(f"{error} (status {status})") from None
    return challenge


def answer(key: Key, who: Introduction, challenge: Challenge) -> dict[str, str]:
    """The headers of the dialler's second request."""
    proof = key.proof(Role.DIALLER, who, challenge)
    return {**who.headers(), CHALLENGE: challenge.text, PROOF: proof}


def read(headers: Mapping[str, str], name: str) -> str:
    """A header that must be there. Raises GreetingError."""
    value = headers.get(name, "")
    if not 0 < len(value) <= _LONGEST:
        raise GreetingError(f"it sends no {name}" if not value else f"its {name} is too long")
    return value


def _raw(text: str) -> bytes:
    """A header's bytes, which need not be UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def _header(name: str) -> str:
    return f"X-Llumnix-{name.title()}"


@functools.lru_cache(maxsize=8)
def _stretched(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"llumnix peer channel", _ROUNDS)
