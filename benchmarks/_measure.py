"""Measuring one formulation against another in the same run: times in turns, memory in fresh processes."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Turns:
    """Times of candidates that run one after the other in every round, each for `slice_s` seconds.

    On a machine with other work a candidate may find the core busy or idle; those that are compared find it
    much the same in one round. Hence `ratio` is the median over the rounds. Where candidates differ so much in length
    that one is interrupted and the other is not, `time.process_time` as the clock leaves other work out.
    """

    def __init__(
        self,
        candidates: Mapping[str, Callable[[], object]],
        rounds: int,
        slice_s: float = 0.005,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        # Until glibc has seen a large block freed, it hands memory back after each call and asks for it anew: 0.1 ms
        # of page faults a call, by chance. A process that trains has freed such blocks.
        torch.empty(4 << 20)
        self.samples: dict[str, list[float]] = {name: [] for name in candidates}
        repeats = {}
        for name, call in candidates.items():
            call()
            repeats[name] = max(1, round(slice_s / _seconds(call, 1, clock)))
        for _ in range(rounds):
            for name, call in candidates.items():
                self.samples[name].append(_seconds(call, repeats[name], clock))

    def seconds(self, name: str) -> float:
        """Of one call, the median."""
        return statistics.median(self.samples[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long as the other."""
        return statistics.median(a / b for a, b in zip(self.samples[name], self.samples[other], strict=True))


def _seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def extra_bytes(call: Callable[[], object], warm_up: Callable[[], object]) -> int:
    """Peak resident memory of a call above what was resident before; once per process, or it reads too low.

    `warm_up` is a smaller problem: it loads the code that `call` needs, which is not memory of the method.
    """
    warm_up()
    before = _peak(reset=True)
    call()
    return _peak() - before


def _peak(reset: bool = False) -> int:
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:  # not Linux, or not allowed: the peak since the start, in KiB, on macOS in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(script: str, *arguments: object) -> int:
    """The number that `script` prints when it is run with these arguments.

    Blocks from 64 KiB on are given back to the system when they are freed: otherwise glibc keeps some for later, and
    the resident size counts them.
    """
    command = [sys.executable, script, *map(str, arguments)]
    strict = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=strict)  # noqa: S603  # our own
    return int(done.stdout)


class Report:
    """Measured figures, the bounds that some of them must keep, and what follows."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.missed: list[str] = []

    def add(self, name: str, value: float, *, at_least: float = 0.0, at_most: float = float("inf")) -> None:
        """Print a figure and judge it."""
        self.figures[name] = value
        bounds = [f"at least {at_least:g}"] * (at_least > 0) + [f"at most {at_most:g}"] * (at_most < float("inf"))
        kept = at_least <= value <= at_most
        if not kept:
            self.missed.append(f"{name}: {value:.3g}, not {' and '.join(bounds)}")
        verdict = f"  {'kept' if kept else 'MISSED'}: {', '.join(bounds)}" if bounds else ""
        print(f"{name:<64}{value:>12.4g}{verdict}", flush=True)

    def finish(self, json_file: Path | None) -> int:
        """Write the JSON file; the exit status: 1 if a bound was missed."""
        if json_file is not None:
            content: dict[str, Any] = {
                "figures": self.figures,
                "missed": self.missed,
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            }
            json_file.write_text(json.dumps(content, indent=1) + "\n")
        for line in self.missed:
            print(f"missed: {line}", file=sys.stderr)
        return bool(self.missed)
