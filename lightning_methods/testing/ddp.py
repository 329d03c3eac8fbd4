"""Checks with two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lightning_methods.testing._case import Batches, Case, NotApplicable, Run, close


def _fit_on_two(case: Case, methods: list[Any]) -> Run:
    # With one thread the forked processes need nothing of the parent's thread pool, which fork does not copy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    module = case.module()
    for method in methods:
        if method.changes_inference:
            method.apply(module)  # else the parts would be in the forked processes' copies alone
    try:
        return case.fit(
            methods,
            module,
            strategy="ddp_fork",
            devices=2,
            loader=Batches(case.batches, share_out=True),
            use_distributed_sampler=False,
        )
    finally:
        torch.set_num_threads(threads)


def two_processes_equal_one(case: Case) -> None:
    """Two processes with half of each batch end with the weights of one with all of it, if `exact_over_ranks`."""
    if case.accelerator != "cpu":
        raise NotApplicable("runs on the CPU, with gloo")
    if not close(_fit_on_two(case, []).weights, case.plain.weights):
        raise NotApplicable("the module alone differs between one and two processes")
    equal = close(_fit_on_two(case, [case.method()]).weights, case.attached.weights)
    exact = case.method().exact_over_ranks
    assert equal == exact, f"exact_over_ranks is {exact}, but the weights {'agree' if equal else 'differ'}"


CHECKS: dict[str, Callable[[Case], None]] = {check.__name__: check for check in (two_processes_equal_one,)}
