"""Systems of engines under the same open-loop load: `python -m benchmarks.cluster`."""
