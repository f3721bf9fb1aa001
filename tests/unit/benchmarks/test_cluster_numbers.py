"""The numbers of the cluster benchmark: percentiles, the knee, scraped metrics, merged results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster import knee, results, scrape, table
from benchmarks.cluster.client import Stream, body
from benchmarks.cluster.cost import ratios
from benchmarks.cluster.figures import figures, percentile, samples
from benchmarks.cluster.load import Row
from benchmarks.cluster.watch import Look, look, summary
from benchmarks.cluster.workload import Planned, Shape


def test_a_percentile_is_the_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0], 50) == 1.0


def at_most(limit: float) -> Any:
    return lambda rate: knee.Probe(rate, rate <= limit, 0.0)


@pytest.mark.parametrize("limit", [1.3, 15.9, 16.0, 22.0, 300.0])
def test_the_knee_is_found_from_below_and_from_above(limit: float) -> None:
    found = knee.search(at_most(limit), 16.0, most=12)
    assert found.beyond is not None
    assert found.rate <= limit < found.beyond <= 1.16 * found.rate


def test_a_search_ends_with_its_probes() -> None:
    found = knee.search(at_most(float("inf")), 2.0, most=3)
    assert (found.rate, found.beyond, len(found.probes)) == (8.0, None, 3)
    found = knee.search(at_most(0.0), 2.0, most=3)
    assert (found.rate, found.beyond) == (0.25, 0.5)


def test_a_system_follows_while_first_tokens_come_in_time() -> None:
    assert knee.held([0.1] * 99 + [9.0], 0, 1.0)
    assert not knee.held([0.1] * 98 + [9.0] * 2, 0, 1.0)
    assert not knee.held([0.1], 1, 1.0)
    assert knee.around(21.37, [0.5, 1.0]) == [10.7, 21.4]


REQUESTS = [Planned(0.0, 10, 11), Planned(1.0, 10, 1), Planned(2.0, 10, 5), Planned(4.0, 10, 5)]
ROWS = [
    Row(0, 0.0, 0.5, 1.5, 0.3, 11, ""),
    Row(1, 0.0, 0.2, 0.2, 0.0, 1, ""),
    Row(2, 0.0, 0.0, 0.0, 0.0, 0, "unfinished"),
    Row(3, 0.0, 0.0, 0.0, 0.0, 0, "500 no"),
]


def test_a_request_that_never_began_has_waited_until_the_end() -> None:
    found = figures(ROWS, REQUESTS, 10.0)
    assert (found["requests"], found["failed"], found["unfinished"]) == (4, 1, 1)
    assert found["errors"] == {"500 no": 1}
    assert found["ttft"]["p99"] == found["ttft"]["max"] == 8.0  # 10 - 2
    assert found["ttft"]["p50"] == 0.5
    assert found["tpot"]["mean"] == pytest.approx(0.1)  # only one of them has further tokens
    assert found["gap"]["mean"] == 0.3
    assert found["tokens_per_second"] == pytest.approx(12 / 1.5)
    assert samples(ROWS, REQUESTS)["ttft"] == [500.0, 200.0, None, None]


def test_a_stream_knows_first_last_and_longest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.cluster.client.time.monotonic", lambda: now[0])
    stream = Stream(3, 10.0, 3)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3}}\n\n'
    chunks = [b'data: {"x"}\n\n', b'data: {"x"}\n\ndata: {"x"}\n\n', usage, b"data: [DONE]\n\n"]
    for now[0], chunk in zip((10.5, 11.5, 12.5, 13.0), chunks, strict=True):
        stream.take(chunk)
    stream.ended(b"".join(chunks))
    assert stream.row() == [3, 0.0, 0.5, 1.5, 1.0, 3, ""]
    stream.ended(usage)
    assert stream.error.startswith("cut")
    short = Stream(3, 10.0, 4)
    short.ended(b"".join(chunks))
    assert short.error == "3 tokens and not 4"


def test_the_same_seed_makes_the_same_requests() -> None:
    for name in ("M-M", "S-L", "sharegpt", "fixed:30,20"):
        made = Shape(name).requests(5.0, 4.0, 200, 1, 1000)
        assert made == Shape(name).requests(5.0, 4.0, 200, 1, 1000)
        assert name.startswith("fixed") or made != Shape(name).requests(5.0, 4.0, 200, 2, 1000)
        assert all(one.prompt + one.output <= 1000 for one in made)
    assert body("m", 1, 2, 30, 4) == body("m", 1, 2, 30, 4) != body("m", 2, 2, 30, 4)
    assert len(json.loads(body("m", 1, 2, 30, 4))["prompt"]) == 30


def test_a_file_gives_its_rows_as_pairs(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text("input_tokens,output_tokens\n10,1\n20,2\n5000,4\n")
    made = Shape(str(file)).requests(5.0, 1.0, 50, 1, 1000)
    assert {(one.prompt, one.output) for one in made} == {(10, 1), (20, 2)}
    assert Shape(str(file)).label == "some"


@pytest.mark.parametrize("name", ["M", "X-M", "fixed:3", "fixed:0,4", ""])
def test_an_unknown_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Shape(name)


METRICS = """
# HELP vllm:num_preemptions_total Cumulative number
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
llumnix_migrations_total{outcome="moved",reason="balance",stages="1"} 5.0
llumnix_migrations_total{outcome="moved",reason="balance",stages="2"} 2.0
llumnix_migrations_total{outcome="a \\"b\\", c",reason="balance",stages="1"} 1.0
llumnix_migration_seconds_bucket{le="0.1"} 6.0
llumnix_migration_seconds_bucket{le="0.5"} 8.0
llumnix_migration_seconds_bucket{le="+Inf"} 8.0
llumnix_migration_seconds_count 8.0
llumnix_migration_seconds_sum 1.2
"""


def test_a_run_is_told_what_it_added() -> None:
    after = scrape.parse(METRICS)
    before = scrape.parse(METRICS.replace(" 5.0", " 1.0").replace(" 4.0", " 2.0"))
    found = scrape.changes(before, after)
    assert found["preemptions"] == 2
    assert found["moves"] == {"moved": 4}
    assert scrape.changes([], after)["moves"] == {"moved": 7, 'a \\"b\\", c': 1}
    spread = scrape.changes([], after)["move_seconds"]
    assert spread == {"count": 8, "mean": 0.15, "p50_at_most": 0.1, "p99_at_most": 0.5}
    assert found["move_seconds"] == {}


def run(system: str, seed: int, ttft: float, **more: Any) -> dict[str, Any]:
    spread = {"mean": ttft, "p50": ttft, "p99": 2 * ttft, "max": 3 * ttft}
    found: dict[str, Any] = {"failed": 0, "unfinished": 0, "tokens_per_second": 100.0 * seed}
    found |= dict.fromkeys(("ttft", "tpot", "gap", "e2e"), spread)
    server = {"preemptions": 1, "moves": {"moved": 2}, "move_seconds": {"count": 2, "mean": 0.1}}
    seen = {"stranded_share": 0.25, "stranded_longest": 1.5, "looks": []}
    return {
        "id": f"{system} {seed}",
        "system": system,
        "shape": "M-M",
        "cv": 1.0,
        "rate": 5.0,
        "seed": seed,
        "figures": found,
        "server": server,
        "server_cpu_seconds": 1.0,
        "took": 4.0,
        "watch": seen,
        "samples": {name: [ttft * 1e3] for name in ("ttft", "tpot", "gap", "e2e")},
    } | more


def test_requests_are_stranded_while_another_engine_could_take_them() -> None:
    text = """vllm:num_requests_waiting{{engine="0"}} {}
