"""What all tests share: one etcd, a cluster's name for each test, and the small real model."""

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from llumnix.control.keys import Keys

if TYPE_CHECKING:
    from tests.kit.etcd import EtcdCluster

# Nothing is fetched, and nothing is sent anywhere, while tests run.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# How long an example takes says how busy the machine is.
settings.register_profile("llumnix", deadline=None)
settings.load_profile("llumnix")

MODEL = "SmolLM2-135M-Instruct"

_numbers = itertools.count()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs a real engine is slow by nature."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.slow)


_ROOT_LEVEL = logging.root.level


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A node's command line gives the log a place of its own, where no later test would look.

    And vLLM's application changes the root's level, in fixtures that come before this one.
    """
    logging.root.setLevel(_ROOT_LEVEL)
    log = logging.getLogger("llumnix")
    handlers, level, propagates = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagates
    log.setLevel(level)


@pytest.fixture(scope="session")
def model() -> str:
    """The folder of the small real model: LLUMNIX_TEST_MODEL, or what `make model` made."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    default = Path(cache) / "llumnix" / "models" / MODEL
    folder = Path(os.environ.get("LLUMNIX_TEST_MODEL") or default)
    if not (folder / "config.json").is_file():
        pytest.fail(f"there is no model in {folder}; `make model` fetches it", pytrace=False)
    return str(folder)


@pytest.fixture(scope="session")
def etcd_member() -> Iterator["EtcdCluster"]:
    """An etcd of one member that all tests share: it is never broken, and each has its own keys."""
    from tests.kit.etcd import EtcdCluster  # which takes a second that pure tests need not wait

    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture
def cluster_name() -> str:
    """A cluster of its own for each test, as they share one etcd."""
    return f"test{next(_numbers)}"


@pytest.fixture
def keys(cluster_name: str) -> Keys:
    """The keys of the test's own cluster."""
    return Keys(cluster_name)
