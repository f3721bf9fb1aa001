"""The secret that the nodes of a cluster show one another."""

import secrets

from llumnix.control.codec import decode_text, encode_text
from llumnix.control.errors import EtcdRefused
from llumnix.control.etcd import Etcd
from llumnix.control.keys import Keys


def cluster_token(etcd: Etcd, keys: Keys, given: str | None) -> str:
    """The token given, else the one in etcd, where the first node to ask has put a random one.

    Raises EtcdUnavailable, or EtcdRefused when the key holds no token.
    """
    if given:
        return given
    found = etcd.get(keys.token)
    if found is None:
        _, found = etcd.put_if_absent(keys.token, encode_text(secrets.token_urlsafe(32)))
    try:
        return decode_text(found.value)
    except ValueError as error:
        raise EtcdRefused(f"{keys.token} holds no token: {error}") from None