vllm:num_requests_waiting{{engine="1"}} {}
vllm:kv_cache_usage_perc{{engine="0"}} 0.99
vllm:kv_cache_usage_perc{{engine="1"}} {}
vllm:generation_tokens_total{{engine="0"}} 7.0
vllm:generation_tokens_total{{engine="1"}} 9.0
vllm:num_requests_waiting{{engine="2"}} 0.0
vllm:kv_cache_usage_perc{{engine="2"}} 0.0
vllm:generation_tokens_total{{engine="2"}} 0.0
"""
    one = look(1.0, [scrape.parse(text.format(3, 0, 0.2)), scrape.parse(text.format(0, 1, 1.0))])
    assert one == Look(1.0, [3, 0, 0, 1], [0.99, 0.2, 0.99, 1.0]) and one.stranded
    full = look(2.0, [scrape.parse(text.format(3, 0, 0.95))])
    idle = look(2.0, [scrape.parse(text.format(0, 0, 0.95))])
    assert not full.stranded and not idle.stranded
    looks = [(0, one), (1, one), (2, full), (3, one), (5, one), (6, one), (8, idle)]
    found = summary([state._replace(at=float(at)) for at, state in looks])
    assert (found["stranded_longest"], found["stranded_share"]) == (3.0, 0.5)


def call(*runs: dict[str, Any], cluster: str = "two") -> dict[str, Any]:
    return {"cluster": cluster, "runs": list(runs), "skipped": ["one thing"], "knees": []}


def test_calls_are_merged_by_cluster_and_no_run_counts_twice(tmp_path: Path) -> None:
    first = call(run("llumnix", 1, 0.1), run("llumnix-queue", 1, 0.3))
    second = call(run("llumnix", 2, 0.1), run("llumnix-queue", 2, 0.1))
    other = call(run("llumnix", 3, 0.1), cluster="eight")
    merged = results.merge([first, second, other, first])
    assert len(merged["runs"]) == 5 and merged["skipped"] == ["one thing"]
    groups = table.groups(merged["runs"])
    assert sorted(group.cluster for group in groups) == ["eight", "two"]
    text = table.report(merged, "llumnix-queue")
    assert "| 5 | llumnix | 2 | 100 | 100 | 200 |" in text
    assert "2.00 (1.00 to 3.00)" in text  # 0.3 + 0.1 over 0.1 + 0.1; 1 and 3 for each seed
    assert "4 moved | 100 | 25%, 1.5 s |" in text and "one thing" in text
    results.write(merged, tmp_path / "merged.json")
    assert table.report(results.read([tmp_path / "merged.json"]), "llumnix-queue") == text
    again = results.merge([results.read([tmp_path / "merged.json"]), second])
    assert len(again["runs"]) == 5 and len(again["calls"]) == 2


def test_the_cost_is_of_pairs_and_of_all_light_requests() -> None:
    runs = [run(name, seed, 0.1) for name in ("vllm", "llumnix") for seed in (1, 2)]
    runs += [{**run(name, 1, 0.1), "rate": None} for name in ("vllm", "llumnix")]
    runs[-1]["figures"]["tokens_per_second"] = 99.0
    found = ratios(runs)
    assert found["burst_throughput"]["median"] == pytest.approx(0.99)
    assert found["ttft"] == {"mean": 1.0, "p50": 1.0, "p99": 1.0}
    text = table.report(
        {**results.merge([call()]), "costs": [{"cluster": "c", "ratios": found}]}, ""
    )
    assert "| throughput, all at once: median of 1 rounds | 0.990 (0.990 to 0.990) |" in text
