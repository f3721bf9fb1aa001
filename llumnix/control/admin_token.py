"""The secret that operators show, where a cluster has made one for itself."""

import secrets

from llumnix.control.codec import decode_text, encode_text
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdRefused
from llumnix.control.keys import Keys


def made_admin_token(etcd: Etcd, keys: Keys) -> str:
    """The token in etcd, where the first node to ask has put a random one.

    Raises EtcdUnavailable, or EtcdRefused when the key holds no token.
    """
    found = etcd.get(keys.admin_token)
    if found is None:
        new = encode_text(secrets.token_urlsafe(32))
        _, found = etcd.put_if_absent(keys.admin_token, new)
    try:
        return decode_text(found.value)
    except ValueError as error:
        raise EtcdRefused(f"{keys.admin_token} holds no token: {error}") from None
