"""The migration actor's books against the records that appear in etcd."""

from typing import Any

from llumnix.migration.actor import Books, MigrationActor
from llumnix.migration.errors import MigrationError
from llumnix.migration.record import MigrationRecord


class Records:
    """The records of etcd, as far as the actor asks for them."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def propose(self, record: MigrationRecord) -> None:
        pass

    def remove(self, request: str, migration: str) -> None:
        self.removed.append(migration)


def record(migration: str, request: str = "r") -> MigrationRecord:
    return MigrationRecord(request, "a-0", "b-0", 1, migration=migration)


def test_only_a_record_of_no_migration_is_swept_away() -> None:
    records, books = Records(), Books()
    actor: Any = MigrationActor.start(records, 4, 0, books).proxy()
    actor.propose(record("m1"), 3).get(timeout=5)
    actor.sweep(record("m1")).get(timeout=5)
    assert records.removed == []
    actor.sweep(record("m0")).get(timeout=5)  # which has ended long ago
    assert records.removed == ["m0"]


def test_a_successor_has_the_books() -> None:
    records, books = Records(), Books()
    first: Any = MigrationActor.start(records, 1, 0, books).proxy()
    first.propose(record("m1"), 3).get(timeout=5)
    first.actor_ref.stop()
    second: Any = MigrationActor.start(records, 1, 0, books).proxy()
    try:
        second.propose(record("m2", "q"), 3).get(timeout=5)
    except MigrationError as error:
        assert str(error) == "1 requests leave instance a-0 already"
    else:
        raise AssertionError("one may leave at a time")
    assert second.ended("m1", None).get(timeout=5) and records.removed == ["m1"]
