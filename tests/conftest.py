"""What all tests share: the small real model, and where it is found."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Nothing is fetched, and nothing is sent anywhere, while tests run.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# How long an example takes says how busy the machine is.
settings.register_profile("llumnix", deadline=None)
settings.load_profile("llumnix")

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def model() -> str:
    """The folder of the small real model: LLUMNIX_TEST_MODEL, or what `make model` made."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    default = Path(cache) / "llumnix" / "models" / MODEL
    folder = Path(os.environ.get("LLUMNIX_TEST_MODEL") or default)
    if not (folder / "config.json").is_file():
        pytest.fail(f"there is no model in {folder}; `make model` fetches it", pytrace=False)
    return str(folder)
