"""Checks on how a method trains: traces, weights, precision, other callbacks, errors."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_methods.attach import AddressError, Parts
from lightning_methods.attach.address import Address, address
from lightning_methods.testing._case import EPOCHS, STEPS, Case, NotApplicable, Run, close, same

#: Operations that wait for the device, because their result (or its shape) is needed on the host.
_SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}


class _NoSync(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if name in _SYNCING or (masks and name in ("index", "index_put", "index_put_")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_sync(accelerator: str) -> Iterator[None]:
    if accelerator == "cpu":
        with _NoSync():  # type: ignore[no-untyped-call]
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _traces(module: Any) -> dict[str, Any]:
    """All that a callback could leave behind on a module."""
    found: dict[str, Any] = {"attributes": sorted(module.__dict__), "state": list(module.state_dict())}
    for name, part in module.named_modules():
        hooks = [kind for kind in vars(part) if kind.endswith("_hooks") and vars(part)[kind]]
        found[name] = (type(part).__name__, part.training, hooks, sorted(part._modules))
    return found


def _undone(run: Run) -> Any:
    """The module, or a copy of it in which the method's changes to its parts are undone."""
    method = run.methods[0]
    if not method.changes_inference:
        return run.module
    copied = method.undo(copy.deepcopy(run.module))
    assert _traces(copied) != _traces(run.module), "changes_inference is True, but it has replaced no part"
    return copied


def leaves_no_trace(case: Case) -> None:
    """After a fit nothing on the module, and nothing of the module on the method, tells that they met.

    A method that changes inference leaves its parts, and `undo` takes them out.
    """
    method = case.attached.methods[0]
    assert _traces(_undone(case.attached)) == _traces(case.plain.module)
    assert method.teacher is None or not any(part._forward_hooks for part in method.teacher.network.modules()), (
        "a hook is left on the teacher"
    )
    kept = [name for name, value in vars(method).items() if value is case.attached.module]
    assert not kept, f"the method keeps the module in {kept}"


def changes_training(case: Case) -> None:
    """The method does something, stays finite, and logs under its name."""
    assert not same(case.attached.weights, case.plain.weights), "the weights are those of a plain fit"
    assert all(value.isfinite().all() for value in case.attached.weights.values()), "weights are not finite"
    if case.method().adds_losses:
        logged = [key for key in case.attached.trainer.callback_metrics if key.startswith(f"{case.method().name}/")]
        assert logged, "no term was logged"


def weight_zero_is_off(case: Case) -> None:
    """With every weight 0, training is bit for bit that without the method."""
    method = case.method()
    if not method.weights or method.replaces_loss or method.changes_inference:
        raise NotApplicable("it has no weights, replaces the loss, or changes inference")
    method.weights = dict.fromkeys(method.weights, 0.0)
    method.task_weight = 1.0
    assert same(case.fit([method]).weights, case.plain.weights)


def several_together(case: Case) -> None:
    """Two instances under two names train together, in either order, and both act."""
    first, second = case.method(), case.method()
    if first.replaces_loss or first.changes_inference:
        raise NotApplicable("it replaces the loss or parts of the module, which one method can")
    second.name = f"{second.name}_second"
    both = case.fit([first, second])
    assert not same(both.weights, case.attached.weights), "the second one did nothing"
    logged = both.trainer.callback_metrics
    if first.adds_losses:
        assert any(key.startswith(f"{second.name}/") for key in logged), "the second one logged nothing"


def fits_twice(case: Case) -> None:
    """A second fit with the same objects goes on where the first ended, and leaves no trace either."""
    run = case.fit([case.method()])
    before = run.weights
    again = case.fit(run.methods, run.module)
    assert not same(before, again.weights)
    assert _traces(_undone(again)) == _traces(case.plain.module)


class _Fail:
    """Mixed with the Callback class of the module's Lightning by `_failing`."""

    hook: str

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")


def _failing(case: Case, hook: str) -> Any:
    return type("Failing", (_Fail, case.lightning.Callback), {hook: _Fail._fail})()


def survives_exceptions(case: Case) -> None:
    """An exception in setup, or after some steps, leaves no trace; fitting again works."""
    for hook in ("setup", "on_before_optimizer_step", "on_train_batch_end"):
        module, method = case.module(), case.method()
        with contextlib.suppress(RuntimeError):
            case.fit([method], module, callbacks=[_failing(case, hook)])
        assert "training_step" not in vars(module), f"after an exception in {hook} the wrapper is still on"
        assert not any(part._forward_hooks for part in module.modules()), f"hooks are left by an exception in {hook}"
        case.fit([method], module)


