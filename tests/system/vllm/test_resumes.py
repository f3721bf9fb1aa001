"""Every sampling parameter, resumed at any position: the rest is what it would have been."""

from collections.abc import Iterator

import pytest

from tests.kit.resumes import Bench, Result
from tests.kit.sampling import ALONE, CASES, params
from tests.kit.tails import Whole, different, resume_all, run_whole

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Bench]:
    """An engine as llumnix starts it, with vLLM's defaults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        bench = Bench(model, tmp_path_factory.mktemp("bench"), block_size=32).start()
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def wholes(bench: Bench) -> dict[str, Whole]:
    alone = run_whole(bench, {name: params(case) for name, case in ALONE.items()}, seed=2)
    return alone | run_whole(bench, {name: params(case) for name, case in CASES.items()}, seed=1)


@pytest.fixture(scope="module")
def tails(bench: Bench, wholes: dict[str, Whole]) -> dict[str, list[tuple[int, Result]]]:
    alone = {name: wholes[name] for name in ALONE}
    others = {name: whole for name, whole in wholes.items() if name not in ALONE}
    return resume_all(bench, alone) | resume_all(bench, others)


@pytest.mark.parametrize("case", [*CASES, *ALONE])
def test_a_request_resumed_at_any_position(
    case: str, wholes: dict[str, Whole], tails: dict[str, list[tuple[int, Result]]]
) -> None:
    whole = wholes[case]
    assert len(whole.result.tokens) >= 5, whole
    assert len(tails[case]) >= 2
    for position, tail in tails[case]:
        assert not different(whole, position, tail)
        assert not tail.of_prompt and not tail.prefills, "the client has had these"
    assert whole.result.of_prompt == (case == "prompt_logprobs")


def test_sampling_without_a_seed_keeps_its_distribution(bench: Bench) -> None:
    """The next token of many, behind the same text: generated elsewhere, or all of it prompt."""
    begun, number = (28, 260), 250
    either = params({"temperature": 2.0, "allowed_token_ids": [768, 4197]}, max_tokens=3)
    one = params({"temperature": 2.0, "allowed_token_ids": [768, 4197]}, max_tokens=1)
    request = bench.request("There was a king", either)
    longer = bench.request([*request.prompt_token_ids, *begun], one)
    shares = [
        [result.tokens for result in results].count([768]) / number
        for results in (
            bench.run_all(request, [begun] * number),
            bench.run_all(longer, [()] * number),
        )
    ]
    assert 0.05 < shares[0] < 0.95, shares
    assert abs(shares[0] - shares[1]) < 4 * (2 * 0.25 / number) ** 0.5
