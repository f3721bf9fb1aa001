"""A view that is told in changes is the view itself, and what has not changed stays as it was."""

from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.control.view_change import ViewChange, applied, change

NAMES = st.sampled_from([f"n{i}" for i in range(4)])
COUNTS = st.integers(0, 5)


def mapping(names: st.SearchStrategy[str], make: st.SearchStrategy[object]) -> st.SearchStrategy:
    return st.dictionaries(names, make, max_size=4)


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    nodes = draw(mapping(NAMES, COUNTS))
    instances = draw(mapping(NAMES, st.tuples(st.sampled_from(InstanceState), COUNTS)))
    loads = draw(mapping(NAMES, st.tuples(COUNTS, st.dictionaries(NAMES, COUNTS, max_size=2))))
    return ClusterView(
        revision=draw(COUNTS),
        nodes=MappingProxyType(
            {
                n: NodeInfo(n, f"{n}:1", "v", epoch, peer_address=f"{n}:2")
                for n, epoch in nodes.items()
            }
        ),
        instances=MappingProxyType(
            {n: InstanceInfo(n, "n0", "m", state, k, 16) for n, (state, k) in instances.items()}
        ),
        loads=MappingProxyType(
            {
                n: InstanceLoad(n, k, received=MappingProxyType(sent), priorities={-1: k})
                for n, (k, sent) in loads.items()
            }
        ),
        desired=MappingProxyType(draw(mapping(NAMES, COUNTS))),
        draining=frozenset(draw(st.sets(NAMES))),
        leader=draw(st.none() | NAMES),
        leader_epoch=draw(COUNTS),
    )


def told(before: ClusterView, after: ClusterView) -> ViewChange:
    """The change as it arrives in another process."""
    packed = msgspec.msgpack.encode(change(before, after))
    return msgspec.msgpack.decode(packed, type=ViewChange)


@given(st.lists(views(), min_size=1, max_size=4))
def test_who_is_told_all_changes_has_the_view(history: list[ClusterView]) -> None:
    known, before = ClusterView(), ClusterView()
    for view in history:
        known = applied(known, told(before, view))
        before = view
        assert known == view


@given(views())
def test_what_has_not_changed_is_the_same_object(view: ClusterView) -> None:
    known = applied(ClusterView(), told(ClusterView(), view))
    again = applied(known, told(view, view))
    assert (again.nodes, again.instances, again.loads) == (view.nodes, view.instances, view.loads)
    assert again.instances is known.instances and again.loads is known.loads


def test_one_load_of_many() -> None:
    loads = {f"i{n}": InstanceLoad(f"i{n}", running=n) for n in range(64)}
    view = ClusterView(loads=MappingProxyType(loads))
    newer = ClusterView(loads=MappingProxyType(loads | {"i7": InstanceLoad("i7", running=9)}))
    assert list(change(view, newer).loads) == ["i7"]
    known = applied(ClusterView(), told(ClusterView(), view))
    assert applied(known, told(view, newer)).loads["i8"] is known.loads["i8"]


def test_what_is_no_fact_is_refused() -> None:
    broken = change(ClusterView(), ClusterView(nodes={"a": NodeInfo("a", "a:1", "v", 1)}))
    broken.nodes["a"] = b'{"address": 7}'
    with pytest.raises(ValueError, match="address"):
        applied(ClusterView(), broken)
