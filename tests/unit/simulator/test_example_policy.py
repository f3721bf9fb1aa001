"""The policy of docs/examples, found as an installed package's is."""

from pathlib import Path

import pytest

from llumnix.plugins import dispatch_policy
from llumnix.simulator.cluster import ClusterConfig, PolicyConfig
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import SimJob

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "policy"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (EXAMPLE / "pyproject.toml").read_text()
    entry = text.partition('[project.entry-points."llumnix.dispatch"]\n')[2].splitlines()[0]
    folder = tmp_path / "shortest_prefill-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: shortest-prefill\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[llumnix.dispatch]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.mark.usefixtures("installed")
def test_it_dispatches_by_prompts() -> None:
    assert not dispatch_policy("shortest-prefill").keeps
    jobs = [SimJob(0, 0.0, 4000, 2), SimJob(1, 0.001, 100, 2), SimJob(2, 0.002, 100, 2)]
    config = ClusterConfig(2, policy=PolicyConfig(dispatch="shortest-prefill"))
    long, one, other = (story.instance for story in simulate(config, jobs).stories)
    assert one == other != long
