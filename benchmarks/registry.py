"""The benchmarks that there are: modules of this package with a `BENCHMARK`, which lists its cases."""

import importlib

from benchmarks.case import Benchmark

NAMES = (
    "attention",
    "translation",
    "wmt14_data",
    "detection",
    "segmentation",
    "segmentation_loading",
    "memory_growth",
    "device_check",
)


def load(name: str) -> Benchmark:
    """A benchmark by its name, with a case's name behind a dot or without.

    Raises:
        ValueError: If there is none.
    """
    module = name.partition(".")[0]
    if module not in NAMES:
        raise ValueError(f"There is no benchmark {module}: there are {', '.join(NAMES)}.")
    benchmark: Benchmark = importlib.import_module(f"benchmarks.{module}").BENCHMARK
    return benchmark
