"""llumnixctl watches a drain that the node sees late or somebody cancels, and finds its token."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from llumnix.entrypoints import ctl
from llumnix.secrecy import SecretError, find_token, token_file, write_token


class Scripted(ctl.Cluster):
    """A node that lists these drains, one list after the other, and the last one for ever."""

    def __init__(self, *lists: list[ctl.Row]) -> None:
        super().__init__("http://nowhere", None)
        self._lists = list(lists)

    def get(self, path: str) -> Any:
        return self._lists.pop(0) if len(self._lists) > 1 else self._lists[0]

    def post(self, path: str, body: ctl.Row) -> Any:
        return left(2)


def left(number: int) -> ctl.Row:
    names = [f"r{n}" for n in range(number)]
    shown = {"name": "a", "kind": "node", "drained": True, "left": number}
    return {**shown, "requests": names, "stuck": {}}


def drain(cluster: ctl.Cluster) -> list[ctl.Row]:
    return ctl.drain(cluster, ctl.make_parser().parse_args(["drain", "a"]))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctl, "DRAIN_LOOK", 0.01)
    monkeypatch.setattr(ctl, "DRAIN_SHOWN", 0.1)


def test_a_drain_that_the_node_sees_late_was_not_cancelled() -> None:
    (row,) = drain(Scripted([], [], [left(2)], [left(0)]))
    assert row == {"name": "a", "kind": "node", "drained": True, "left": 0}


def test_a_drain_that_the_node_shows_no_more_was_cancelled() -> None:
    with pytest.raises(ctl.CommandError, match="the drain of a was cancelled"):
        drain(Scripted([], [left(2)], []))


def test_a_drain_that_the_node_never_shows_is_not_waited_for() -> None:
    with pytest.raises(ctl.CommandError, match=r"the drain of a does not show after 0\.1 s"):
        drain(Scripted([]))


def test_where_a_token_is_found(tmp_path: Path) -> None:
    environment = {"LLUMNIX_STATE_DIR": str(tmp_path), "LLUMNIX_CLUSTER": "c"}
    token, hint = find_token("", "", environment)
    assert token is None and "give --admin-token-file, or set LLUMNIX_ADMIN_TOKEN" in hint
    path = write_token("left", str(tmp_path), "c")
    assert find_token("", "", environment)[0] == "left"
    other = tmp_path / "other"
    other.write_text("of-a-file\n")
    environment["LLUMNIX_ADMIN_TOKEN_FILE"] = str(other)
    assert find_token("", "", environment)[0] == "of-a-file"
    environment["LLUMNIX_ADMIN_TOKEN"] = "of-the-environment"
    assert find_token("", "", environment)[0] == "of-the-environment"
    assert find_token("given", "", environment)[0] == "given"
    assert find_token("", str(path), {})[0] == "left"
    with pytest.raises(SecretError, match="can't be read: No such file"):
        find_token("", str(tmp_path / "nowhere"), {})


def test_a_token_is_left_for_its_user_alone(tmp_path: Path) -> None:
    path = token_file(str(tmp_path), "c")
    path.parent.mkdir(mode=0o755)
    path.write_text("old")
    path.chmod(0o644)
    assert write_token("new", str(tmp_path), "c") == path
    assert path.read_text() == "new\n" and path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700 and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("given", [[], ["--admin-token", "wrong"]])
def test_what_is_missing_is_told(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": {"message": "this route is for operators"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    for name in ("LLUMNIX_ADMIN_TOKEN", "LLUMNIX_ADMIN_TOKEN_FILE", "LLUMNIX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLUMNIX_STATE_DIR", str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert ctl.main(["--url", url, *given, "requests"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    missing = "the token given is not the one" if given else "give --admin-token-file, or set"
    assert line.startswith("llumnixctl: this route is for operators; ") and missing in line
