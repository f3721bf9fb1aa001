"""A request whose blocks were lent is not hashed anew, and has the hashes that it would have."""

from types import SimpleNamespace

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from llumnix.engine.vllm.kv.migration_utility import PROVED, KnownHashes, install_known_hashes

SIZE = 4
TOKENS = list(range(100, 123))  # five blocks, and three tokens


class Counting:
    """vLLM's hasher, which counts the blocks that it hashes."""

    def __init__(self) -> None:
        init_none_hash(sha256)
        self.blocks = 0
        self._hasher = get_request_block_hasher(SIZE, sha256)

    def __call__(self, request: Request) -> list[bytes]:
        found = self._hasher(request)
        self.blocks += len(found)
        return found


def _request(hasher: object, prompt: int = 14) -> Request:
    """One that comes with a prompt, and gets its outputs then, as a resumed one does."""
    params = SamplingParams(max_tokens=64)
    request = Request("r~2", TOKENS[:prompt], params, None, block_hasher=hasher)
    request.append_output_token_ids(TOKENS[prompt:])
    return request


def test_what_is_known_is_not_hashed() -> None:
    whole = _request(Counting()).block_hashes
    for known in range(6):
        counting = Counting()
        asked = KnownHashes(counting, SIZE, lambda request_id, n=known: whole[:n])
        assert _request(asked).block_hashes == whole
        assert counting.blocks == 5 - max(known - PROVED, 0)


def test_a_request_of_other_tokens_shows_itself() -> None:
    whole = _request(Counting()).block_hashes
    asked = KnownHashes(Counting(), SIZE, lambda request_id: whole)
    params = SamplingParams(max_tokens=64)
    other = Request("r~2", [*TOKENS[:16], *range(7)], params, None, block_hasher=asked)
    assert other.block_hashes[:4] == whole[:4] and other.block_hashes[4] != whole[4]


def test_what_does_not_fit_is_left_alone() -> None:
    whole = _request(Counting()).block_hashes
    counting = Counting()
    request = _request(counting, prompt=9)
    others = KnownHashes(counting, SIZE, lambda request_id: [b"x"] * 9)
    request.append_output_token_ids([1, 2])
    request._block_hasher = others
    request.update_block_hashes()
    assert request.block_hashes[:5] == whole


def test_an_engine_core_is_told_once() -> None:
    core = SimpleNamespace(request_block_hasher=Counting())
    install_known_hashes(core, SIZE, lambda request_id: [])
    first = core.request_block_hasher
    install_known_hashes(core, SIZE, lambda request_id: [])
    assert isinstance(first, KnownHashes) and core.request_block_hasher is first
    install_known_hashes(
        none := SimpleNamespace(request_block_hasher=None), SIZE, lambda request_id: []
    )
    assert none.request_block_hasher is None, "without a prefix cache nothing is hashed"
