"""Configuration files, and what is said of those that are wrong."""

from math import inf
from pathlib import Path

import pytest
import yaml

from llumnix.simulator.cluster import ClusterConfig, EngineConfig
from llumnix.simulator.config import SimConfig, read_config
from llumnix.simulator.distributions import ArrivalProcess, PowerLaw, Quantiles
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.workload import generate

DATA = Path(__file__).parent / "data"
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "sim.yaml"


CLUSTER = "cluster: {instances: 2, engine: {max_model_len: 9000}}"
WORKLOAD = """
workload:
  requests: 20
  arrivals: {process: gamma, rate: 2, cv: 4}
  prompt: {mean: 100, alpha: 1.5}
  output: {mean: 306, p50: 74, p80: 348, p95: 1484, p99: 3388}
  priorities: {-1: 0.1}
"""


def read(folder: Path, text: str) -> SimConfig:
    file = folder / "run.yaml"
    file.write_text(text)
    return read_config(file)


def test_a_whole_file(tmp_path: Path) -> None:
    config = read(tmp_path, "seeds: [3, 4]\ntokens: false\n" + CLUSTER + WORKLOAD)
    assert config.seeds == (3, 4) and config.tokens is False
    assert config.cluster == ClusterConfig(2, EngineConfig(max_model_len=9000))
    assert config.workload.arrivals == ArrivalProcess("gamma", 2.0, 4.0)
    assert config.workload.prompt == PowerLaw(100, 1.5)
    assert config.workload.output == Quantiles(306, 74, 348, 1484, 3388)
    assert config.workload.priorities == {-1: 0.1}
    assert config.given["cluster"]["instances"] == 2


@pytest.mark.parametrize("text, number", [("1e-3", 0.001), ("+1.e+3", 1000), (".inf", inf)])
def test_a_number_may_have_an_exponent(tmp_path: Path, text: str, number: float) -> None:
    assert read(tmp_path, f"cluster: {{longest: {text}}}" + WORKLOAD).cluster.longest == number


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text((DATA / "azure.csv").read_text())
    text = "cluster: {instances: 1}\nworkload: {trace: {file: trace.csv, format: azure}}"
    assert len(generate(read(tmp_path, text).workload, 0).jobs) == 11


