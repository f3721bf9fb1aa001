"""What a node was started with: llumnix's options, vLLM's, and what vLLM made of these."""

import argparse
from dataclasses import dataclass

from vllm.config import VllmConfig

from llumnix.config import Config


@dataclass(frozen=True)
class NodeOptions:
    """The configuration of one node, which never changes."""

    config: Config
    arguments: argparse.Namespace
    vllm: VllmConfig

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        names = self.arguments.served_model_name
        return str(names[0] if names else self.arguments.model)

    @property
    def root_path(self) -> str:
        """What vLLM's application takes off the beginning of a path."""
        return self.arguments.root_path or ""

    @property
    def by_priority(self) -> bool:
        """Whether the engines' queues go by priority."""
        return bool(self.vllm.scheduler_config.policy == "priority")
