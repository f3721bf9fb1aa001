"""Names of the groups in which the workers of two instances transfer KV blocks."""

from llumnix.migration.transfer_groups import Groups


def test_a_group_lasts_until_a_failure_or_a_restart_of_either_side() -> None:
    groups = Groups()
    first = groups.name("a--b", ("a1", "b1"))
    other = groups.name("b--a", ("b1", "a1"))
    assert first != other
    assert groups.name("a--b", ("a1", "b1")) == first
    groups.renew("a--b")
    second = groups.name("a--b", ("a1", "b1"))
    third = groups.name("a--b", ("a1", "b2"))
    fourth = groups.name("a--b", ("a2", "b2"))
    assert len({first, second, third, fourth}) == 4
    assert groups.name("a--b", ("a2", "b2")) == fourth
    assert groups.name("b--a", ("b1", "a1")) == other


def test_a_way_that_fails_is_not_tried_again_between_the_same_engines() -> None:
    groups = Groups()
    lives = ("a1", "b1")
    first = groups.name("a--b", lives)
    assert groups.skips("a--b", lives) == 0
    groups.failed("a--b")
    assert groups.skips("a--b", lives) == 1
    assert groups.name("a--b", lives) != first
    groups.renew("a--b")  # a failure of a transfer says nothing of the way
    assert groups.skips("a--b", lives) == 1
    assert groups.skips("a--b", ("a1", "b2")) == 0