def test_one_seed_or_none(tmp_path: Path) -> None:
    assert read(tmp_path, "cluster: {instances: 1}" + WORKLOAD).seeds == (0,)
    assert read(tmp_path, "seed: 7\ncluster: {instances: 1}" + WORKLOAD).seeds == (7,)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "the configuration is None, and must have the keys workload, cluster, seed"),
        ("a: 1", "the configuration has no key 'a'"),
        ("cluster: {instances: 1}", "workload is missing"),
        (WORKLOAD, "cluster is missing"),
        ("cluster: 3" + WORKLOAD, "cluster is 3, and must have the keys instances, engine"),
        ("cluster: {instances: x}" + WORKLOAD, "cluster.instances is 'x', and must be a valid int"),
        ("cluster: {engine: {profile: x}}" + WORKLOAD, "cluster: no profile 'x'"),
        ("cluster: {nodes: 1}" + WORKLOAD, "cluster has no key 'nodes'"),
        ("cluster: {instances: 1}\nworkload: {requests: 1}", "workload: arrivals is missing"),
        ("cluster: {instances: 1}\nworkload: {trace: {file: x}}", "workload.trace.format is miss"),
        ("seed: 1\nseeds: [1]\ncluster: {}" + WORKLOAD, "seed and seeds exclude each other"),
        ("seeds: [1, 1]\ncluster: {}" + WORKLOAD, r"seeds are \[1, 1\]"),
        ("seed: -1\ncluster: {}" + WORKLOAD, r"seeds are \[-1\]"),
        ("a: [", "run.yaml is no YAML: while parsing"),
        ("seed: 2024-13-45\ncluster: {}" + WORKLOAD, "seed is '2024-13-45', and must be a valid"),
        ("cluster: {}\nworkload: &a {prompt: *a}", "run.yaml has a value that contains itself"),
        (
            "cluster: {longest: !!float .nan}" + WORKLOAD,
            "longest is '.nan', and must be a valid num",
        ),
        ("cluster: {longest: '1e-3'}" + WORKLOAD, "longest is '1e-3', and must be a valid number"),
        (
            "cluster: !!set {a}" + WORKLOAD,
            "run.yaml cannot be recorded as JSON: Object of type set",
        ),
        ("cluster: {instances: 0x1" + 4999 * "0" + "}" + WORKLOAD, "recorded as JSON: Exceeds the"),
        ("cluster: " + 250 * "[" + 250 * "]" + WORKLOAD, "cannot be recorded as JSON: recursion"),
        ('cluster: {migration: "\\ud800"}' + WORKLOAD, "cannot be recorded as JSON: .* hex escape"),
        (
            "cluster: {scaling: {patience: 100000000000000000000}}" + WORKLOAD,
            "run.yaml cannot be recorded as JSON: Integer exceeds 64-bit range",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SimConfigError, match=told) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part, told",
    [
        ("prompt: 0", "workload: tokens must be at least 1"),
        ("output: -3", "workload: tokens must be at least 1"),
        ("arrivals: {rate: .nan}", "workload.arrivals.rate is '.nan', and must be a valid num"),
        ("arrivals: {rate: .inf}", "workload.arrivals: rate must be greater than 0, and finite"),
        ("arrivals: {rate: 1" + 400 * "0" + "}", "rate must be greater than 0, and finite"),
        ("arrivals: {process: gamma, rate: 1, cv: 1.0e-200}", "cv must be between 0.001 and 1000"),
        ("prompt: {mean: 5, alpha: .nan}", "workload.prompt.alpha is '.nan'"),
        ("prompt: {mean: 5, alpha: .inf}", "workload.prompt: alpha must be greater than 0, and"),
        ("output: {mean: .inf, p50: 1, p80: 2, p95: 3, p99: 4}", "mean must be at least 1, and at"),
        ("priorities: {-1: .nan}", "priorities.-1 is '.nan', and must be a valid number"),
        ("priorities: {1180591620717411303424: 0.5}", "priorities must be whole numbers of 64 bit"),
        ("seed: 18446744073709551616", r"must differ, and be from 0 to 2\^63 - 1"),
        (
            "cluster: {engine: {profile: {decode_request: -0.02}}}",
            "decode_request must be 0 sec",
        ),
        ("cluster: {engine: {profile: {decode_request: .inf}}}", "decode_request must be 0 sec"),
        ("cluster: {instances: 8, scaling: {maximum: 4}}", "scales up to 4 at most"),
    ],
)
def test_a_number_that_cannot_be_is_one_sentence(tmp_path: Path, part: str, told: str) -> None:
    given = {"requests": 10, "arrivals": {"rate": 1}, "prompt": 5, "output": 5}
    key, value = next(iter(yaml.safe_load(part).items()))
    whole = {"workload": given, "cluster": {}}
    whole |= {key: value} if key in ("seed", "cluster") else {"workload": given | {key: value}}
    with pytest.raises(SimConfigError, match=told) as caught:
        read(tmp_path, yaml.safe_dump(whole))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SimConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")


def test_a_request_that_no_instance_could_take(tmp_path: Path) -> None:
    config = read(tmp_path, "cluster: {engine: {max_model_len: 100}}" + WORKLOAD)
    with pytest.raises(
        SimConfigError, match=r"tokens, more than cluster.engine.max_model_len, 100"
    ):
        config.requests(0)
    config = read(
        tmp_path, "cluster: {engine: {max_model_len: 100}}" + WORKLOAD + "  max_tokens: 100"
    )
    assert config.requests(0).too_long > 0


def test_the_example() -> None:
    config = read_config(EXAMPLE)
    jobs, too_long = config.requests(config.seeds[0])
    assert len(jobs) == 1000 and too_long == 0
