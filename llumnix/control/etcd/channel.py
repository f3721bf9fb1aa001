"""One member of etcd, over gRPC: the only place that sees pyetcd's generated code.

pyetcd's own client shuns a failed endpoint for 300 s and its watcher stays silent when a member
freezes, so only its messages and stubs are used. Nothing here retries; that is `Etcd`'s part.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from pyetcd import etcdrpc as pb

from llumnix.control.etcd import protobuf
from llumnix.control.etcd.errors import EtcdError, EtcdRefused, LeaseNotFound, WatchEnded
from llumnix.control.etcd.types import Probe, WatchBatch

_OPTIONS = [
    # gRPC would wait up to two minutes before it tries a member again that was down.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # Two clients in one process must not share a broken connection.
    ("grpc.use_local_subchannel_pool", 1),
]

_NO_ANSWER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_NOT_SENT = ("failed to connect", "DNS resolution failed", "channel is closed")
_TOKEN_ERRORS = ("invalid auth token", "revision of auth store is old", "user name is empty")


class Unreachable(EtcdError):
    """This member gave no answer; `sent` tells whether it may have got the request."""

    def __init__(self, reason: str, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class TokenExpired(EtcdError):
    """The member wants us to authenticate (again)."""


class Member:
    """The channel to one endpoint, opened on first use. Safe to use from any thread."""

    def __init__(self, endpoint: str, credentials: Any | None) -> None:
        self.endpoint = endpoint
        self._credentials = credentials
        self._lock = threading.Lock()
        self._channel: Any = None
        self._methods: dict[str, Any] = {}
        self._closed = False

    def call(self, name: str, request: Any, timeout: float, token: str) -> Any:
        """Make one unary call, `timeout` in seconds.

        Raises Unreachable, TokenExpired, or EtcdRefused with what etcd said.
        """
        try:
            return self._method(name)(request, timeout=timeout, metadata=_metadata(token))
        except grpc.RpcError as error:
            raise _understood(error, timeout) from None
        except ValueError:  # gRPC's answer to a call that races with close()
            raise Unreachable("channel is closed", sent=False) from None

    def probe(
        self, request: Any, timeout: float, token: str, answer: Callable[[Probe | EtcdError], None]
    ) -> None:
        """Ask without waiting; `answer` is called once, on a thread of gRPC's."""

        def done(future: Any) -> None:
            try:
                response = future.result()
            except grpc.RpcError as error:
                answer(_understood(error, timeout))
            except grpc.FutureCancelledError:
                answer(Unreachable("channel is closed", sent=False))
            else:
                answer(protobuf.probe(response))

        try:
            future = self._method("range").future(
                request, timeout=timeout, metadata=_metadata(token)
            )
        except ValueError:
            raise Unreachable("channel is closed", sent=False) from None
        future.add_done_callback(done)

    def watch(self, request: Any, token: str) -> "WatchStream":
        """Open a watch; the stream stays silent, and raises nothing, when the member freezes."""
        try:
            return WatchStream(self._method("watch")(request, metadata=_metadata(token)))
        except ValueError:
            raise Unreachable("channel is closed", sent=False) from None

    def close(self) -> None:
        """End every call and stream of this member."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
            self._methods = {}
        if channel is not None:
            channel.close()

    def _method(self, name: str) -> Any:
        with self._lock:
            if self._closed:
                raise Unreachable("channel is closed", sent=False)
            if self._channel is None:
                self._open()
            return self._methods[name]

    def _open(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.endpoint, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(self.endpoint, self._credentials, options=_OPTIONS)
        kv, lease = pb.KVStub(self._channel), pb.LeaseStub(self._channel)
        self._methods = {
            "authenticate": pb.AuthStub(self._channel).Authenticate,
            "range": kv.Range,
            "put": kv.Put,
            "delete": kv.DeleteRange,
            "txn": kv.Txn,
            "grant": lease.LeaseGrant,
            "revoke": lease.LeaseRevoke,
            # Both take a stream of requests. We only ever send one, and a stream of one is, on the
            # wire, a plain request: this spares gRPC's extra thread for each call.
            "keepalive": self._channel.unary_unary(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=pb.LeaseKeepAliveResponse.FromString,
            ),
            "watch": self._channel.unary_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=pb.WatchRequest.SerializeToString,
                response_deserializer=pb.WatchResponse.FromString,
            ),
        }


class WatchStream:
    """The answers of one watch, in order."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[WatchBatch]:
        """Yield batches until the stream ends, which always raises WatchEnded."""
        try:
            for response in self._call:
                if response.canceled:
                    raise WatchEnded(_why_cancelled(response))
                if response.events:
                    yield protobuf.batch(response)
        except grpc.RpcError as error:
            raise WatchEnded(error.details() or error.code().name) from None
        raise WatchEnded("the member closed the watch")

    def cancel(self) -> None:
        """End the stream, from any thread."""
        self._call.cancel()


def open_member(endpoint: str, tls: Any | None) -> Member:
    """A member by its address: host:port, or an http, https or unix URL. Raises ValueError."""
    scheme, _, address = endpoint.rpartition("://")
    if scheme not in ("", "http", "https", "unix"):
        raise ValueError(f"{endpoint} is no etcd endpoint: it must be host:port or a http(s) URL")
    if scheme == "unix":
        return Member(f"unix:{address}", None)
    if scheme == "https" and tls is None:
        tls = grpc.ssl_channel_credentials()
    return Member(address.rstrip("/"), None if scheme == "http" else tls)


def tls_credentials(ca: str | None, cert: str | None, key: str | None) -> Any | None:
    """Credentials from PEM files; None without. Raises OSError, ValueError for half a pair."""
    if (cert is None) != (key is None):
        raise ValueError("a client certificate and its key must be given together")
    if ca is None and cert is None:
        return None
    pems = [Path(path).read_bytes() if path else None for path in (ca, key, cert)]
    return grpc.ssl_channel_credentials(*pems)


def _why_cancelled(response: Any) -> str:
    if response.compact_revision:
        return f"etcd has forgotten what came before revision {response.compact_revision}"
    return response.cancel_reason or "the member cancelled the watch"


def _metadata(token: str) -> tuple[tuple[str, str], ...] | None:
    return (("token", token),) if token else None


def _understood(error: Any, timeout: float) -> EtcdError:
    """The error of this package that stands for a gRPC error."""
    code, details = error.code(), error.details() or ""
    if any(text in details for text in _TOKEN_ERRORS):
        return TokenExpired(details)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable(f"no answer in {timeout:.1f} s", sent=True)
    if code in _NO_ANSWER:
        sent = not details.startswith(_NOT_SENT)
        reason = details if sent else details.rsplit(": ", 1)[-1].lower()
        return Unreachable(reason or code.name, sent)
    if "requested lease not found" in details:
        return LeaseNotFound("the lease has ended")
    return EtcdRefused(details or code.name)
