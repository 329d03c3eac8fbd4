"""`ProReg` against its objective written out by hand, and what it says about its prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proreg_student import (
    PROMPTS,
    QUIET,
    ROWS,
    TEXT,
    K,
    Student,
    X,
    Y,
    assert_same,
    batches,
    by_hand,
    fit,
    plain_loss,
    proreg,
)
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.attach import computed
from lightning_methods.testing._case import Batches


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["probability", "loss", "constant"])
@pytest.mark.parametrize("loss", ["replace", "add"])
def test_two_epochs_by_hand(loss: str, weighting: str, temperature: float) -> None:
    module = Student()
    fit(proreg(loss=loss, weighting=weighting, temperature=temperature, alpha=1.7), module)
    assert_same(module, by_hand(PROMPTS.__getitem__, weighting, 1.7, temperature))


def test_add_keeps_the_other_terms_and_replace_drops_them_with_a_warning() -> None:
    kept, replaced, plain = Student(penalty=0.1), Student(penalty=0.1), Student()
    fit(proreg(loss="add"), kept)
    with pytest.warns(UserWarning, match=r"replaces the module's loss, .*loss='add' keeps it"):
        Trainer(**QUIET, callbacks=[proreg()]).fit(replaced, Batches(batches()))
    fit(proreg(), plain)
    assert_same(replaced, plain)
    hand = Student(penalty=0.1)
    optimizer = hand.configure_optimizers()
    for _ in range(2):
        for rows in ROWS:
            loss = plain_loss(hand(X[rows]), PROMPTS[rows], Y[rows], "probability", 1.0, 1.0)
            optimizer.zero_grad()
            (loss + 0.1 * hand.head.square().sum()).backward()
            optimizer.step()
    assert_same(kept, hand)


def test_add_is_replace_where_samples_are_ignored() -> None:
    target = Y.clone()
    target[[1, 4, 7]] = -100
    modules = Student(), Student()
    for module, loss in zip(modules, ("replace", "add"), strict=True):
        fit(proreg(loss=loss), module, batches(target))
    assert_same(*modules)
    kept = [row for row in range(6) if target[row] >= 0]
    first, hand = Student(), Student()
    fit(proreg(), first, batches(target), trainer={"max_steps": 1})
    optimizer = hand.configure_optimizers()
    plain_loss(hand(X[kept]), PROMPTS[kept], Y[kept], "probability", 1.0, 1.0).backward()
    optimizer.step()
    assert_same(first, hand)


# --- what it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["replace", "add"])
def test_logs(loss: str) -> None:
    logged = fit(proreg(loss=loss, alpha=2.0, log="epoch"), trainer={"max_steps": 1}).callback_metrics
    module, rows = Student(), ROWS[0]
    logits, prompts, target = module(X[rows]), PROMPTS[rows], Y[rows]
    ce = F.cross_entropy(logits, target, reduction="none").detach()
    p, q = (value.softmax(1)[range(6), target].detach() for value in (logits, prompts))
    w = q / (p + q + 1e-5)
    label = ((1 - w if loss == "replace" else -w) * ce).mean()
    prompt = (w * F.cross_entropy(logits, prompts.softmax(1), reduction="none").detach()).mean()
    expected = {
        "label": label,
        "prompt": prompt,
        "loss": label + 2 * prompt,
        "cross_entropy": ce.mean(),
        "weight": w.mean(),
        "prompt_accuracy": (prompts.argmax(1) == target).double().mean(),
    }
    assert 0 < expected["prompt_accuracy"] < 1
    found = {name.removeprefix("proreg/"): value for name, value in logged.items() if name.count("/") == 1}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def permuted(step: Any) -> Tensor:
    prompts: Tensor = step["batch.prompt_logits"]
    return prompts.roll(1, dims=1)


def test_prompts_in_another_order_are_noticed() -> None:
    with pytest.raises(UserWarning, match=r"right on \d of 12 samples .*worse than chance with 4 classes"):
        fit(proreg(prompt=computed(permuted)))


def test_chance_is_counted_over_the_epoch_and_without_ignored_samples() -> None:
    right = F.one_hot(Y, K).double()
    none = right.roll(1, dims=1)

    def data(prompts: Tensor, target: Tensor = Y) -> list[dict[str, Tensor]]:
        return [{"image": X[r], "label": target[r], "prompt_logits": 3 * prompts[r]} for r in ROWS]

    half = torch.cat([none[:6], right[6:9], none[9:]])
    fit(proreg(), data=data(half))  # none of 6, then 3 of 6: 3 of 12 is chance
    some = torch.cat([none[:6], right[6:8], none[8:]])
    with pytest.raises(UserWarning, match="right on 2 of 12"):
        fit(proreg(), data=data(some))
    ignored = Y.clone()
    ignored[8:] = -100
    fit(proreg(), data=data(some, ignored))  # 2 of 8
    fit(proreg(), data=data(half, F.one_hot(Y, K).double()))  # soft labels
    with pytest.raises(UserWarning, match="right on 2 of 12"):
        fit(proreg(), data=data(some, F.one_hot(Y, K).double()))


# --- targets, errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [lambda y: y[:, None], lambda y: y.double(), lambda y: y.to(torch.int32), lambda y: F.one_hot(y, K).double()],
    ids=["column", "float", "int32", "soft"],
)
def test_targets_as_they_come(stored: Any) -> None:
    module = Student()
    fit(proreg(), module, [{**batch, "label": stored(batch["label"])} for batch in batches()])
    assert_same(module, by_hand(PROMPTS.__getitem__))


def probabilities(step: Any) -> Tensor:
    logits: Tensor = step["module"]
    return logits.softmax(1)


def changed(**values: Any) -> list[dict[str, Any]]:
    return [{**batch, **{name: change(batch) for name, change in values.items()}} for batch in batches()]


AT_THE_FIRST_STEP = {
    "probabilities as prompts": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"].softmax(1).to(torch.bfloat16)),
        r"Expected logits as `prompt` .*sums to 1: these are probabilities",
    ),
    "probabilities as logits": (
        {"logits": computed(probabilities, "module")},
        None,
        "Expected logits as `logits`",
    ),
    "other classes": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"][:, :3]),
        r"`logits` at 'module' are \[6, 4\] and `prompt` at 'batch\.prompt_logits' are \[6, 3\]",
    ),
    "other samples": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"][:3]),
        r"`logits` at 'module' are \[6, 4\] and `prompt` at 'batch\.prompt_logits' are \[3, 4\]",
    ),
    "another classifier": (
        {"prompt": nn.Linear(6, 9).double(), "inputs": "batch.image"},
        None,
        r"\[6, 4\] and `prompt` at 'teacher' are \[6, 9\]",
    ),
    "no logits": ({"logits": "output"}, None, r"`logits` at 'output' to be floating logits .*shape \[\]"),
    "indices as prompts": ({"prompt": "batch.label"}, None, r"`prompt` at 'batch\.label' to be floating logits"),
    "image as target": (
        {"target": "batch.image"},
        None,
        r"`target` at 'batch\.image' .*\[6\] or soft labels .*\[6, 4\]",
    ),
    "one-hot integers": (
        {"target": lambda step: F.one_hot(step.batch["label"], K)},
        None,
        "class indices of shape .* or soft labels",
    ),
    "class out of range": ({"target": lambda step: step.batch["label"] + 1}, None, r"`target` .*\[0, 4\), got 4"),
    "no such key": ({"prompt": "batch.prompts"}, None, r"'batch\.prompts': batch is a dict of 3.*'prompt_logits'"),
}


@pytest.mark.parametrize(("settings", "data", "message"), AT_THE_FIRST_STEP.values(), ids=list(AT_THE_FIRST_STEP))
def test_errors_at_the_first_step_leave_the_module_alone(settings: Any, data: Any, message: str) -> None:
    module = Student()
    with pytest.raises(ValueError, match=message):
        fit(proreg(**settings), module, data)
    assert "training_step" not in vars(module)
    assert_same(module, Student(), rtol=0, atol=0)


def test_rows_that_only_sum_to_one_are_logits() -> None:
    def shift(batch: Any) -> Tensor:
        prompts = batch["prompt_logits"]
        return prompts - (prompts.sum(1, keepdim=True) - 1) / K

    module = Student()
    fit(proreg(), module, changed(prompt_logits=shift))
    assert_same(module, by_hand(PROMPTS.__getitem__))


WHERE_IT_IS_WRITTEN_DOWN = {
    "no prompts": ({"prompt": None}, "either `prompt` or `snapshot`"),
    "two": ({"snapshot": "module", "prompt": "batch.2"}, "either `prompt` or `snapshot`"),
    "features of a classifier": ({"text_features": TEXT}, "`text_features` only with `snapshot`"),
    "logits to save": ({"save_teacher": True}, "`save_teacher` only with a module in `prompt`"),
    "a snapshot of the batch": ({"snapshot": "batch.image"}, r"`snapshot` to name a submodule.*'batch\.image'"),
    "a snapshot of an input": ({"snapshot": "module.visual@input"}, "`snapshot` to name a submodule"),
    "features in the batch": ({"snapshot": "module", "text_features": "batch.0"}, "`text_features` to be a Tensor, or"),
    "loss": ({"loss": "both"}, "`loss`"),
    "weighting": ({"weighting": "entropy"}, "`weighting`"),
    "alpha": ({"alpha": -1.0}, "`alpha`"),
    "gamma": ({"gamma": 0.0}, "`gamma`"),
    "prompt_power": ({"prompt_power": -1.0}, "`prompt_power`"),
    "temperature": ({"temperature": 0.0}, "`temperature`"),
    "constant_weight": ({"constant_weight": 1.5}, "`constant_weight`"),
    "eps": ({"eps": -1e-5}, "`eps`"),
    "logit_scale": ({"logit_scale": 0.0}, "`logit_scale`"),
    "an address": ({"logits": "modul"}, "Did you mean 'module'"),
}


@pytest.mark.parametrize(("settings", "message"), WHERE_IT_IS_WRITTEN_DOWN.values(), ids=list(WHERE_IT_IS_WRITTEN_DOWN))
def test_errors_where_the_method_is_written_down(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proreg(**settings)


def test_reads_like_the_constructor_call() -> None:
    method = proreg(snapshot="module.visual", text_features=TEXT, alpha=2.0)
    text = (
        "ProReg(target='batch.label', inputs='module.visual@input', snapshot='module.visual', "
        "text_features=Tensor(4, 5), alpha=2.0)"
    )
    assert repr(method) == text
    fit(method)
    assert repr(method) == text
    assert repr(proreg(prompt=nn.Linear(2, 2))) == "ProReg(target='batch.label', prompt=Linear(...), inputs='batch.0')"
