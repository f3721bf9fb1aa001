"""The keys that callers show, each under a name; compared without giving anything away by time."""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from llumnix.config import ConfigError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at a file whose keys are in use
LARGEST_FILE = 2**20  # bytes

# Digests are of this process alone, so that the time a look-up takes tells nothing of a key.
_SALT = os.urandom(32)

_LINE = re.compile(r"(?P<name>[\w.@+-]{1,64})(?:\s*:\s*|\s+)(?P<key>[^\s\x00-\x1f\x7f]+)")


def digest(key: str) -> bytes:
    """What is kept and compared in a key's place."""
    return hashlib.blake2b(key.encode(errors="surrogateescape"), key=_SALT).digest()


class Keyring:
    """Keys with the names of those who hold them."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        """`keys`: pairs of a name and a key. Raises ConfigError for a key of two names."""
        self._names: dict[bytes, str] = {}
        for name, key in keys:
            if self._names.setdefault(digest(key), name) != name:
                raise ConfigError(f"{name} and {self._names[digest(key)]} have the same key")

    def __bool__(self) -> bool:
        return bool(self._names)

    def name(self, shown: bytes) -> str | None:
        """Whose key has this digest; None: nobody's."""
        for known in (shown,) if shown in self._names else ():
            if hmac.compare_digest(known, shown):
                return self._names[known]
        return None


class KeyFile:
    """A file of keys, `name:key` or `name key` in each line, that is read again when it changes.

    A file that can't be read, or not understood, leaves the keys as they were, and is told once.
    """

    def __init__(
        self,
        path: str,
        option: str,
        taken: Mapping[str, str] | None = None,
        kept: str | None = None,
        keeps: bool = False,
    ) -> None:
        """`taken`: keys given elsewhere, with the names of their holders. `kept`: what another
        process has read of it, which counts if it can't be used now; `keeps`: whether this one is
        to keep that. Raises ConfigError."""
        self._path = Path(path)
        self._said = f"{option} {path}"
        self._taken = dict(taken or {})
        self._seen = self._signature()
        self._looked = time.monotonic()
        self._keeps = keeps
        self.kept = ""  # what the file said when it could be used last, if it is to be kept
        try:
            self._keys = self._read()
        except ConfigError as error:
            if kept is None:
                raise
            self._keys = self._parse(kept)
            logger.error("%s; the keys stay as they were", error)

    def name(self, shown: bytes) -> str | None:
        """Whose key has this digest; None: nobody's."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self.look()
        return self._keys.name(shown)

    def look(self) -> None:
        """Read the file again if it has changed."""
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keys = self._read()
        except ConfigError as error:
            logger.error("%s; the keys stay as they were", error)
        else:
            logger.info("%s has changed and was read again", self._said)

    def _signature(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def _read(self) -> Keyring:
        said = self._said
        try:
            found = self._path.stat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise ConfigError(f"{said} is no file")  # a pipe would be waited for
            if found.st_size > LARGEST_FILE:
                raise ConfigError(f"{said} has more than {LARGEST_FILE} bytes")
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"{said} can't be read: {reason}") from None
        return self._parse(text)

    def _parse(self, text: str) -> Keyring:
        said, keys = self._said, []
        for number, line in enumerate((line.strip() for line in text.split("\n")), start=1):
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(f"{said}: line {number} is neither name:key nor name key")
            keys.append((match["name"], match["key"]))
            if match["key"] in self._taken:
                holder = self._taken[match["key"]]
                raise ConfigError(f"{said}: the key in line {number} is {holder} as well")
        if not keys:
            logger.warning("%s names no key: no client gets in by it", said)
        try:
            found = Keyring(keys)
        except ConfigError as error:
            raise ConfigError(f"{said}: {error}") from None
        if self._keeps:
            self.kept = text
        return found
