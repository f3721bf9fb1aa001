"""The official openai client against real vLLM: what it asks for is what it gets."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.kit.node import Node
from tests.kit.wait import eventually

pytestmark = pytest.mark.vllm

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


def dispatches(node: Node) -> Counter[str]:
    """How many requests went to each instance."""
    found: Counter[str] = Counter()
    for name, value in node.metrics().items():
        if name.startswith("llumnix_dispatches_total"):
            found[name.split('"')[1]] = int(value)
    return found


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["small"]


def test_a_chat_whole_and_streamed(client: OpenAI) -> None:
    options: Any = {"model": "small", "messages": FRANCE, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert "Paris" in (whole.choices[0].message.content or "")
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_a_completion_whole_and_streamed(client: OpenAI) -> None:
    options: Any = {
        "model": "small",
        "prompt": "The capital of France is",
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = client.completions.create(**options)
    assert whole.choices[0].text.startswith(" Paris")
    assert whole.usage is not None and whole.usage.completion_tokens == 20
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text


def test_echo(client: OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt="One two three", max_tokens=3, temperature=0, echo=True
    )
    text = answer.choices[0].text
    assert text.startswith("One two three") and len(text) > len("One two three")


def test_several_choices(client: OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt="Once upon a time", max_tokens=12, n=3, temperature=1.0, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    texts = ["", "", ""]
    for chunk in client.completions.create(
        model="small",
        prompt="Once upon a time",
        max_tokens=12,
        n=3,
        temperature=1.0,
        seed=1,
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_several_prompts(client: OpenAI) -> None:
    prompts = ["One, two,", "The sky is", "Hello"]
    together = client.completions.create(model="small", prompt=prompts, max_tokens=8, temperature=0)
    alone = [
        client.completions.create(model="small", prompt=p, max_tokens=8, temperature=0)
        for p in prompts
    ]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]


def test_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs
    assert "".join(found.tokens or []) == answer.choices[0].text
    assert len(found.token_logprobs) == 4 and all(p <= 0 for p in found.token_logprobs if p)
    for token, best in zip(found.tokens or [], found.top_logprobs, strict=True):
        assert max(best, key=best.__getitem__) == token, "greedy"
    chat = client.chat.completions.create(
        model="small", messages=FRANCE, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None
    assert [len(token.top_logprobs) for token in content.content] == [2] * 4


def test_logprobs_of_the_prompt(client: OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt="One two three four", max_tokens=1, echo=True, logprobs=1
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    assert found.token_logprobs[0] is None and len(found.token_logprobs) >= 5
    assert all(p is not None and p <= 0 for p in found.token_logprobs[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: OpenAI, stream: bool) -> None:
    options: Any = {"model": "small", "prompt": "1, 2, 3, 4,", "max_tokens": 60, "temperature": 0}
    free = client.completions.create(**options).choices[0].text
    stop = free[10:14]
    expected = free[: free.index(stop)]
    if stream:
        chunks = list(client.completions.create(**options, stop=[stop], stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**options, stop=[stop]).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (expected, "stop")


def test_penalties_and_biases(client: OpenAI) -> None:
    options: Any = {"model": "small", "prompt": "la la la la la la la la", "max_tokens": 30}
    options |= {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    kinds = []
    for penalties in ({}, {"presence_penalty": 2, "frequency_penalty": 2}):
        choice: Any = client.completions.create(**options, **penalties).choices[0]
        assert len(choice.token_ids) == 30
        kinds.append(len(set(choice.token_ids)))
    assert kinds[0] < kinds[1], kinds
    biased = client.completions.create(
        model="small", prompt="Hello", max_tokens=3, temperature=0, logit_bias={"100": 100}
    )
    tokens = client.completions.create(
        model="small", prompt=[100, 100, 100], max_tokens=1, echo=True
    )
    assert tokens.choices[0].text.startswith(biased.choices[0].text)


def test_a_seed_gives_the_same_on_both_instances(node: Node, client: OpenAI) -> None:
    def ask(_: int) -> str:
        answer = client.completions.create(
            model="small", prompt="Once upon a time", max_tokens=12, temperature=1.0, seed=42
        )
        return answer.choices[0].text

    before = dispatches(node)
    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(ask, range(8)))
    assert len(texts) == 1
    spread = dispatches(node) - before
    assert spread["a-0"] >= 2 and spread["a-1"] >= 2


def test_the_same_prompts_in_a_batch_and_alone(node: Node, client: OpenAI) -> None:
    prompts = [f"{n} and {n + 1} make" for n in range(12)]

    def ask(prompt: str) -> str:
        answer = client.completions.create(
            model="small", prompt=prompt, max_tokens=10, temperature=0
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, prompts))
    assert together[:3] == [ask(prompt) for prompt in prompts[:3]]


def test_an_answer_that_follows_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "country": {"enum": ["France", "Spain"]},
        },
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="small",
        messages=FRANCE,
        max_tokens=80,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": schema, "strict": True},
        },
    )
    place = json.loads(answer.choices[0].message.content or "")
    assert place.keys() == {"city", "country"} and place["country"] in ("France", "Spain")


def test_errors_are_the_clients_own_types(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="large"):
        client.completions.create(model="large", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="small", prompt="x", max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="small", prompt=[1] * 3000, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="small", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}
        client.chat.completions.create(model="small", messages=FRANCE, response_format=broken)


def test_what_can_not_be_sent_to_an_engine_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="can't be sent"):
        client.completions.create(model="small", prompt="x", extra_body={"top_k": 10**30})
    for outputs in (1.5, "abc", [99_999_999]):
        extra = {"vllm_xargs": {"llumnix_generated": outputs}}
        with pytest.raises(openai.BadRequestError, match="llumnix_generated"):
            client.completions.create(model="small", prompt="x", extra_body=extra)
    assert client.completions.create(model="small", prompt="x", max_tokens=1).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(node: Node, stream: bool) -> None:
    body = {"model": "small", "prompt": "Count: 1, 2,", "max_tokens": 1900, "ignore_eos": True}
    if stream:
        with node.stream("/v1/completions", body) as events:
            next(iter(events))
            assert not node.idle()
    else:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", node.port)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        eventually(lambda: not node.idle())
        connection.close()
    eventually(node.idle, within=10)  # uncancelled it would run for a minute


def test_tokenize_and_the_demo_route(node: Node) -> None:
    tokens = node.post("/tokenize", {"model": "small", "prompt": "Hello, world"}).json["tokens"]
    back = node.post("/detokenize", {"model": "small", "tokens": tokens}).json["prompt"]
    assert back == "Hello, world"
    demo = node.post(
        "/generate", {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
    )
    assert demo.json["text"][0].startswith("The capital of France is Paris")


def test_metrics_of_both_instances(node: Node, client: OpenAI) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(
            pool.map(
                lambda n: client.completions.create(model="small", prompt=f"{n}", max_tokens=4),
                range(6),
            )
        )
    engines = {
        key.split('engine="')[1].split('"')[0]
        for key, value in node.metrics().items()
        if key.startswith("vllm:generation_tokens_total") and value
    }
    assert {"0", "1"} <= engines
