"""The conformance suite: what every method owes, for the methods of this package and for yours.

from lightning_methods.testing import check_method

def test_my_method():
    check_method(MyMethod(...), MyLightningModule(), batch)
"""

from __future__ import annotations

from typing import Any

from lightning_methods.attach import Method
from lightning_methods.testing._case import Case, NotApplicable, Report
from lightning_methods.testing.ddp import CHECKS as DDP_CHECKS
from lightning_methods.testing.runs import CHECKS as RUN_CHECKS
from lightning_methods.testing.state import CHECKS as STATE_CHECKS

#: Every check by name: a function of a `Case` that raises `AssertionError` or `NotApplicable`.
CHECKS = {**RUN_CHECKS, **STATE_CHECKS, **DDP_CHECKS}


def check_method(method: Method, module: Any, batch: Any, *, accelerator: str = "cpu") -> Report:
    """Runs the whole suite on a method attached to a module.

    The method and the module are deep-copied for every run, and stay as they are.

    Args:
        method: The method, with settings under which it acts from the first epoch on.
        module: A LightningModule (of either Lightning package) that trains with plain SGD or the like; without
            BatchNorm and dropout if the distributed checks are to compare numbers.
        batch: One training batch whose tensors all begin with the same even batch size, at least 4.
        accelerator: `"cpu"`, or `"cuda"` to run the same checks on a GPU.

    Returns:
        What was checked, and what could not be and why.

    Raises:
        AssertionError: If a check fails; the message lists all that do.
    """
    case = Case(method, module, batch, accelerator)
    report = Report()
    for name, check in CHECKS.items():
        try:
            check(case)
        except NotApplicable as reason:
            report.not_run[name] = str(reason)
        except Exception as error:  # every failure is reported, not only the first
            report.failed[name] = f"{type(error).__name__}: {error}"
        else:
            report.passed.append(name)
    if report.failed:
        raise AssertionError(f"{method!r} fails:\n{report}")
    return report


__all__ = ["CHECKS", "Case", "NotApplicable", "Report", "check_method"]
