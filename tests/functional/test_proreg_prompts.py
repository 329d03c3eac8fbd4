import math

import pytest
import torch
from no_sync import NoSync

from lightning_methods.functional import fill_prompts, prompt_logits, prompt_text_features


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def test_sentences():
    assert fill_prompts(["dog"], "a photo of a") == [["a photo of a dog."]]
    assert fill_prompts(("dog", "cat"), [" this is ", "a {} and a {}, {x}"]) == [
        ["this is dog.", "a dog and a dog, {x}"],
        ["this is cat.", "a cat and a cat, {x}"],
    ]


def test_text_features():
    features = normal(3, 2, 4)
    expected = [
        unit([sum(column) / 2 for column in zip(*map(unit, sentences), strict=True)]) for sentences in features.tolist()
    ]
    torch.testing.assert_close(prompt_text_features(features), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(prompt_text_features(1e-6 * features), prompt_text_features(features))
    single = features[:, 0]
    expected = torch.tensor([unit(row) for row in single.tolist()], dtype=torch.float64)
    torch.testing.assert_close(prompt_text_features(single), expected)
    torch.testing.assert_close(prompt_text_features(features[:, :1]), expected)
    assert prompt_text_features(single, normalize=False) is single
    torch.testing.assert_close(prompt_text_features(features, normalize=False), features.sum(1) / 2)


def test_logits_are_scaled_cosines():
    features, text, scale = normal(3, 4), normal(5, 4, seed=1), torch.tensor(7.0, dtype=torch.float64)
    rows = [
        [7.0 * sum(x * y for x, y in zip(unit(f), unit(t), strict=True)) for t in text.tolist()]
        for f in features.tolist()
    ]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(prompt_logits(features, text, logit_scale=7.0), expected)
    torch.testing.assert_close(prompt_logits(2 * features, 3 * text, logit_scale=scale), expected)
    torch.testing.assert_close(prompt_logits(features, text), 100 / 7 * expected)
    leaves = [x.requires_grad_() for x in (features, text, scale)]
    assert torch.autograd.gradcheck(lambda f, t, s: prompt_logits(f, t, logit_scale=s), leaves)


def test_zero_and_short_vectors():
    features = torch.tensor([[0.0, 0.0], [3e-3, 4e-3]], requires_grad=True)
    found = prompt_logits(features, torch.eye(2), logit_scale=1.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert torch.autograd.grad(found.sum(), features)[0].isfinite().all()
    short = prompt_logits(features, torch.eye(2), logit_scale=1.0, eps=0.01)
    torch.testing.assert_close(short[1], torch.tensor([0.3, 0.4]))
    assert prompt_text_features(torch.zeros(2, 3, 4)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    features, text = (300 * normal(4, 2000)).to(dtype), normal(3, 2000, seed=1).to(dtype)  # in half the norm overflows
    expected = prompt_logits(features.float(), text.float())
    with torch.autocast("cpu", torch.bfloat16), NoSync():
        found = prompt_logits(features, text)
        wide = prompt_logits(features.float(), text.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(wide, expected)


X = torch.zeros(2, 3)

BAD_CALLS = {
    "one name": (lambda: fill_prompts("dog", "a"), "classnames.*'dog'"),
    "no name": (lambda: fill_prompts([], "a"), r"classnames.*\[\]"),
    "no template": (lambda: fill_prompts(["dog"], []), "templates.*none"),
    "flat text": (lambda: prompt_text_features(X[0]), r"features.*\(K, P, D\).*\(3,\)"),
    "integer text": (lambda: prompt_text_features(X.long(), normalize=False), "features.*int64"),
    "flat features": (lambda: prompt_logits(X[0], X), r"`features`.*\(3,\)"),
    "integer classes": (lambda: prompt_logits(X, X.long()), "`text_features`.*int64"),
    "widths": (lambda: prompt_logits(X, X[:, :2]), "`text_features`.*3.*2"),
    "scale": (lambda: prompt_logits(X, X, logit_scale=torch.ones(1)), r"`logit_scale`.*\(1,\)"),
    "eps": (lambda: prompt_logits(X, X, eps=-1.0), "`eps`.*-1.0"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
