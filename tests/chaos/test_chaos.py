"""A few faults of each kind, with modelled engines inside the nodes; `make chaos` has them all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import PASSWORD, Arena
from tests.chaos.faults import FAULTS
from tests.chaos.load import Load
from tests.chaos.report import Report
from tests.chaos.run import Run
from tests.kit.etcd import EtcdCluster
from tests.kit.proxy import Proxies

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CLIENTS = 9
CHOSEN = ("link dead", "etcd leader frozen", "API server SIGKILL", "lease revoked", "node SIGTERM")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("chaos")
    with EtcdCluster(3, PASSWORD) as etcd, Proxies() as proxies:
        arena = Arena(folder, model, etcd, proxies, 1, "sim")
        try:
            load = Load(arena.urls(), Path(model), CLIENTS, 1, moves=0.5)
            run = Run(arena, load, Report(folder / "chaos.json", {}), 1, print)
            run.begin(1.0)
            yield run
        finally:
            arena.close()


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_costs_no_token(run: Run, name: str) -> None:
    """And no request, but those whose node it has killed."""
    (fault,) = [fault for fault in FAULTS if fault.name == name]
    injection = run.one(fault)
    assert not injection.wrongs and not run.report.wrongs, injection
    assert injection.lost == injection.doubled == injection.wrong == injection.failed == 0


def test_nothing_is_left(run: Run) -> None:
    """Requests, KV blocks, keys, processes."""
    run.end()
    assert run.report.requests > CLIENTS and run.report.moved["moved"] > 0
    assert not run.report.wrongs
