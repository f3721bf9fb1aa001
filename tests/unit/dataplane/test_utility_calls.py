"""All nodes know a LoRA adapter by one number, however each frontend has counted its own."""

from vllm.lora.request import LoRARequest

from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.utility_calls import LARGEST, Adapters
from tests.kit.loop import on_loop
from tests.kit.mesh import mesh
from tests.kit.requests import core_request

FRENCH, LATIN = ("french", "/adapters/french"), ("latin", "/adapters/latin")


def adapter(own: int, name: str, path: str) -> LoRARequest:
    return LoRARequest(name, own, path)


def test_the_same_one_has_the_same_number_on_each_node() -> None:
    one, other = Adapters(), Adapters()
    french, latin = one.shared(adapter(1, *FRENCH)), one.shared(adapter(2, *LATIN))
    assert french.lora_int_id != latin.lora_int_id
    assert min(french.lora_int_id, latin.lora_int_id) >= 1
    assert max(french.lora_int_id, latin.lora_int_id) <= LARGEST
    assert other.shared(adapter(1, *LATIN)).lora_int_id == latin.lora_int_id
    assert other.shared(adapter(2, *FRENCH)).lora_int_id == french.lora_int_id
    assert (french.lora_name, french.lora_path) == FRENCH


def test_one_of_the_same_name_with_other_weights_is_another() -> None:
    adapters = Adapters()
    old = adapters.shared(adapter(1, "french", "/adapters/french/1"))
    new = adapters.shared(adapter(1, "french", "/adapters/french/2"))
    assert old.lora_int_id != new.lora_int_id
    assert adapters.number(1) == new.lora_int_id and adapters.number(7) == 7


@on_loop
async def test_requests_and_calls_carry_that_number() -> None:
    async with mesh("a") as (a,):
        instance = await a.host()
        told: list[object] = []

        async def note(method: str, *args: object) -> bool:
            told.extend(args)
            return True

        a.engine(instance).call = note  # type: ignore[method-assign]
        number = Adapters().shared(adapter(1, *FRENCH)).lora_int_id
        client: ClusterClient = a.client
        assert await client.add_lora_async(adapter(1, *FRENCH)) is True
        assert await client.pin_lora_async(1) and await client.remove_lora_async(1)
        assert [getattr(one, "lora_int_id", one) for one in told] == [number] * 3
        request = core_request("r1", [1, 2])
        request.lora_request = adapter(1, *FRENCH)
        await client.add_request_async(request)
        assert request.lora_request.lora_int_id == number
        await client.abort_requests_async(["r1"])
