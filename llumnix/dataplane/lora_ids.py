"""One number for a LoRA adapter on all nodes: vLLM's frontend counts its own adapters from 1."""

import hashlib

import msgspec
from vllm.lora.request import LoRARequest

LARGEST = 2**31 - 1  # that vLLM's model runners keep


class Adapters:
    """The adapters of one frontend, under the numbers that all engines know them by.

    An engine that has an adapter of a number does not look at its name: with numbers that each
    frontend counts for itself, one node's requests would run with another node's adapter.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # the frontend's → the cluster's

    def shared(self, adapter: LoRARequest) -> LoRARequest:
        """The adapter under its number in the cluster, which its name and its path make up."""
        told = f"{adapter.lora_name}\0{adapter.lora_path}".encode()
        number = int.from_bytes(hashlib.sha256(told).digest()[:8], "big") % LARGEST + 1
        self._numbers[adapter.lora_int_id] = number
        return msgspec.structs.replace(adapter, lora_int_id=number)

    def number(self, own: int) -> int:
        """The number in the cluster of one that the frontend has loaded; else the same."""
        return self._numbers.get(own, own)
