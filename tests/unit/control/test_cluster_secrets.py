"""Tokens that operators give to their cluster."""

import secrets

import pytest

from llumnix.control.cluster_secrets import LEAST, weakness


@pytest.mark.parametrize("token", ["x", "secret", "hunter2hunter2", "a" * 40, "abab" * 10])
def test_a_token_that_can_be_guessed(token: str) -> None:
    said = weakness(token)
    assert said is not None and str(LEAST) in said
    assert token not in said.split() and said.count("\n") == 0


def test_tokens_as_they_are_made() -> None:
    for made in (secrets.token_hex(8), secrets.token_urlsafe(32), "correct horse battery staple"):
        assert weakness(made) is None, made
