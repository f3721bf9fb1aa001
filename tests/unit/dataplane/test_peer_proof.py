"""The greeting of two nodes, without a network: what is proved, and what proves nothing."""

import time
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.dataplane import peer_proof
from llumnix.dataplane.peer_proof import (
    CHALLENGE,
    LIFE,
    PROOF,
    Door,
    GreetingError,
    Introduction,
    Key,
    Role,
    answer,
    convinced,
)

KEY = Key("secret")
WHO = Introduction("a", "life-a", "0.1", "b", "10.0.0.2:8000")


def door() -> Door:
    return Door(KEY, "b", "life-b", "10.0.0.2:8000")


def test_each_proves_itself_to_the_other() -> None:
    b = door()
    asked = b.ask(Introduction.read(WHO.headers()))
    challenge = convinced(KEY, WHO, 401, asked)
    headers = answer(KEY, WHO, challenge)
    hello = b.admit(Introduction.read(headers), headers)
    KEY.check(hello, Role.OPENED, WHO, challenge)
    assert challenge.life == "life-b"
    assert len({asked[PROOF], headers[PROOF], hello}) == 3
    assert "secret" not in f"{asked}{headers}{hello}"


def test_a_proof_is_good_for_its_own_side_only() -> None:
    """What the accepter has sent, sent back to it, proves nothing."""
    b = door()
    asked = b.ask(WHO)
    with pytest.raises(GreetingError, match="wrong token"):
        b.admit(WHO, asked)


def test_no_two_fields_can_be_confused() -> None:
    """A letter that moves from one to the next makes another proof."""
    challenge = peer_proof.Challenge("text", "life")
    proofs = {KEY.proof(Role.DIALLER, WHO, challenge)}
    for before, after in zip(fields(WHO), fields(WHO)[1:], strict=False):
        left, right = getattr(WHO, before.name), getattr(WHO, after.name)
        moved = replace(WHO, **{before.name: left[:-1], after.name: left[-1] + right})
        proofs.add(KEY.proof(Role.DIALLER, moved, challenge))
    assert len(proofs) == len(fields(WHO))


def test_another_nonce_each_time() -> None:
    assert (
        Introduction("a", "1", "1", "b", "x").nonce != Introduction("a", "1", "1", "b", "x").nonce
    )
    b = door()
    assert b.ask(WHO)[CHALLENGE] != b.ask(WHO)[CHALLENGE]


def test_a_challenge_is_answered_once_in_time_and_where_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = door()
    headers = answer(KEY, WHO, convinced(KEY, WHO, 401, b.ask(WHO)))
    with pytest.raises(GreetingError, match="not made the challenge"):
        door().admit(WHO, headers)
    b.admit(WHO, headers)
    with pytest.raises(GreetingError, match="answered already"):
        b.admit(WHO, headers)
    monkeypatch.setattr(peer_proof, "CHALLENGE_SECONDS", -1.0)
    late = answer(KEY, WHO, convinced(KEY, WHO, 401, b.ask(WHO)))
    with pytest.raises(GreetingError, match="took longer"):
        b.admit(WHO, late)


def test_nothing_is_kept_of_who_only_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    b = door()
    for _ in range(100):
        b.ask(WHO)
    assert not b._answered
    monkeypatch.setattr(peer_proof, "CHALLENGE_SECONDS", 0.05)
    for _ in range(3):
        b.admit(WHO, answer(KEY, WHO, convinced(KEY, WHO, 401, b.ask(WHO))))
    assert len(b._answered) <= 3
    kept = set(b._answered)
    later = time.monotonic() + 60
    monkeypatch.setattr(peer_proof.time, "monotonic", lambda: later)
    b.admit(WHO, answer(KEY, WHO, convinced(KEY, WHO, 401, b.ask(WHO))))
    assert len(b._answered) == 1 and not kept & set(b._answered)


@pytest.mark.parametrize("change", [{"to": "c"}, {"address": "10.0.0.3:8000"}])
def test_only_the_node_that_is_meant_answers(change: dict[str, str]) -> None:
    with pytest.raises(GreetingError, match=r"but this is node 'b' at '10\.0\.0\.2:8000'"):
        door().ask(replace(WHO, **change))


HEADER = st.text(st.characters(min_codepoint=1, max_codepoint=0xDCFF), max_size=40)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_headers_with_anything_in_them(data: st.DataObject) -> None:
    """A head in which anything is changed, or missing, is refused and nothing else is raised."""
    b = door()
    good = answer(KEY, WHO, convinced(KEY, WHO, 401, b.ask(WHO)))
    name = data.draw(st.sampled_from(sorted(good)))
    bad = dict(good)
    if data.draw(st.booleans()):
        bad[name] = data.draw(HEADER)
    else:
        del bad[name]
    if bad == good:
        return
    with pytest.raises(GreetingError):
        b.admit(Introduction.read(bad), bad)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([CHALLENGE, LIFE, PROOF, "Server"]), HEADER))
def test_answers_with_anything_in_them(headers: dict[str, str]) -> None:
    with pytest.raises(GreetingError):
        convinced(KEY, WHO, 401, headers)
