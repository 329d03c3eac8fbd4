"""Checks on what is kept: checkpoints, resuming, copies."""

from __future__ import annotations

import contextlib
import copy
import pickle
import pickletools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_methods.testing._case import EPOCHS, STEPS, Batches, Case, NotApplicable, Run, same


def _fit_with_checkpoints(case: Case, folder: str, **arguments: Any) -> tuple[Any, list[Path]]:
    checkpoint = case.lightning.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    run = case.fit([case.method()], callbacks=[checkpoint], enable_checkpointing=True, **arguments)
    return run, sorted(Path(folder).glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))


def resumes_exactly(case: Case) -> None:
    """A run killed after any step and resumed ends with the weights of the unbroken run, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        run, checkpoints = _fit_with_checkpoints(case, folder)
        assert len(checkpoints) == EPOCHS * STEPS
        for path in checkpoints[:-1]:
            resumed = case.fit([case.method()], ckpt_path=path, loader=Batches(case.batches))
            assert same(resumed.weights, run.weights), f"differs after resuming from {path.stem}"
            assert _same_state(resumed.methods[0].state_dict(), run.methods[0].state_dict()), (
                f"the method's own state differs after resuming from {path.stem}"
            )


def _same_state(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same_state(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same_state, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


def checkpoint_is_plain(case: Case) -> None:
    """A checkpoint loads strictly into the module alone, with `weights_only`, and names nothing of this package."""
    if case.method().changes_inference:
        raise NotApplicable("it changes inference, so its checkpoints need it")
    with tempfile.TemporaryDirectory() as folder:
        _, checkpoints = _fit_with_checkpoints(case, folder, max_epochs=1)
        content = torch.load(checkpoints[-1], weights_only=True)
        case.module().load_state_dict(content["state_dict"], strict=True)
        with zipfile.ZipFile(checkpoints[-1]) as archive:
            data = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            classes = {str(arg) for op, arg, _ in pickletools.genops(archive.read(data)) if op.name == "GLOBAL"}
    ours = [name for name in classes if name.startswith("lightning_methods")]
    assert not ours, f"the checkpoint needs {ours} to be read"


def checkpoint_says_what_it_needs(case: Case) -> None:
    """Where inference changes, a checkpoint refuses the module alone by the method's name and loads after `apply`."""
    method = case.method()
    if not method.changes_inference:
        raise NotApplicable("its checkpoints are plain")
    with tempfile.TemporaryDirectory() as folder:
        run, checkpoints = _fit_with_checkpoints(case, folder)
        state = torch.load(checkpoints[-1], weights_only=True)["state_dict"]
    refusal = ""
    try:
        case.module().load_state_dict(state)
    except RuntimeError as error:
        refusal = str(error)
    assert type(method).__name__ in refusal, f"loading into the module alone does not name the method: {refusal!r}"
    restored = method.apply(case.module())
    restored.load_state_dict(state)
    assert same(Run(restored, None, []).weights, run.weights)
    exported = method.export(restored)
    assert type(method).__name__ not in str(list(exported.state_dict())), "an exported module names the method"
    assert all(torch.equal(*pair) for pair in zip(exported.parameters(), restored.parameters(), strict=True))


def copies_are_free(case: Case) -> None:
    """In mid-training, a copied or pickled module is a plain one, and the method can be copied too."""
    copies: list[Any] = []

    class Copy(case.lightning.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if not copies:
                copies.append(copy.deepcopy(pl_module))
                with contextlib.suppress(pickle.PicklingError, AttributeError):  # a class inside a function
                    copies.append(pickle.loads(pickle.dumps(pl_module)))  # noqa: S301  # our own bytes

    run = case.fit([case.method()], callbacks=[Copy()])
    assert copies
    for copied in copies:
        step = copied.training_step
        assert "attach" not in type(step).__module__, "a copied module carries the wrapper"
        hooks = [hook for part in copied.modules() for hook in part._forward_hooks.values()]
        assert not any("_Hook" in type(hook).__name__ for hook in hooks), "a copied module records"
    copy.deepcopy(run.methods[0])
    repr(copy.deepcopy(run.methods[0]))


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (resumes_exactly, checkpoint_is_plain, checkpoint_says_what_it_needs, copies_are_free)
}
