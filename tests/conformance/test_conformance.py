"""Every exported callback through the one suite."""

from __future__ import annotations

import functools

import pytest
from conformance.cases import CASES

from lightning_methods import callbacks
from lightning_methods.registry import METHODS
from lightning_methods.testing import CHECKS, Case, NotApplicable


@functools.cache
def case(name: str) -> Case:
    return CASES[name]()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_check(name: str, check: str, record_property) -> None:
    try:
        CHECKS[check](case(name))
    except NotApplicable as reason:
        record_property("not_run", str(reason))
        pytest.skip(str(reason))


def test_every_exported_callback_has_a_case() -> None:
    exported = set(callbacks.__all__)
    assert exported == {name.split("-")[0] for name in CASES}
    assert exported == {name for info in METHODS for name in info.callbacks}
