"""Nobody waits for long where another instance could begin with it now."""

import pytest

from llumnix.cluster import ClusterView
from llumnix.policy.decision_context import TERMS
from llumnix.policy.queues import is_blocked
from llumnix.policy.rebalance import Pair, room
from llumnix.policy.rescheduler import PAPER, Pace
from llumnix.simulator.cluster import ClusterConfig, EngineConfig, PolicyConfig
from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.fleet import Fleet
from llumnix.simulator.run import simulate
from llumnix.simulator.workload import Workload, generate

SMALL = EngineConfig(total_blocks=200, max_model_len=3000, max_num_batched_tokens=3000)


def in_vain(fleet: Fleet, view: ClusterView) -> set[str]:
    """The heads of queues that could begin at an instance where nobody waits."""
    loads, infos = view.loads, view.instances
    blocked = [i for i in loads if is_blocked(infos[i], loads[i])]
    free = [i for i in loads if not loads[i].waiting]
    return {
        fleet.instances[source].engine.queued()[0]
        for source in blocked
        for taker in free
        if (there := room(view, Pair(source, taker, "queue"), TERMS)) is not None
        and there.fits(loads[source].head_blocks)
    }


def longest(monkeypatch: pytest.MonkeyPatch, dispatch: str, rule: str, pace: Pace) -> float:
    """For how many seconds that was so of one request at a stretch, in a run of bursts."""
    report, most = Fleet.report, 0
    stretch: dict[str, int] = {}

    def watched(fleet: Fleet) -> ClusterView:
        nonlocal stretch, most
        view = report(fleet)
        stretch = {name: stretch.get(name, 0) + 1 for name in in_vain(fleet, view)}
        most = max([most, *stretch.values()])
        return view

    monkeypatch.setattr(Fleet, "report", watched)
    workload = Workload(
        requests=300,
        arrivals=ArrivalProcess("gamma", rate=6.0, cv=3.0),
        prompt="medium",
        output="medium",
        max_tokens=2900,
    )
    policy = PolicyConfig(dispatch=dispatch, rescheduling=rule, pace=pace, interval=1.0)
    simulate(ClusterConfig(6, SMALL, policy), generate(workload, 3).jobs)
    return (most - 1) * policy.report_interval  # from the first report of it to the last


@pytest.mark.parametrize("dispatch", ["load", "rr"])
def test_no_queue_waits_longer_than_a_second_where_another_could_begin(
    monkeypatch: pytest.MonkeyPatch, dispatch: str
) -> None:
    assert longest(monkeypatch, dispatch, "queues", Pace()) <= 1.0


def test_it_does_by_the_paper_s_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert longest(monkeypatch, "rr", "llumnix", PAPER) > 1.0
