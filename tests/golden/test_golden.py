"""Recorded cases: NAME.json describes a call, NAME.npz beside it holds inputs and expected results.

The numbers come from outside this package; `origin` in each JSON file says where from.

    call           a name in `lightning_methods.functional`, or `modules.X`, `metrics.X`
    inputs         npz keys of the positional arguments; "model" is the network z -> 3 tanh(flatten(z) Wᵀ + b)
                   with W and b under "weight" and "bias"
    kwargs         plain keyword arguments
    tensor_kwargs  keyword argument -> npz key
    init           constructor arguments of a module or metric
    state, mode    for a module: its weights lie under the npz keys "state:NAME"; "train" or "eval" (default)
    updates        for a metric: the npz keys of each call of `update`
    expected       result -> npz key; "grad:ARGUMENT" is a gradient. A list: the results in order, under their own keys
    cotangents     result -> npz key: the gradients are those of the sum of result · cotangent,
    grad_of        or of this result, or else of the first floating result
    rtol, atol     tolerances
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CASES = sorted(Path(__file__).parent.rglob("*.json"))


class Case:
    def __init__(self, path: Path):
        self.record: dict[str, Any] = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        expected = self.record["expected"]
        self.expected: dict[str, str] = (
            expected if isinstance(expected, dict) else dict(zip(expected, expected, strict=True))
        )
        self.wanted = [name for name in self.expected if not name.startswith("grad:")]
        self.differentiated = [name[5:] for name in self.expected if name.startswith("grad:")]
        self.arguments: dict[str, Any] = {}

    def value(self, key: str) -> Any:
        array = self.arrays[key]
        if array.dtype.kind in "US":
            return array.tolist()
        tensor = torch.from_numpy(np.array(array))
        return tensor.float() if tensor.dtype == torch.float16 else tensor  # half is only how weights are stored

    def argument(self, name: str, key: str) -> Any:
        value = self.network() if key == "model" else self.value(key)
        if name in self.differentiated:
            value.requires_grad_()
        self.arguments[name] = value
        return value

    def network(self) -> Any:
        weight, bias = self.value("weight"), self.value("bias")
        return lambda z: 3 * torch.tanh(torch.nn.functional.linear(z.flatten(1), weight, bias))

    def results(self) -> dict[str, Any]:
        room, _, name = self.record["call"].rpartition(".")
        function = getattr(importlib.import_module(f"lightning_methods.{room or 'functional'}"), name)
        if room:
            function = function(**self.record.get("init", {}))
        if "updates" in self.record:
            for keys in self.record["updates"]:
                function.update(*map(self.value, keys))
            return self.by_name(function.compute())
        if "state" in self.record:
            stored = {key[6:]: self.value(key) for key in self.arrays if key.startswith("state:")}
            function.load_state_dict(stored)
        if room == "modules":
            function.train(self.record.get("mode", "eval") == "train")
        positional = [self.argument(key, key) for key in self.record.get("inputs", [])]
        named = {name: self.argument(name, key) for name, key in self.record.get("tensor_kwargs", {}).items()}
        return self.by_name(function(*positional, **self.record.get("kwargs", {}), **named))

    def by_name(self, result: Any) -> dict[str, Any]:
        if isinstance(result, dict):
            return result
        if hasattr(result, "_asdict"):
            return dict(result._asdict())
        if isinstance(result, (tuple, list)):
            return dict(zip(self.wanted, result, strict=True))
        return dict.fromkeys(self.wanted, result)

    def gradients(self, results: dict[str, Any]) -> dict[str, Tensor]:
        if "cotangents" in self.record:
            weighted = [(results[name] * self.value(key)).sum() for name, key in self.record["cotangents"].items()]
            scalar = torch.stack(weighted).sum()
        elif "grad_of" in self.record:
            scalar = results[self.record["grad_of"]].sum()
        else:
            scalar = next(r for r in results.values() if isinstance(r, Tensor) and r.requires_grad).sum()
        leaves = [self.arguments[name] for name in self.differentiated]
        found = torch.autograd.grad(scalar, leaves, allow_unused=True)
        return {
            f"grad:{name}": torch.zeros_like(leaf) if grad is None else grad
            for name, leaf, grad in zip(self.differentiated, leaves, found, strict=True)
        }

    def check(self) -> None:
        found = self.results()
        if self.differentiated:
            found |= self.gradients(found)
        for name, key in self.expected.items():
            actual = torch.as_tensor(found[name]).detach()
            expected = torch.as_tensor(self.value(key))
            assert actual.numel() == expected.numel(), f"{name}: {actual.shape} instead of {expected.shape}"
            np.testing.assert_allclose(
                actual.reshape(expected.shape).double().numpy(),
                expected.double().numpy(),
                rtol=self.record["rtol"],
                atol=self.record["atol"],
                err_msg=name,
            )


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_case(path: Path):
    Case(path).check()


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_case_tells_other_numbers_apart(path: Path):
    """A case that passes with any numbers would check nothing: each expected array, disturbed, must fail it."""
    for key in Case(path).expected.values():
        case = Case(path)
        array = case.arrays[key]
        size = abs(array.astype(float)).max() if array.size else 0.0
        case.arrays[key] = ~array if array.dtype == bool else array + (1 + size) / 4
        with pytest.raises(AssertionError):
            case.check()
