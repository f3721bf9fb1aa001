"""Unknown is not lost, and what was seen to go is gone."""

from llumnix.control.etcd.types import KeyValue
from llumnix.control.grace_period import Grace


def items(*names: str, revision: int = 1) -> dict[str, KeyValue]:
    return {name: KeyValue(name, b"1", revision, revision) for name in names}


def grace() -> Grace:
    return Grace(6.0, lambda key: key != "leader")


def test_what_a_list_lacks_is_kept_for_its_time() -> None:
    kept = grace()
    assert kept.after_list(items("a", "b", "leader"), 0.0).keys() == {"a", "b", "leader"}
    assert kept.after_list({}, 10.0) == items("a", "b"), "who leads is never kept"
    assert not kept.is_over(15.9) and kept.is_over(16.0)
    assert kept.end() == {} and not kept.is_over(99.0)


def test_who_comes_back_in_time_stays() -> None:
    kept = grace()
    kept.after_list(items("a", "b"), 0.0)
    kept.after_list({}, 10.0)
    new = items("a", revision=2)
    assert kept.after_events(new, (), 11.0) == new | items("b")
    assert kept.kept == {"b"}
    assert kept.end() == new


def test_a_deletion_that_was_seen_is_believed() -> None:
    kept = grace()
    kept.after_list(items("a", "b"), 0.0)
    assert kept.after_events(items("b"), {"a"}, 1.0) == items("b")
    kept.after_list({}, 2.0)
    assert kept.after_events({}, {"b"}, 8.0) == {}, "also of one that came and went in between"


def test_but_not_right_after_an_outage() -> None:
    """The leases that nobody could prolong end when etcd is back."""
    kept = grace()
    kept.after_list(items("a", "b", "leader"), 0.0)
    kept.after_list(items("a", "b", "leader"), 10.0)
    assert kept.after_events({}, {"a", "b", "leader"}, 10.1) == items("a", "b")
    new = items("a", revision=2)
    assert kept.after_events(new, (), 10.4) == new | items("b")
    assert not kept.is_over(16.0) and kept.is_over(16.1)
    assert kept.end() == new


def test_another_outage_gives_the_whole_time_again() -> None:
    kept = grace()
    kept.after_list(items("a"), 0.0)
    kept.after_list({}, 10.0)
    assert kept.after_list({}, 15.0) == items("a")
    assert not kept.is_over(20.9) and kept.is_over(21.0)
