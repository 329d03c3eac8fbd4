import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import proreg_loss, proreg_terms, proreg_weight

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)

WEIGHTS = {
    "probability": {},
    "probability 10": {"prompt_power": 10.0},
    "loss": {"weighting": "loss"},
    "loss 0.5": {"weighting": "loss", "gamma": 0.5},
    "constant": {"weighting": "constant", "constant_weight": 0.3},
}
each_weighting = pytest.mark.parametrize("options", WEIGHTS.values(), ids=list(WEIGHTS))


def problem(
    samples: int = 6, classes: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, prompts = 2 * torch.randn(2, samples, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (samples,), generator=generator)
    return logits.to(dtype).requires_grad_(), prompts.to(dtype).requires_grad_(), target


def plain_probs(logits: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in logits]
    return [power / sum(powers) for power in powers]


def plain_weight(
    p: float,
    q: float,
    weighting: str = "probability",
    gamma: float = 1.0,
    prompt_power: float = 1.0,
    constant_weight: float = 0.5,
    eps: float = 1e-5,
) -> float:
    """From the model's and the prompts' probability of the label."""
    if weighting == "constant":
        return constant_weight
    if weighting == "probability":
        return q**prompt_power / (p + q**prompt_power + eps)
    ce, pe = -math.log(p), -math.log(q)
    return ce**gamma / (ce**gamma + pe**gamma + eps)


def plain_sample(logits: Tensor, prompts: Tensor, label: int, alpha: float, temperature: float, **options) -> Tensor:
    """The definition for one sample, class by class."""
    p, q = plain_probs(logits), plain_probs(prompts.detach())
    weight = plain_weight(p[label].item(), q[label].item(), **options)
    soft_p, soft_q = plain_probs(logits, temperature), plain_probs(prompts.detach(), temperature)
    prompt = -(temperature**2) * sum(b * a.log() for a, b in zip(soft_p, soft_q, strict=True))
    return (1 - weight) * -p[label].log() + alpha * weight * prompt


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    @each_weighting
    def test_loss(self, options, temperature):
        logits, prompts, target = problem()
        found = proreg_loss(logits, prompts, target, alpha=1.7, temperature=temperature, eps=1e-3, **options)
        samples = [
            plain_sample(z, m, int(y), 1.7, temperature, eps=1e-3, **options)
            for z, m, y in zip(logits, prompts, target, strict=True)
        ]
        close(found, sum(samples) / 6)
        close(gradient(found, logits), gradient(sum(samples), logits) / 6)
        each = proreg_loss(
            logits, prompts, target, alpha=1.7, temperature=temperature, eps=1e-3, reduction="none", **options
        )
        close(each, torch.stack(samples))
        total = proreg_loss(
            logits, prompts, target, alpha=1.7, temperature=temperature, eps=1e-3, reduction="sum", **options
        )
        close(total, sum(samples))

    @each_weighting
    def test_weight(self, options):
        logits, prompts, target = problem()
        found = proreg_weight(logits, prompts, target, **options)
        p, q = (x.softmax(1)[range(6), target].tolist() for x in (logits, prompts))
        expected = [plain_weight(*pair, **options) for pair in zip(p, q, strict=True)]
        close(found, torch.tensor(expected, dtype=torch.float64))
        assert not found.requires_grad
        close(proreg_terms(logits, prompts, target, temperature=5.0, **options).weight, found)  # temperature 1 here

    @each_weighting
    def test_closed_form_of_the_gradient(self, options):
        logits, prompts, target = problem()
        terms = proreg_terms(logits, prompts, target, alpha=2.0, **options)
        w = terms.weight[:, None]
        wanted = (1 - w) * F.one_hot(target, 5) + 2.0 * w * prompts.softmax(1)
        expected = (1 - w + 2.0 * w) * logits.softmax(1) - wanted
        close(gradient(terms.loss.sum(), logits), expected.detach())
        assert torch.autograd.grad(terms.loss.sum(), prompts, allow_unused=True) == (None,)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_entropy_offset_makes_the_true_divergence(self, temperature):
        logits, prompts, target = problem()
        kl = F.kl_div((logits / temperature).log_softmax(1), (prompts / temperature).softmax(1), reduction="none").sum(
            1
        )
        plain, offset = (
            proreg_terms(logits, prompts, target, temperature=temperature, entropy_offset=on) for on in (False, True)
        )
        close(offset.prompt, temperature**2 * kl)
        assert (plain.prompt > offset.prompt).all()
        close(gradient(offset.prompt.sum(), logits), gradient(plain.prompt.sum(), logits))
        same = proreg_terms(logits, logits, target, temperature=temperature, entropy_offset=True)
        assert same.prompt.abs().max() < 1e-14

    @each_weighting
    def test_terms_make_the_loss(self, options):
        terms = proreg_terms(*problem(), alpha=1.3, temperature=2.0, **options)
        close(terms.loss, (1 - terms.weight) * terms.cross_entropy + 1.3 * terms.weight * terms.prompt)

    @each_weighting
    def test_soft_labels(self, options):
        logits, prompts, target = problem()
        hard = F.one_hot(target, 5).double()
        for found, expected in zip(
            proreg_terms(logits, prompts, hard, **options),
            proreg_terms(logits, prompts, target, **options),
            strict=True,
        ):
            close(found, expected)
        close(proreg_loss(logits, prompts, hard, **options), proreg_loss(logits, prompts, target, **options))
        soft = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
        terms = proreg_terms(logits, prompts, soft, **options)
        ce = F.cross_entropy(logits, soft, reduction="none")
        pe = F.cross_entropy(prompts, soft, reduction="none")
        close(terms.cross_entropy, ce)
        pairs = zip((-ce).exp().tolist(), (-pe).exp().tolist(), strict=True)
        close(terms.weight, torch.tensor([plain_weight(*pair, **options) for pair in pairs], dtype=torch.float64))


class TestEdges:
    @each_weighting
    def test_ignored_samples(self, options):
        logits, prompts, target = problem()
        keep = torch.tensor([0, 2, 5])
        for index in (-100, 7):
            masked = torch.full_like(target, index)
            masked[keep] = target[keep]
            call = functools.partial(proreg_loss, logits, prompts, masked, ignore_index=index, **options)
            few = proreg_loss(logits[keep], prompts[keep], target[keep], **options)
            close(call(), few)
            close(gradient(call(), logits), gradient(few, logits))
            each = call(reduction="none")
            close(each[keep], proreg_loss(logits[keep], prompts[keep], target[keep], reduction="none", **options))
            for term in proreg_terms(logits, prompts, masked, ignore_index=index, **options):
                assert term[[1, 3, 4]].count_nonzero() == 0
            assert proreg_weight(logits, prompts, masked, ignore_index=index, **options)[1] == 0

    @each_weighting
    def test_all_ignored(self, options):
        logits, prompts, target = problem()
        for rows in (6, 0):
            loss = proreg_loss(logits[:rows], prompts[:rows], torch.full_like(target[:rows], -100), **options)
            assert loss.item() == 0
            assert gradient(loss, logits).count_nonzero() == 0
        assert proreg_loss(logits[:0], prompts[:0], torch.zeros(0, 5)).item() == 0

    def test_plain_cross_entropy(self):
        logits, prompts, target = problem()
        target[2] = -100
        expected = F.cross_entropy(logits, target)
        close(proreg_loss(logits, prompts, target, weighting="constant", constant_weight=0.0, alpha=9.0), expected)
        weighted = proreg_terms(logits, prompts, target, alpha=0.0)
        close(weighted.loss, (1 - weighted.weight) * F.cross_entropy(logits, target, reduction="none"))

    def test_plain_distillation(self):
        logits, prompts, target = problem()
        found = proreg_loss(logits, prompts, target, weighting="constant", constant_weight=1.0, alpha=0.5)
        close(found, 0.5 * F.cross_entropy(logits, prompts.softmax(1).detach()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_both_certain(self, dtype):
        certain = torch.tensor([[200.0, 0.0]], dtype=dtype, requires_grad=True)
        label = torch.zeros(1, dtype=torch.long)
        close(proreg_weight(certain, certain, label), torch.tensor([1 / (2 + 1e-5)], dtype=dtype), rtol=1e-6)
        assert proreg_weight(certain, certain, label, weighting="loss", gamma=0.5).item() == 0
        wrong = 1 - label
        assert proreg_weight(certain, certain, wrong).item() < 1e-30  # both probabilities vanish: the label counts
        for options in ({"eps": 0.0}, {"eps": 0.0, "weighting": "loss", "gamma": 0.5}):
            for target in (label, wrong):
                loss = proreg_loss(20 * certain, 20 * certain, target, **options)
                assert loss.isfinite()
                assert gradient(loss, certain).isfinite().all()

    def test_the_first_step_has_weights_of_one_half(self):
        logits, _, target = problem()
        weight = proreg_weight(logits, logits, target, eps=0.0)
        close(weight, torch.full((6,), 0.5, dtype=torch.float64))


class TestPrecision:
    @each_weighting
    def test_gradcheck(self, options):
        logits, prompts, target = problem(3, 4)
        weight = proreg_weight(logits, prompts, target, **options)

        def loss(x: Tensor) -> Tensor:
            """With the weight held, which has no gradient."""
            terms = proreg_terms(x, prompts.detach(), target, temperature=2.0, **options)
            return (1 - weight) * terms.cross_entropy + weight * terms.prompt

        assert torch.autograd.gradcheck(loss, (logits,))
        full = proreg_loss(logits, prompts, target, temperature=2.0, reduction="sum", **options)
        close(gradient(full, logits), gradient(loss(logits).sum(), logits))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @each_weighting
    def test_half_precision_is_computed_in_float32(self, options, dtype):
        logits, prompts, target = problem(dtype=dtype)
        full = logits.detach().float().requires_grad_()
        found = proreg_loss(logits, prompts, target, **options)
        expected = proreg_loss(full, prompts.float(), target, **options)
        assert found.dtype == torch.float32
        assert found.item() == expected.item()
        torch.testing.assert_close(gradient(found, logits), gradient(expected, full).to(dtype))
        assert proreg_weight(logits, prompts, target, **options).dtype == torch.float32

    @each_weighting
    def test_autocast_changes_nothing(self, options):
        logits, prompts, target = problem(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = proreg_loss(logits, prompts, target, **options)
        assert found.dtype == torch.float32
        assert found.item() == proreg_loss(logits, prompts, target, **options).item()


numbers = st.floats(-20, 20, width=32)


@st.composite
def problems(draw):
    samples, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    rows = st.lists(numbers, min_size=classes, max_size=classes)
    logits, prompts = (
        torch.tensor(draw(st.lists(rows, min_size=samples, max_size=samples)), dtype=torch.float64) for _ in range(2)
    )
    target = draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples))
    options = {**draw(st.sampled_from(list(WEIGHTS.values()))), "temperature": draw(st.sampled_from([1.0, 2.5]))}
    return logits, prompts, torch.tensor(target), options


roughly = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)


class TestProperties:
    @settings(max_examples=30, deadline=None)
    @given(problems(), numbers, numbers)
    def test_a_shift_of_a_row_changes_nothing(self, problem, first, second):
        logits, prompts, target, options = problem
        before = proreg_loss(logits, prompts, target, **options)
        roughly(proreg_loss(logits + first, prompts + second, target, **options), before)

    @settings(max_examples=30, deadline=None)
    @given(problems(), st.data())
    def test_order_does_not_matter(self, problem, data):
        logits, prompts, target, options = problem
        classes = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
        samples = torch.tensor(data.draw(st.permutations(range(len(logits)))))
        mixed = [x[samples][:, classes] for x in (logits, prompts)]
        found = proreg_loss(*mixed, classes.argsort()[target[samples]], reduction="none", **options)
        roughly(found, proreg_loss(logits, prompts, target, reduction="none", **options)[samples])

    @settings(max_examples=30, deadline=None)
    @given(problems())
    def test_weights_lie_between_label_and_prompts(self, problem):
        logits, prompts, target, options = problem
        terms = proreg_terms(logits, prompts, target, entropy_offset=True, **options)
        assert ((terms.weight >= 0) & (terms.weight <= 1)).all()
        assert (terms.loss > -1e-9).all()

    @settings(max_examples=30, deadline=None)
    @given(problems(), st.floats(0.1, 5))
    def test_better_prompts_weigh_more(self, problem, gain):
        logits, prompts, target, options = problem
        better = prompts + gain * F.one_hot(target, prompts.shape[1])
        del options["temperature"]
        before, after = (proreg_weight(logits, p, target, **options) for p in (prompts, better))
        assert (after >= before - 1e-12).all()


class TestRunsAnywhere:
    @each_weighting
    def test_the_host_never_waits(self, options):
        logits, prompts, target = problem()
        with NoSync():
            proreg_loss(logits, prompts, target, temperature=2.0, **options).backward()
            proreg_loss(logits, prompts, target.float()[:, None].expand(-1, 5), **options).backward()
            proreg_weight(logits, prompts, target, **options)

    @each_weighting
    def test_compiles_whole(self, options):
        logits, prompts, target = problem()
        torch._dynamo.reset()
        compiled = torch.compile(proreg_loss, fullgraph=True, backend="eager")(logits, prompts, target, **options)
        expected = proreg_loss(logits, prompts, target, **options)
        close(compiled, expected)
        close(gradient(compiled, logits), gradient(expected, logits))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @each_weighting
    def test_same_on_cuda_without_waiting(self, options):
        logits, prompts, target = problem()
        there = [x.detach().cuda() for x in (logits, prompts, target)]
        there[0].requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = proreg_loss(*there, **options)
            found.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = proreg_loss(logits, prompts, target, **options)
        close(found.cpu(), expected)
        close(there[0].grad.cpu(), gradient(expected, logits))


Z, M, Y = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2])

