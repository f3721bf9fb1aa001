"""Starts a node for a first try, and says how to talk to it as soon as it answers; `make serve`.

The node takes this process's place, so that signals and the exit status are its own; a short-lived
process beside it watches it come up and prints the greeting.
"""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from typing import Any

HOST = "127.0.0.1"
SMALL_MODEL = "SmolLM2-135M-Instruct"
# float32 is several times faster than bf16 on a CPU without AVX-512; the rest saves start time.
SMALL_MODEL_OPTIONS = (
    *("--served-model-name", SMALL_MODEL),
    *("--dtype", "float32", "--max-model-len", "2048", "--block-size", "32", "--enforce-eager"),
)
# Defaults for the first try; what the caller's environment says counts.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for each instance; vLLM would take half the memory
    "VLLM_LOGGING_LEVEL": "ERROR",  # vLLM's own lines would bury the few that matter here
    "TORCH_LOGS": "-torch._library.triton",  # no word about the absence of what only GPUs need
    "VLLM_NO_USAGE_STATS": "1",  # nothing about this machine is sent anywhere
}
GREETING = """
    {model} answers at http://{host}:{port} after {seconds:.0f} s.

    curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
      "model": "{model}", "stream": true, "temperature": 0,
      "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

    from openai import OpenAI
    client = OpenAI(base_url="http://{host}:{port}/v1", api_key="none")
    for chunk in client.chat.completions.create(
            model="{model}", stream=True, temperature=0,
            messages=[{{"role": "user", "content": "What is the capital of France?"}}]):
        print(chunk.choices[0].delta.content or "", end="", flush=True)

    The cluster: http://{host}:{port}/status      Ctrl-C ends it.
"""


def main() -> int:
    """Replace this process by the node; returns only if that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--instances", type=int, required=True)
    parser.add_argument("--model", required=True)
    arguments, options = parser.parse_known_args()
    if _taken(arguments.port):
        say(f"port {arguments.port} of {HOST} is in use: choose another with PORT=")
        return 2
    command = [sys.executable, "-m", "llumnix.entrypoints.vllm.api_server"]
    command += ["--host", HOST, "--port", str(arguments.port), "--model", arguments.model]
    command += ["--initial-instances", str(arguments.instances)]
    if os.path.basename(arguments.model) == SMALL_MODEL:
        command += SMALL_MODEL_OPTIONS
    command += ["--disable-uvicorn-access-log", *options]
    say(f"starting a node with {arguments.instances} instances:\n    {shlex.join(command)}")
    _watch_beside(arguments.port)
    os.execve(sys.executable, command, ENVIRONMENT | dict(os.environ))


def say(text: str) -> None:
    """A progress line."""
    print(f"llumnix: {text}", flush=True)


def _taken(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server((HOST, port)):
        return False
    return True


def _watch_beside(port: int) -> None:
    """Watch this process from another one that is nobody's child: nobody has to wait for it."""
    node = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork() == 0:
        with contextlib.suppress(KeyboardInterrupt):
            Watcher(node, port).run()
    os._exit(0)


class Watcher:
    """Prints what a newcomer waits for: the first instance, then the others."""

    def __init__(self, node: int, port: int) -> None:
        self._node = node
        self._port = port
        self._began = time.monotonic()

    def run(self) -> None:
        """Watch until all instances are ready, or the node is gone."""
        if not self._until(lambda: self._get("/readyz") is not None):
            return
        model = json.loads(self._get("/v1/models") or "{}")["data"][0]["id"]
        seconds = time.monotonic() - self._began
        print(GREETING.format(host=HOST, port=self._port, model=model, seconds=seconds), flush=True)
        said = 0
        while self._alive():
            states = [i["state"] for i in self._status().get("instances", ())]
            ready = states.count("ready")
            if ready > said:
                said = ready
                say(f"{ready} of {len(states)} instances are ready")
            if states and ready == len(states):
                return
            time.sleep(1.0)

    def _until(self, true: Any) -> bool:
        while self._alive():
            if true():
                return True
            time.sleep(0.5)
        return False

    def _alive(self) -> bool:
        try:
            os.kill(self._node, 0)
        except ProcessLookupError:
            return False
        return True

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self._get("/status") or "{}")
        return status

    def _get(self, path: str) -> bytes | None:
        """The body of a good answer, else None."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}{path}", timeout=5) as answer:
                body: bytes = answer.read()
                return body
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            return None


if __name__ == "__main__":
    sys.exit(main())
