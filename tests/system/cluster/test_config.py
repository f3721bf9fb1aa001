"""The configuration: where values come from, and what is said when they cannot work.

These run the command in this process, up to where it would start a node.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llumnix.config import from_arguments
from llumnix.engine.vllm import compat
from llumnix.engine.vllm.arguments import make_parser
from llumnix.entrypoints.vllm.api_server import main


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The command changes how this process logs and switches threads."""
    interval, own = sys.getswitchinterval(), logging.getLogger("llumnix")
    before = (list(own.handlers), own.level, own.propagate)
    yield
    sys.setswitchinterval(interval)
    own.handlers[:], own.propagate = before[0], before[2]
    own.setLevel(before[1])


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("LLUMNIX_"):
            monkeypatch.delenv(name)


Show = Callable[..., dict[str, Any]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """The configuration that --print-config shows."""

    def call(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*options, "--print-config"]) == 0
        shown: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return shown

    return call


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence with which options are refused."""

    def call(*options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*options, "--validate-config"])
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        said = [line for line in lines if "api_server: " in line]
        assert len(said) == 1 and lines[-1] == said[0], lines
        return said[0]

    return call


def test_defaults(show: Show) -> None:
    shown = show()
    assert shown["initial-instances"] == 1 and shown["dispatch-policy"] == "load"
    assert shown["engine"] == "vllm" and shown["etcd-endpoints"] is None
    assert "max-model-len" not in shown, "what vLLM has by default is left out"


def test_the_order_of_precedence(
    show: Show, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(
        "initial-instances: 2\nmax-instances: 5\ndispatch-policy: rr\nmax-model-len: 512\n"
    )
    from_file = show("--config", str(file))
    assert from_file["initial-instances"] == 2 and from_file["dispatch-policy"] == "rr"
    assert from_file["max-model-len"] == 512
    monkeypatch.setenv("LLUMNIX_INITIAL_INSTANCES", "3")
    monkeypatch.setenv("LLUMNIX_DISPATCH_POLICY", "queue")
    from_environment = show("--config", str(file))
    assert from_environment["initial-instances"] == 3
    assert from_environment["dispatch-policy"] == "queue"
    assert from_environment["max-instances"] == 5
    from_line = show("--config", str(file), "--initial-instances", "4")
    assert from_line["initial-instances"] == 4 and from_line["dispatch-policy"] == "queue"


def test_what_is_printed_can_be_read_again(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    options = ["--initial-instances", "3", "--max-model-len", "512", "--lease-ttl", "9.5"]
    options += ["--etcd-endpoints", "a:1", "b:2", "--enforce-eager"]
    first = show(*options)
    file.write_text(yaml.safe_dump({k: v for k, v in first.items() if v not in (None, "")}))
    assert show("--config", str(file)) == first


def test_secrets_are_not_printed(show: Show) -> None:
    shown = show("--cluster-token", "hush", "--api-key", "hush", "--etcd-endpoints", "a:1")
    assert shown["cluster-token"] == shown["api-key"] == "***"
    assert "hush" not in str(shown)


def test_secrets_of_vllm_are_not_printed(show: Show) -> None:
    shown = show("--hf-token", "hush", "--max-num-batched-tokens", "512")
    assert shown["hf-token"] == "***" and shown["max-num-batched-tokens"] == 512


def test_what_vllm_makes_of_json_is_printed(show: Show) -> None:
    transfer = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both", '
    transfer += '"kv_connector_extra_config": {"password": "hush", "size": 3}}'
    shown = show("--kv-transfer-config", transfer)["kv-transfer-config"]
    assert shown["kv_connector"] == "ExampleConnector"
    assert shown["kv_connector_extra_config"] == {"password": "***", "size": 3}


def test_a_mapping_in_the_file(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("hf-overrides: {a: 1, b: {c: [true, null]}}\n")
    first = show("--config", str(file))
    assert first["hf-overrides"] == {"a": 1, "b": {"c": [True, None]}}
    file.write_text(yaml.safe_dump({"hf-overrides": first["hf-overrides"]}))
    assert show("--config", str(file)) == first


@pytest.mark.parametrize(
    "options, address",
    [
        (["--host", "::1"], "[::1]:8000"),
        (["--host", "10.0.0.1", "--port", "81"], "10.0.0.1:81"),
        (["--uds", "/tmp/x", "--advertise-address", "[fd00::1]:80"], "[fd00::1]:80"),
    ],
)
def test_the_advertised_address(options: list[str], address: str) -> None:
    parser = make_parser("node")
    arguments = parser.parse_args([*options, "--etcd-endpoints", "a:1", "https://[::1]:2/"])
    assert from_arguments(arguments).advertise_address == address


def test_several_endpoints(show: Show) -> None:
    assert show("--etcd-endpoints", "a:1", "b:2")["etcd-endpoints"] == ["a:1", "b:2"]


def test_a_good_configuration(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model, "--engine", "sim", "--validate-config"]) == 0
    assert capsys.readouterr().out.endswith("the configuration is valid\n")


@pytest.mark.parametrize(
    "options, part",
    [
        (["--no-such-option"], "--no-such-option"),
        (["--initial-instances", "many"], "initial-instances"),
        (["--initial-instances", "9"], "--max-instances, which is 8"),
        (["--initial-instances", "-1"], "--initial-instances"),
        (["--dispatch-top-k", "0"], "--dispatch-top-k"),
        (["--engine", "magic"], "magic"),
        (["--cluster", "a/b"], "--cluster"),
        (["--node", "a b"], "--node"),
        (["--lease-ttl", "1"], "--lease-ttl"),
        (["--lease-ttl", "nan"], "--lease-ttl"),
        (["--drain-timeout", "inf"], "--drain-timeout"),
        (["--etcd-endpoints", "ftp://a:1"], "--etcd-endpoints"),
        (["--etcd-endpoints", "a"], "--etcd-endpoints"),
        (["--etcd-endpoints", "a:70000"], "--etcd-endpoints"),
        (["--etcd-endpoints", "::1:2379"], "--etcd-endpoints"),
        (["--advertise-address", "::1:8000"], "--advertise-address"),
        (["--uds", "/tmp/x", "--etcd-endpoints", "a:1"], "--advertise-address"),
        (["--chat-template", "no template"], "no template"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--autoscale-low", "70"], "--autoscale-high, which is 60.0"),
        (["--autoscale-low", "0"], "--autoscale-low must be more than 0"),
        (["--autoscale-min", "0"], "--autoscale-min must be 1 or more"),
        (["--autoscale-max", "2", "--autoscale-min", "3"], "--autoscale-max, which is 2"),
        (["--autoscale-period", "-1"], "--autoscale-period must be a number of seconds"),
        (["--autoscale-cooldown", "nan"], "--autoscale-cooldown"),
        (["--etcd-cert", "x", "--etcd-endpoints", "a:1"], "--etcd-key"),
        (["--etcd-user", "x", "--etcd-endpoints", "a:1"], "--etcd-password"),
        (["--etcd-ca", "x"], "--etcd-endpoints"),
        (["--data-parallel-size", "2"], "--initial-instances"),
        (["--dtype", "float17"], "float17"),
        (["--max-model-len", "-5"], "--max-model-len: "),
        (["--port", "http"], "--port"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work(
    refusal: Callable[..., str], model: str, options: list[str], part: str
) -> None:
    assert part in refusal("--model", model, *options)


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ([], None),  # vLLM's default
        (["--priority-classes", "classes.yaml"], "priority"),
        (["--priority-classes", "classes.yaml", "--scheduling-policy", "fcfs"], None),
        (["--scheduling_policy=priority"], "priority"),
    ],
)
def test_priority_classes_have_engines_schedule_by_priority(
    show: Show, options: list[str], policy: str | None
) -> None:
    assert show(*options).get("scheduling-policy") == policy


def test_a_policy_that_the_environment_has_chosen(
    show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_PRIORITY_CLASSES", "classes.yaml")
    assert show()["scheduling-policy"] == "priority"
    monkeypatch.setenv("LLUMNIX_SCHEDULING_POLICY", "fcfs")
    assert "scheduling-policy" not in show()


@pytest.mark.parametrize(
    "option, value, sentence",
    [
        (
            "--dispatch-policy",
            "best",
            "no policy 'best' for dispatch; there are load, freeness, memory, ",
        ),
        ("--migration-policy", "best", "no policy 'best' for rescheduling; there are none, llum"),
        ("--latency-profile", "warp", "warp is no file, and not one of instant, "),
        ("--priority-classes", "/no/such/file", "/no/such/file can't be read: "),
    ],
)
def test_policies_that_cannot_work(
    refusal: Callable[..., str], model: str, option: str, value: str, sentence: str
) -> None:
    assert f"{option}: {sentence}" in refusal("--model", model, option, value)


def test_a_profile_that_is_none(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", model, "--engine", "sim", "--sim-profile", "warp"]
    assert main([*options, "--validate-config"]) == 2
    assert "--sim-profile warp is not one of " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, part",
    [
        ("colour: green\n", "colour"),
        ("initial-instances: [1, 2\n", "node.yaml"),
        ("initial-instances: many\n", "initial-instances"),
        ("- initial-instances\n", "node.yaml"),
    ],
    ids=["unknown key", "no YAML", "bad value", "a list"],
)
def test_a_file_that_cannot_work(
    refusal: Callable[..., str], tmp_path: Path, text: str, part: str
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    assert part in refusal("--config", str(file))


def test_a_value_in_the_environment_that_cannot_work(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_DISPATCH_POLICY", "best")
    assert "best" in refusal()


def test_a_name_in_the_environment_that_belongs_to_no_option(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_DISPATCH_POLICE", "rr")
    assert "LLUMNIX_DISPATCH_POLICE" in refusal()


def test_names_in_the_environment_that_are_tolerated(
    show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["TEST_MODEL", "BENCH_SECONDS", "INSTANCE", "SERVICE_HOST", "PORT_8000_TCP_ADDR"]
    for name in names:
        monkeypatch.setenv(f"LLUMNIX_{name}", "x")
    assert show()["dispatch-policy"] == "load"


def test_a_version_of_vllm_that_is_not_supported(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "supported", lambda: False)
    assert main(["--model", model, "--print-config"]) == 0
    assert capsys.readouterr().err.count("0.26 to 0.33") == 1