BAD_CALLS = {
    "shapes differ": (lambda: proreg_loss(Z, torch.zeros(2, 4), Y), r"logits.*\(2, 3\).*prompt_logits.*\(2, 4\)"),
    "one class": (lambda: proreg_loss(Z[:, :1], M[:, :1], Y), r"logits.*K >= 2.*\(2, 1\)"),
    "dense": (lambda: proreg_loss(Z[..., None], M[..., None], Y), r"logits.*\(N, K\).*\(2, 3, 1\)"),
    "integer logits": (lambda: proreg_weight(Z, M.long(), Y), "prompt_logits.*int64"),
    "target shape": (lambda: proreg_loss(Z, M, Y[:1]), r"target.*\(2,\).*\(1,\)"),
    "target column": (lambda: proreg_loss(Z, M, Y[:, None]), r"target.*\(2,\).*\(2, 1\)"),
    "target floating": (lambda: proreg_loss(Z, M, Y.float()), r"target.*soft labels \(2, 3\).*\(2,\) of torch.float32"),
    "target boolean": (lambda: proreg_weight(Z, M, Y > 0), "target.*bool"),
    "target too large": (lambda: proreg_loss(Z, M, Y + 1), r"target.*\[0, 3\), got 3"),
    "target negative": (lambda: proreg_weight(Z, M, Y - 1), r"target.*\[0, 3\), got -1"),
    "target -100 but another index": (lambda: proreg_loss(Z, M, Y - 100, ignore_index=-1), r"target.*got -100"),
    "weighting": (lambda: proreg_loss(Z, M, Y, weighting="power"), "weighting.*probability.*power"),
    "weighting of the weight": (lambda: proreg_weight(Z, M, Y, weighting="power"), "weighting.*probability.*power"),
    "reduction": (lambda: proreg_loss(Z, M, Y, reduction="max"), "reduction.*none.*max"),
    "temperature": (lambda: proreg_loss(Z, M, Y, temperature=0.0), "temperature.*positive.*0.0"),
    "alpha": (lambda: proreg_terms(Z, M, Y, alpha=-1.0), "alpha.*-1.0"),
    "gamma": (lambda: proreg_loss(Z, M, Y, gamma=0.0), "gamma.*positive.*0.0"),
    "prompt_power": (lambda: proreg_weight(Z, M, Y, prompt_power=-1.0), "prompt_power.*positive"),
    "constant_weight": (lambda: proreg_loss(Z, M, Y, constant_weight=1.1), r"constant_weight.*\[0, 1\].*1.1"),
    "eps": (lambda: proreg_weight(Z, M, Y, eps=-1e-9), "eps.*-1e-09"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
