"""The options of the benchmark."""

import argparse
import os
import shlex
from pathlib import Path

from benchmarks.cluster import systems
from benchmarks.cluster.engines import Engines, visible
from benchmarks.cluster.workload import Shape

SYSTEMS = ("llumnix", "llumnix-queue", "llumnix-rr")


def parser() -> argparse.ArgumentParser:
    """All of them, with what they mean."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("build/cluster"), help="folder for all that it writes")
    add("--budget", type=float, help="seconds, after which no more runs begin")
    _of_engines(made.add_argument_group("engines"))
    _of_load(made.add_argument_group("load"))
    group = made.add_argument_group("systems")
    names = ", ".join(systems.KNOWN)
    group.add_argument("--systems", nargs="*", default=list(SYSTEMS), help=f"of {names}")
    group.add_argument(
        "--system", action="append", default=[], metavar="NAME=ARGS",
        help="one more: llumnix with these options; NAME@SYSTEM=ARGS adds them to another one",
    )  # fmt: skip
    group.add_argument("--base", default="llumnix-queue", help="whom the others are compared with")
    group.add_argument("--restart", action="store_true", help="start each anew for each seed")
    group.add_argument("--start-timeout", type=float, default=300.0, help="seconds to get ready")
    cost = made.add_argument_group("cost, instead of a comparison")
    cost.add_argument("--cost", action="store_true", help="one instance beside `vllm serve`")
    cost.add_argument("--cost-rounds", type=int, default=6)
    cost.add_argument("--burst", type=int, default=128, help="requests at once, for throughput")
    return made


def _of_engines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", required=True, help="its folder")
    add("--load-format", default="auto", help="dummy: random weights")
    add("--engine", choices=("vllm", "sim"), default="vllm", help="sim: modelled devices")
    add("--sim-profile", default="cpu-smoke", help="step times of modelled devices")
    add("--instances", type=int, default=2)
    add("--gpus", type=int, help="how many are used; default: all, 0 for none")
    add("--kv-blocks", type=int, default=0, help="of each instance; 0: what there is memory for")
    add("--block-size", type=int, default=16)
    add("--max-model-len", type=int, default=4096)
    add("--gpu-memory-utilization", type=float, help="of an instance; default: an equal share")
    add("--engine-args", default="", help="options of vLLM, as --engine-args='--dtype half'")


def _of_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "lengths: S, M or L for prompts and outputs, sharegpt, fixed:IN,OUT or a CSV file"
    add("--shapes", nargs="+", default=["M-M"], help=text)
    add("--cv", type=float, nargs="+", default=[1.0], help="of the gaps; 1: Poisson, else Gamma")
    add("--rates", type=float, nargs="+", help="requests a second; default: around the knee")
    add("--around", type=float, nargs="+", default=[0.85, 1.0, 1.15], help="shares of the knee")
    add("--knee-ttft", type=float, default=2.0, help="seconds of P99 TTFT that are beyond the knee")
    add("--probe-seconds", type=float, default=15.0)
    add("--probes", type=int, default=6, help="at most, for each knee")
    add("--reference", help="the system that is asked for the knee; default: --base, or the first")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--seconds", type=float, default=40.0, help="for which requests come in a run")
    add("--drain", type=float, default=120.0, help="seconds that the last ones get to end")
    add("--warmup", type=float, default=2.0, help="seconds of light load before each run")
    add("--watch", type=float, default=0.0, help="look at the engines every so many seconds")
    cores = len(os.sched_getaffinity(0))
    add("--clients", type=int, default=max(min(cores // 4, 8), 2), help="processes of the load")


def engines_of(args: argparse.Namespace) -> Engines:
    """The engines that the options ask for."""
    modelled = args.engine == "sim"
    here = 0 if modelled else len(visible())
    gpus = here if args.gpus is None else args.gpus
    if gpus > here:
        raise ValueError(f"--gpus is {gpus}, and there are {here} for these engines")
    return Engines(
        model=args.model,
        instances=args.instances,
        gpus=gpus,
        modelled=modelled,
        profile=args.sim_profile,
        load_format=args.load_format,
        max_model_len=args.max_model_len,
        kv_blocks=args.kv_blocks,
        block_size=args.block_size,
        memory=args.gpu_memory_utilization,
        extra=tuple(shlex.split(args.engine_args)),
    )


def systems_of(args: argparse.Namespace) -> list[systems.System]:
    """The systems that the options name, the one that is asked for the knee first.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in args.systems if name not in systems.KNOWN]
    if unknown:
        raise ValueError(f"--systems knows {', '.join(systems.KNOWN)}, and not {unknown[0]}")
    found = [systems.KNOWN[name] for name in args.systems]
    found += [systems.parse(text) for text in args.system]
    if not found:
        raise ValueError("there is no system: name some with --systems or --system")
    names = [system.name for system in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two systems have the same name: {', '.join(names)}")
    if args.reference and args.reference not in names:
        raise ValueError(f"--reference is {args.reference}, and no system has that name")
    first = args.reference or (args.base if args.base in names else names[0])
    return sorted(found, key=lambda system: system.name != first)


def workloads_of(args: argparse.Namespace) -> list[tuple[Shape, float]]:
    """Lengths and the CV of arrivals, each with each."""
    return [(Shape(name), cv) for name in args.shapes for cv in args.cv]
