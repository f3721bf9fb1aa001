"""API servers see what the others have open, and a server that has died has nothing open."""

from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from llumnix.node.api_servers.shared_counts import CountsFile
from llumnix.server.admission import Admission
from tests.kit.loop import on_loop


def test_each_sees_the_sum_of_the_others(tmp_path: Path) -> None:
    files = [CountsFile(tmp_path / "counts", 3) for _ in range(3)]  # as in three processes
    rows = [file.of(server) for server, file in enumerate(files)]
    for server, row in enumerate(rows):
        row.tell(10**server, 2 * 10**server)
    assert [row.others() for row in rows] == [(110, 220), (101, 202), (11, 22)]
    files[0].clear(2)  # by the node, as it has died
    assert rows[0].others() == (10, 20)


def test_who_has_more_than_another_gives_way(tmp_path: Path) -> None:
    counts = CountsFile(tmp_path / "counts", 3)
    first, second, _ = (counts.of(server) for server in range(3))
    first.tell(1, 0)
    assert not first.is_ahead(), "nobody else takes connections"
    second.listens(True)
    assert first.is_ahead() and not second.is_ahead()
    second.tell(1, 0)
    assert not first.is_ahead() and not second.is_ahead(), "those that don't listen do not count"
    counts.clear(1)
    assert not first.is_ahead()


@on_loop
async def test_a_limit_is_for_all_together(tmp_path: Path) -> None:
    counts = CountsFile(tmp_path / "counts", 2)
    other = counts.of(1)
    admission = Admission(4, 100, shared=counts.of(0))

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(counts.row(0)[0]))

    app = web.Application()
    app.router.add_post("/v1/completions", admission.guard(answer))
    async with TestClient(TestServer(app)) as client:
        other.tell(3, 0)
        assert await (await client.post("/v1/completions", data=b"{}")).text() == "1"
        other.tell(4, 0)
        assert (await client.post("/v1/completions", data=b"{}")).status == 429
        other.tell(1, 100)  # tokens of prompts
        assert (await client.post("/v1/completions", data=b"{}")).status == 429
        other.tell(0, 0)
        assert (await client.post("/v1/completions", data=b"{}")).status == 200
    assert counts.row(0) == (0, 0, False)
