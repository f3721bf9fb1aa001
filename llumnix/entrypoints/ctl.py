"""llumnixctl: look at a cluster, move its requests, and empty parts of it, through any node."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import orjson

from llumnix.log_lines import in_json, one_line
from llumnix.secrecy import SecretError, find_token

SECONDS = 150.0  # longer than the longest migration
DRAIN_SECONDS = 600.0  # that a drain is watched for, unless --wait says
DRAIN_LOOK = 0.5  # seconds between two looks at it
DRAIN_SHOWN = 15.0  # seconds that the node may take to see it in etcd

Row = dict[str, Any]


class CommandError(Exception):
    """What was asked was not done; the message says why."""


class Cluster:
    """One node's HTTP server, through which the whole cluster can be seen."""

    def __init__(self, url: str, token: str | None, token_hint: str = "") -> None:
        """`token`: an operator's; `token_hint`: what to tell if the node wants another one."""
        self._url = url.rstrip("/")
        self._token_hint = token_hint
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> Any:
        """The decoded answer to GET. Raises CommandError."""
        return self._ask(Request(self._url + path, headers=self._headers))

    def post(self, path: str, body: Row) -> Any:
        """The decoded answer to POST. Raises CommandError."""
        data = orjson.dumps(body)
        return self._ask(Request(self._url + path, data=data, headers=self._headers))

    def _ask(self, request: Request) -> Any:
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                return orjson.loads(answer.read())
        except HTTPError as error:
            said = _message(error.read()) or f"the node answers {error}"
            if error.code == HTTPStatus.UNAUTHORIZED:
                said = f"{said}; {self._token_hint}"
            raise CommandError(said) from error
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise CommandError(
                f"no node answers at {self._url} ({reason}); name one with --url"
            ) from error
        except orjson.JSONDecodeError as error:
            raise CommandError(f"{self._url} is no llumnix node") from error


def _message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def requests(cluster: Cluster, arguments: argparse.Namespace) -> list[Row]:
    """All requests, running and waiting."""
    return list(cluster.get("/llumnix/requests"))


def instances(cluster: Cluster, arguments: argparse.Namespace) -> list[Row]:
    """All instances with their loads."""
    shown = ("id", "node", "state", "model", "total_blocks", "load")
    return [{name: one[name] for name in shown} for one in cluster.get("/status")["instances"]]


def nodes(cluster: Cluster, arguments: argparse.Namespace) -> list[Row]:
    """All nodes, and which of them leads."""
    status = cluster.get("/status")
    return [
        {name: one[name] for name in ("id", "address", "version")}
        | {"leads": one["id"] == status["leader"]}
        for one in status["nodes"]
    ]


def migrate(cluster: Cluster, arguments: argparse.Namespace) -> list[Row]:
    """Move a request to another instance while it runs."""
    body = {"request": arguments.request, "to": arguments.to}
    return [cluster.post("/llumnix/migrate", body)]


def drain(cluster: Cluster, arguments: argparse.Namespace) -> list[Row]:
    """Empty a node or an instance: nothing new goes there, what runs there moves away."""
    body = {"name": arguments.name, "cancel": arguments.cancel}
    found = cluster.post("/llumnix/drain", body)
    if not arguments.cancel and arguments.wait > 0:
        found = _watch(cluster, found, arguments.wait)
    return [{name: found[name] for name in ("name", "kind", "drained", "left")}]


def _watch(cluster: Cluster, found: Row, seconds: float) -> Row:
    """Tell how many requests are left until none is. Raises CommandError if some stay."""
    deadline, told, name = time.monotonic() + seconds, None, found["name"]
    # The node may see later in etcd what it has just written there.
    shown, shown_by = False, time.monotonic() + DRAIN_SHOWN
    while True:
        if found["left"] != told:
            told = found["left"]
            print(f"requests left at {name}: {told}", file=sys.stderr)
        if told == 0:
            return found
        if time.monotonic() >= deadline:
            raise CommandError(_unfinished(found, seconds))
        time.sleep(DRAIN_LOOK)
        drains = {one["name"]: one for one in cluster.get("/llumnix/drain")}
        if name in drains:
            found, shown = drains[name], True
        elif shown:
            raise CommandError(f"the drain of {name} was cancelled")
        elif time.monotonic() >= shown_by:
            raise CommandError(
                f"the drain of {name} does not show after {DRAIN_SHOWN:g} s: it was cancelled, or "
                "etcd does not answer the node"
            )


