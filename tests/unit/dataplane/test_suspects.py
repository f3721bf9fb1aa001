"""Who has failed is avoided for a moment, unless it shows that it is well."""

from llumnix.dataplane.suspects import SUSPECT_SECONDS, Suspects


def test_suspicion_lasts_from_the_last_failure() -> None:
    now = 0.0
    suspects = Suspects(lambda: now)
    suspects.add(["a-0", "a-1"])
    now = SUSPECT_SECONDS / 2
    suspects.add(["a-1"])
    assert suspects.now() == {"a-0", "a-1"}
    now = SUSPECT_SECONDS
    assert suspects.now() == {"a-1"}
    now = SUSPECT_SECONDS * 1.5
    assert suspects.now() == frozenset()


def test_who_is_well_is_trusted_at_once() -> None:
    suspects = Suspects(lambda: 0.0)
    suspects.add(["a-0", "b-0"])
    suspects.clear(["a-0", "c-0"])
    assert suspects.now() == {"b-0"}
