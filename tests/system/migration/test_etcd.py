"""etcd is silent, or leaves open what it has done, at each step that is recorded there."""

from collections.abc import Iterator

import pytest

from llumnix.control.etcd.errors import EtcdOutcomeUnknown
from llumnix.control.keys import Keys
from llumnix.migration import departures
from llumnix.migration.actor import MigrationActor
from llumnix.migration.record import Handshake, MigrationRecord, MigrationState
from tests.kit.etcd import EtcdCluster
from tests.kit.invariants import check_invariants
from tests.kit.loop import on_loop, soon
from tests.kit.migrating import LAYOUTS, STEPS, Control, before
from tests.kit.scene import NAME, scene

Frail = tuple[EtcdCluster, dict[str, Control]]
RECORDED = {"propose": "proposed", "accept": "accepted", "copy": "copying", "commit": "committed"}


@pytest.fixture
def silent(frail: Frail, monkeypatch: pytest.MonkeyPatch) -> Iterator[Frail]:
    """An etcd to be frozen, well again after the test."""
    monkeypatch.setattr(departures, "SETTLE_SECONDS", 0.1)
    yield frail
    frail[0].heal()


@pytest.mark.parametrize("step", STEPS)
@on_loop
async def test_etcd_is_silent(silent: Frail, keys: Keys, step: str) -> None:
    """Before the commit the request stays, after it it moves; the record goes once etcd is back."""
    etcd, controls = silent
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        await s.begin(step)
        etcd.freeze(0)
        outcome = await s.go_on()
        late = step in ("hand over", "resume")
        assert outcome == "moved" if late else "etcd does not answer" in outcome, outcome
        place = s.destination if late else s.source
        await soon(lambda: s.cluster.where(NAME) == [place])
        have = len(s.stream.tokens)
        s.cluster.paces[place].let(3)
        await soon(lambda: len(s.stream.tokens) >= have + 3)
        await s.cluster.sites["a"].actor.ask(
            MigrationActor.ping
        )  # the record could not be removed at once
        etcd.thaw(0)
        await s.is_at(place)
        await s.moves_again()
        await s.ends_well()


@on_loop
async def test_nothing_moves_while_etcd_is_silent(silent: Frail, keys: Keys) -> None:
    """Also not what was refused before, whose late proposal etcd may yet carry out."""
    etcd, controls = silent
    async with scene(controls, keys, LAYOUTS["all on one node"]) as s:
        etcd.freeze(0)
        for _ in range(2):
            outcome = await s.cluster.move(NAME, s.source, s.destination)
            assert "etcd does not answer" in outcome or "did not answer" in outcome
        assert s.cluster.where(NAME) == [s.source]
        etcd.thaw(0)
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


@on_loop
async def test_it_ends_while_etcd_is_silent(silent: Frail, keys: Keys) -> None:
    """No record is left of a request that is no more."""
    etcd, controls = silent
    async with scene(controls, keys, LAYOUTS["API server at the source"]) as s:
        await s.begin("commit")
        etcd.freeze(0)
        await s.ends_well()
        await s.go_on()
        etcd.thaw(0)
        await check_invariants(s.cluster)


# ---- answers that are lost ----


class Doubtful(Handshake):
    """Does what it is asked and does not know it."""

    at = ""

    def propose(self, record: MigrationRecord) -> None:
        super().propose(record)
        self._doubt(record.state)

    def advance(
        self, request: str, migration: str, expected: MigrationState, to: MigrationState
    ) -> MigrationRecord:
        record = super().advance(request, migration, expected, to)
        self._doubt(to)
        return record

    def _doubt(self, state: MigrationState) -> None:
        if state == Doubtful.at:
            Doubtful.at = ""
            raise EtcdOutcomeUnknown("nobody answered")


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("step", RECORDED)
@on_loop
async def test_the_answer_of_etcd_is_lost(
    controls: dict[str, Control], keys: Keys, step: str, where: str
) -> None:
    """The record says more than the source knows: the request stays, and the record goes."""
    async with scene(controls, keys, LAYOUTS[where], handshake=Doubtful) as s:
        Doubtful.at = RECORDED[step]
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert "etcd does not answer: nobody answered" in outcome and not Doubtful.at
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


@pytest.mark.parametrize("step", [s for s in before("hand over") if s != "propose"])
@on_loop
async def test_the_record_is_gone(controls: dict[str, Control], keys: Keys, step: str) -> None:
    """The lease it hung on has ended, or an operator has deleted it: nothing moves without one."""
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        await s.begin(step)
        controls["a"].etcd.delete(keys.migration(NAME))
        assert f"the migration of request {NAME} is gone" in await s.go_on()
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()