def _unfinished(found: Row, seconds: float) -> str:
    reasons = "".join(f"; {one} can't move: {why}" for one, why in found["stuck"].items())
    names = ", ".join(found["requests"]) or f"{found['left']}, whose node does not list them"
    return (
        f"{found['name']} is drained, but requests are left there after {seconds:g} s: "
        f"{names}{reasons}"
    )


COMMANDS: Mapping[str, Callable[[Cluster, argparse.Namespace], list[Row]]] = {
    "requests": requests,
    "instances": instances,
    "nodes": nodes,
    "migrate": migrate,
    "drain": drain,
}


def table(rows: Sequence[Row]) -> str:
    """Rows as columns for people."""
    if not rows:
        return "none"
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    lines = [[one_line(name.upper()) for name in names]]
    lines += [["-" if row.get(n) is None else one_line(str(row[n])) for n in names] for row in flat]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _flat(row: Row) -> Row:
    """What is grouped in a row, beside the rest."""
    flat: Row = {}
    for name, value in row.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _url(text: str) -> str:
    url = text if "//" in text else f"http://{text}"
    if not urlsplit(url).hostname:
        raise argparse.ArgumentTypeError(f"{text} is no address of a node")
    return url


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return seconds


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url",
        type=_url,
        default=argparse.SUPPRESS,
        help="address of any node (default: $LLUMNIX_URL, or http://127.0.0.1:8000)",
    )
    common.add_argument(
        "-o",
        "--output",
        choices=("table", "json"),
        default=argparse.SUPPRESS,
        help="how to print (default: table)",
    )
    common.add_argument(
        "--admin-token-file",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="file with the operators' token (default: $LLUMNIX_ADMIN_TOKEN, "
        "$LLUMNIX_ADMIN_TOKEN_FILE, or what a node of this user has left for $LLUMNIX_CLUSTER)",
    )
    common.add_argument(
        "--admin-token",
        default=argparse.SUPPRESS,
        metavar="TOKEN",
        help="the token itself, which other users of this machine can see",
    )
    parser = argparse.ArgumentParser(
        prog="llumnixctl",
        description="Look at a cluster, move its requests, and empty parts of it.",
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").strip()
        one = commands.add_parser(name, help=text, description=text, parents=[common])
        if name == "migrate":
            one.add_argument("request", help="id of the request, or a part of it")
            one.add_argument("--to", required=True, metavar="INSTANCE", help="where it is to go")
        if name == "drain":
            one.add_argument("name", metavar="NODE|INSTANCE", help="what is to be emptied")
            one.add_argument("--cancel", action="store_true", help="let it take requests again")
            one.add_argument(
                "--wait",
                type=_seconds,
                default=DRAIN_SECONDS,
                metavar="SECONDS",
                help="tell what is left there until nothing is, for so long (default: %(default)g)",
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after one sentence on standard error."""
    arguments = make_parser().parse_args(argv)
    url = getattr(arguments, "url", None) or _url(
        os.environ.get("LLUMNIX_URL", "http://127.0.0.1:8000")
    )
    try:
        token = getattr(arguments, "admin_token", ""), getattr(arguments, "admin_token_file", "")
        cluster = Cluster(url, *find_token(*token, os.environ))
        rows = COMMANDS[arguments.command](cluster, arguments)
    except (CommandError, SecretError) as error:
        print(f"llumnixctl: {one_line(str(error))}", file=sys.stderr)
        return 1
    if getattr(arguments, "output", "table") == "json":
        print(in_json(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode()))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