def accumulates_and_clips(case: Case) -> None:
    """Gradient accumulation over equal micro-batches and clipping work as without the method."""
    run = case.fit([case.method()], accumulate_grad_batches=STEPS, gradient_clip_val=0.01)
    assert run.trainer.global_step == EPOCHS
    before = dict(case.module().named_parameters())
    change = sum(
        (after.double() - before[name].to(after).double()).square().sum()
        for name, after in run.module.named_parameters()
        if name in before  # a replaced part may have others
    )
    assert 0 < change < 1, "clipped steps are not small"


def trains_in_bf16(case: Case) -> None:
    """Mixed precision gives finite weights near those of full precision."""
    run = case.fit([case.method()], precision="bf16-mixed")
    assert all(value.isfinite().all() for value in run.weights.values())
    assert close(run.weights, case.attached.weights, atol=0.1), "far from training in full precision"


def trains_in_fp16(case: Case) -> None:
    """Half precision with loss scaling gives finite weights."""
    if case.accelerator == "cpu":
        raise NotApplicable("16-mixed needs a GPU")
    run = case.fit([case.method()], precision="16-mixed")
    assert all(value.isfinite().all() for value in run.weights.values())


def compiles(case: Case) -> None:
    """A compiled module trains to the same weights."""
    torch.compiler.reset()
    module = case.module()
    case.fit([case.method()], torch.compile(module, backend="aot_eager"))
    torch.compiler.reset()
    assert close(case.attached.weights, Run(module, None, []).weights)


def works_with_weight_averaging(case: Case) -> None:
    """Weight averaging works in front of the method and behind it, with the same result."""

    def average() -> Any:
        return case.lightning.callbacks.EMAWeightAveraging(decay=0.5)

    if not hasattr(case.lightning.callbacks, "EMAWeightAveraging"):
        raise NotApplicable("this Lightning has no EMAWeightAveraging")
    first = case.fit([case.method()], before=[average()])
    last = case.fit([case.method()], callbacks=[average()])
    assert same(first.weights, last.weights)


def works_with_lr_find(case: Case) -> None:
    """The learning-rate finder runs, and what follows is a normal fit."""
    module, method = case.module(), case.method()
    finder = case.lightning.callbacks.LearningRateFinder(num_training_steps=STEPS, update_attr=False)
    if not hasattr(module, "lr") and not hasattr(module, "learning_rate"):
        module.lr = 0.1
    case.fit([method], module, before=[finder])


def refuses_wrong_addresses(case: Case) -> None:
    """An address that names nothing is an error that shows it."""
    own = {name: value for name, value in vars(case.method()).items() if isinstance(value, (Address, Parts))}
    if not own:
        raise NotApplicable("it has no addresses of its own")
    for name, value in own.items():
        wrong: Any = Parts("module.no_such_name")
        if isinstance(value, Address):
            if _fit_with(case, name, address(_was_read)) is None:  # settings may make an address superfluous
                continue
            inside = value.items or not value.captured
            wrong = address(f"{value}.no_such_name" if inside else f"{value.root}.no_such_name")
        error = _fit_with(case, name, wrong)
        assert isinstance(error, AddressError), f"{wrong!r} as `{name}` gave {error!r}"
        assert "no_such_name" in str(error), f"the error for {wrong!r} does not show it: {error}"


def _was_read(_step: Any) -> Any:
    raise LookupError


def _fit_with(case: Case, name: str, where: Any) -> Exception | None:
    method = case.method()
    setattr(method, name, where)
    try:
        case.fit([method])
    except (AddressError, LookupError) as error:
        return error
    return None


def reads_well(case: Case) -> None:
    """`repr` reads like the constructor call."""
    text = repr(case.method())
    assert text.startswith(f"{type(case.method()).__name__}("), text
    assert not re.search(r" at 0x[0-9a-f]+", text), text


def never_waits_for_the_device(case: Case) -> None:
    """Nothing in `rewrite` or `losses` needs a value on the host."""
    method = case.method()

    def guarded(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(step: Any) -> Any:
            with _no_sync(case.accelerator):
                return function(step)

        return call

    method.losses, method.rewrite = guarded(method.losses), guarded(method.rewrite)
    case.fit([method])


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        leaves_no_trace,
        changes_training,
        weight_zero_is_off,
        several_together,
        fits_twice,
        survives_exceptions,
        accumulates_and_clips,
        trains_in_bf16,
        trains_in_fp16,
        compiles,
        works_with_weight_averaging,
        works_with_lr_find,
        refuses_wrong_addresses,
        reads_well,
        never_waits_for_the_device,
    )
}
