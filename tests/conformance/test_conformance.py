"""Every exported callback through the one suite."""

from __future__ import annotations

import functools

import pytest
import torch
from conformance.cases import CASES, YAML, Penalty, classification

from lightning_methods import callbacks
from lightning_methods.testing import CHECKS, Case, NotApplicable, check_method


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    one = case(name)
    check_method(one.method(), one.module(), one.batch, accelerator="cuda")


def test_the_suite_reports_what_fails_and_what_was_not_run() -> None:
    class Rude(Penalty):
        """Waits for the device, and leaves an attribute behind."""

        def losses(self, step):
            step.module.left_behind = step.batch[0].sum().item()
            return super().losses(step)

    module, batch = classification()
    with pytest.raises(AssertionError) as failure:
        check_method(Rude(), module, batch)
    text = str(failure.value)
    for name in ("leaves_no_trace", "never_waits_for_the_device"):
        assert f"FAILED {name}" in text
    assert "not run trains_in_fp16" in text


@pytest.mark.parametrize("name", callbacks.__all__)
def test_yaml_round_trip(name: str) -> None:
    from jsonargparse import ArgumentParser

    from lightning_methods.attach._lightning import CallbackType

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=CallbackType)
    given = {"class_path": f"lightning_methods.callbacks.{name}", "init_args": YAML[name]}
    first = parser.parse_object({"callback": given})
    second = parser.parse_string(parser.dump(first, skip_none=False))  # as LightningCLI saves its configuration
    assert first.callback.as_dict() == second.callback.as_dict()
    built, again = (parser.instantiate_classes(config).callback for config in (first, second))
    assert repr(built) == repr(again)
    for argument, value in YAML[name].items():
        if not isinstance(value, dict):
            assert f"{argument}={value!r}" in repr(built)


def test_every_exported_callback_has_a_case() -> None:
    assert set(callbacks.__all__) == {name.split("-")[0] for name in CASES}
