import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import (
    dkl_loss,
    gkl_loss,
    ikl_loss,
    ikl_terms,
    pairwise_wmse,
    soft_target_cross_entropy,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def plain_wmse(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The definition: a sum over all pairs of classes; one row per sample."""
    error = (teacher[:, :, None] - teacher[:, None, :]) - (student[:, :, None] - student[:, None, :])
    return (weight[:, :, None] * weight[:, None, :] * error**2).sum((1, 2)) / 4


def plain_soft_ce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    target = (teacher / temperature).softmax(1).detach()
    return F.cross_entropy(student / temperature, target, reduction="none")


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def class_means(classes: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, classes, generator=generator, dtype=dtype).softmax(1)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


LOSSES = {
    "wmse": lambda n, m, p, y, **kw: pairwise_wmse(n, m, p[y].movedim(-1, 1), **kw),
    "soft_ce": lambda n, m, p, y, **kw: soft_target_cross_entropy(n, m, temperature=3.0, **kw),
    "dkl": lambda n, m, p, y, **kw: dkl_loss(n, m, wmse_weight=2.0, **kw),
    "ikl sample": lambda n, m, p, y, **kw: ikl_loss(n, m, wmse_weight=3.0, weight_temperature=5.0, **kw),
    "ikl class": lambda n, m, p, y, **kw: ikl_loss(n, m, p, y, temperature=4.0, **kw),
    "gkl sample": lambda n, m, p, y, **kw: gkl_loss(n, m, gamma=0.3, **kw),
    "gkl class": lambda n, m, p, y, **kw: gkl_loss(n, m, p, y, gamma=0.3, ce_weight=0.5, **kw),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("classes", [1, 2, 7, 40])
    def test_wmse_is_the_sum_over_pairs(self, classes):
        student, teacher = logits(5, classes)
        weight = torch.rand(5, classes, dtype=torch.float64)
        found = pairwise_wmse(student, teacher, weight, reduction="none")
        expected = plain_wmse(student, teacher, weight)
        close(found, expected)
        for mine, plain in zip(
            gradients(found.sum(), student, teacher), gradients(expected.sum(), student, teacher), strict=True
        ):
            close(mine, plain)

    @pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
    @pytest.mark.parametrize("normalization", ["batch", "weight"])
    @pytest.mark.parametrize("class_wise", [False, True])
    def test_terms(self, class_wise, normalization, gamma):
        student, teacher = logits(6, 9)
        target = torch.tensor([0, 8, 3, 3, 1, 0])
        means = class_means(9)
        found = ikl_terms(
            student,
            teacher,
            means if class_wise else None,
            target if class_wise else None,
            wmse_weight=5.0,
            ce_weight=0.7,
            gamma=gamma,
            temperature=4.0,
            weight_temperature=2.0,
            normalization=normalization,
        )
        weight = (means[target] if class_wise else (teacher / 2.0).softmax(1).detach()) ** gamma
        wmse = plain_wmse(student, teacher, weight).sum() / (
            6 if normalization == "batch" else (weight.sum(1) ** 2).sum()
        )
        soft_ce = plain_soft_ce(student, teacher, 4.0).mean()
        expected = 5.0 * wmse + 0.7 * soft_ce
        close(tuple(found), (expected, wmse, soft_ce))
        close(gradients(found.loss, student, teacher), gradients(expected, student, teacher))

    def test_losses_are_their_terms(self):
        student, teacher = logits(6, 9)
        target, means = torch.arange(6), class_means(9)
        options = {"wmse_weight": 3.0, "ce_weight": 0.1, "temperature": 2.0, "weight_temperature": 3.0}
        close(
            ikl_loss(student, teacher, means, target, **options),
            ikl_terms(student, teacher, means, target, **options).loss,
        )
        close(
            gkl_loss(student, teacher, gamma=0.2, **options),
            ikl_terms(student, teacher, gamma=0.2, normalization="weight", **options).loss,
        )

    def test_soft_cross_entropy_tempers_only_the_targets_on_request(self):
        student, teacher = logits(3, 4)
        found = soft_target_cross_entropy(student, teacher, temperature=3.0, student_temperature=1.0)
        close(found, F.cross_entropy(student, (teacher / 3).softmax(1)))

    def test_wmse_weight_broadcasts(self):
        student, teacher = logits(3, 4, 2)
        weight = torch.rand(4, 1)
        full = weight.double().expand(3, 4, 2)
        for normalization in ("batch", "weight"):
            close(
                pairwise_wmse(student, teacher, weight, normalization=normalization),
                pairwise_wmse(student, teacher, full, normalization=normalization),
            )
        close(pairwise_wmse(student, teacher, torch.tensor(2)), pairwise_wmse(student, teacher, full * 0 + 2))


class TestGradients:
    def test_dkl_has_those_of_kl(self):
        student, teacher = logits(6, 9)
        kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        close(gradients(dkl_loss(student, teacher), student, teacher), gradients(kl, student, teacher))

    def test_wmse_reaches_the_student_under_ikl_only(self):
        student, teacher = logits(6, 9)
        assert gradients(dkl_loss(student, teacher, ce_weight=0.0), student)[0].count_nonzero() == 0
        ikl = ikl_loss(student, teacher, ce_weight=0.0)
        to_student, to_teacher = gradients(ikl, student, teacher)
        assert to_student.abs().min() > 0
        close(to_student, -to_teacher)

    def test_soft_cross_entropy_reaches_the_student_only(self):
        student, teacher = logits(6, 9)
        to_student, to_teacher = gradients(ikl_loss(student, teacher, wmse_weight=0.0), student, teacher)
        assert to_student.abs().min() > 0
        assert to_teacher.count_nonzero() == 0

    def test_none_reaches_weights_or_class_means(self):
        student, teacher = logits(4, 5)
        weight = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
        means = class_means(5).requires_grad_()
        target = torch.arange(4)
        assert gradients(pairwise_wmse(student, teacher, weight), weight)[0].count_nonzero() == 0
        assert gradients(gkl_loss(student, teacher, means, target, gamma=0.5), means)[0].count_nonzero() == 0

    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)])
    @pytest.mark.parametrize("normalization", ["batch", "weight"])
    def test_gradcheck_of_wmse_twice(self, shape, normalization):
        student, teacher = logits(*shape, scale=1.0)
        weight = torch.rand(shape, dtype=torch.float64)
        function = functools.partial(pairwise_wmse, weight=weight, normalization=normalization, reduction="none")
        assert torch.autograd.gradcheck(function, (student, teacher), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (student, teacher))

    @pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"dkl"}))  # whose value depends on a detached student
    def test_gradcheck_on_the_student(self, name):
        student, teacher = logits(3, 4, scale=1.0)
        function = functools.partial(LOSSES[name], m=teacher.detach(), p=class_means(4), y=torch.tensor([1, 3, 0]))
        assert torch.autograd.gradcheck(lambda n: function(n, reduction="none"), (student,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda n: function(n), (student,))

    @each_loss
    def test_per_sample_gradients_of_functorch(self, loss):
        student, teacher = (x.detach() for x in logits(3, 4))
        means, target = class_means(4), torch.tensor([1, 3, 0])

        def single(n, m, y):
            return loss(n[None], m[None], means, y[None])

        found = torch.func.vmap(torch.func.grad(single))(student, teacher, target)
        expected = [torch.func.grad(single)(student[i], teacher[i], target[i]) for i in range(3)]
        close(found, torch.stack(expected))


class TestLimits:
    def test_generalised_at_gamma_one_is_improved(self):
        student, teacher = logits(6, 9)
        means, target = class_means(9), torch.arange(6)
        close(gkl_loss(student, teacher), ikl_loss(student, teacher))
        close(gkl_loss(student, teacher, means, target), ikl_loss(student, teacher, means, target))

    def test_gamma_zero_and_a_high_temperature_give_uniform_weights(self):
        student, teacher = logits(6, 9)
        half_variance = (student - teacher).var(1, correction=0).mean() / 2
        means = torch.eye(9, dtype=torch.float64)  # 0 to the power of 0 is 1
        close(gkl_loss(student, teacher, means, torch.arange(6), ce_weight=0.0, gamma=0.0), half_variance)
        close(gkl_loss(student, teacher, ce_weight=0.0, gamma=0.0), half_variance)
        hot = ikl_loss(student, teacher, ce_weight=0.0, weight_temperature=1e8)
        torch.testing.assert_close(hot, half_variance, rtol=1e-6, atol=0)

    def test_wmse_vanishes_as_the_weights_become_one_hot(self):
        student, teacher = logits(6, 9)
        cold = [ikl_terms(student, teacher, weight_temperature=t).wmse.item() for t in (1.0, 0.1, 0.01, 0.001)]
        assert cold == sorted(cold, reverse=True)
        assert cold[-1] < 1e-6 * cold[0]

    @pytest.mark.parametrize("row", ["zero", "one-hot"])
    @pytest.mark.parametrize("gamma", [0.3, 1.0])
    @pytest.mark.parametrize("loss", [ikl_loss, functools.partial(ikl_terms, normalization="weight")])
    def test_rows_without_pairs(self, loss, gamma, row):
        student, teacher = logits(3, 4, dtype=torch.float32)
        means = torch.zeros(4, 4) if row == "zero" else torch.eye(4)
        if loss is ikl_loss:
            value = ikl_loss(student, teacher, means, torch.arange(3), ce_weight=0.0)
        else:
            value = loss(student, teacher, means, torch.arange(3), gamma=gamma).wmse
        assert value.item() == 0
        for gradient in gradients(value, student, teacher):
            assert gradient.count_nonzero() == 0

    def test_power_of_an_underflowing_probability(self):
        student = torch.zeros(1, 2)
        teacher = torch.tensor([[0.0, -200.0]])
        found = ikl_terms(student, teacher, gamma=0.1).wmse
        expected = ikl_terms(student.double(), teacher.double(), gamma=0.1).wmse
        assert expected > 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)

    def test_one_class(self):
        student, teacher = logits(3, 1)
        target = torch.zeros(3, dtype=torch.long)
        for loss in LOSSES.values():
            value = loss(student, teacher, torch.ones(1, 1).double(), target)
            assert value.item() == 0
            assert gradients(value, student)[0].count_nonzero() == 0

    def test_identical_logits_leave_the_entropy(self):
        _, teacher = logits(5, 6)
        student = teacher.detach().clone().requires_grad_()
        probs = (teacher / 2).softmax(1)
        entropy = -(probs * probs.log()).sum(1).mean()
        terms = ikl_terms(student, teacher, ce_weight=3.0, temperature=2.0)
        close(terms.loss, 3 * entropy)
        assert gradients(terms.wmse, student)[0].count_nonzero() == 0

    @each_loss
    def test_empty_batch(self, loss):
        student, teacher = logits(0, 4)
        call = functools.partial(loss, student, teacher, class_means(4), torch.empty(0, dtype=torch.long))
        assert call(reduction="none").shape == (0,)
        assert call(reduction="sum").item() == 0
        assert math.isnan(call(reduction="mean").item())

    def test_zero_loss_weights(self):
        student, teacher = logits(3, 4)
        value = ikl_loss(student, teacher, wmse_weight=0.0, ce_weight=0.0)
        assert value.item() == 0
        assert all(g.count_nonzero() == 0 for g in gradients(value, student, teacher))


class TestShapes:
    @each_loss
    def test_positions_are_samples(self, loss):
        student, teacher = logits(3, 5, 2, 4)
        target = torch.randint(5, (3, 2, 4), generator=torch.Generator().manual_seed(1))
        means = class_means(5)
        flat = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
        for reduction in ("none", "mean", "sum"):
            found = loss(student, teacher, means, target, reduction=reduction)
            expected = loss(*flat, means, target.flatten(), reduction=reduction)
            close(found, expected.reshape(found.shape))
        assert loss(student, teacher, means, target, reduction="none").shape == (3, 2, 4)

    @each_loss
    def test_reductions_agree(self, loss):
        student, teacher = logits(6, 5)
        call = functools.partial(loss, student, teacher, class_means(5), torch.tensor([0, 1, 2, 3, 4, 0]))
        close(call(reduction="none").mean(), call(reduction="mean"))
        close(call(reduction="none").sum(), call(reduction="sum"))

    def test_target_of_any_integer_dtype(self):
        student, teacher = logits(3, 4)
        means, target = class_means(4), torch.tensor([2, 0, 3])
        expected = ikl_loss(student, teacher, means, target)
        for dtype in (torch.int32, torch.uint8):
            close(ikl_loss(student, teacher, means, target.to(dtype)), expected)


class TestPrecision:
    @pytest.mark.parametrize("size", [1.0, 0.01])
    @pytest.mark.parametrize("offsets", [(100.0, 100.0), (400.0, -100.0)])
    def test_offsets_do_not_cancel(self, offsets, size):
        _, base = logits(8, 50, dtype=torch.float32)
        change, _ = logits(8, 50, seed=1, dtype=torch.float32)
        student = (base + size * change).detach() + offsets[0]
        teacher = base.detach() + offsets[1]
        student.requires_grad_()
        exact = student.detach().double().requires_grad_()
        means, target = class_means(50, dtype=torch.float32), torch.arange(8)
        for gamma, class_wise in ((1.0, ()), (1.0, (means, target)), (0.3, ())):
            found = ikl_terms(student, teacher, *class_wise, gamma=gamma).wmse
            expected = ikl_terms(exact, teacher.double(), *class_wise, gamma=gamma).wmse
            torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
            (mine,), (reference,) = gradients(found, student), gradients(expected, exact)
            error = (mine.double() - reference).abs().max() / reference.abs().max()
            assert error < 3e-6

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @each_loss
    def test_half_precision_logits_are_computed_in_float32(self, loss, dtype):
        student, teacher = logits(4, 30, dtype=dtype)
        full = [x.detach().float().requires_grad_() for x in (student, teacher)]
        target = torch.arange(4)
        means = class_means(30, dtype=torch.float32)
        found, expected = loss(student, teacher, means, target), loss(*full, means, target)
        assert found.dtype == torch.float32
        assert found.item() == expected.item()
        gradient = gradients(found, student)[0]
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, gradients(expected, full[0])[0].to(dtype))

    @each_loss
    def test_autocast_changes_nothing(self, loss):
        student, teacher = logits(4, 30, dtype=torch.float32)
        means, target = class_means(30, dtype=torch.float32), torch.arange(4)
        expected = loss(student, teacher, means, target)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(student, teacher, means, target)
        assert found.dtype == torch.float32
        assert found.item() == expected.item()

    def test_mixed_dtypes_meet_in_the_widest(self):
        student, teacher = logits(4, 3, dtype=torch.bfloat16)
        assert ikl_loss(student, teacher.double()).dtype == torch.float64


finite = st.floats(-30, 30, width=32)


@st.composite
def problems(draw):
    positions, classes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(finite, min_size=classes, max_size=classes)
    matrices = [draw(st.lists(rows, min_size=positions, max_size=positions)) for _ in range(2)]
    means = draw(st.lists(rows, min_size=classes, max_size=classes))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=positions, max_size=positions))
    student, teacher, means = (torch.tensor(x, dtype=torch.float64) for x in (*matrices, means))
    order = draw(st.permutations(range(classes)))
    shifts = torch.tensor(draw(st.lists(st.tuples(finite, finite), min_size=positions, max_size=positions)))
    return student, teacher, means.softmax(1), torch.tensor(target), torch.tensor(order), shifts.double()


roughly = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)


class TestProperties:
    @settings(max_examples=40, deadline=None)
    @given(problems(), st.sampled_from(sorted(LOSSES)))
    def test_a_shift_of_a_row_changes_nothing(self, problem, name):
        student, teacher, means, target, _, shifts = problem
        before = LOSSES[name](student, teacher, means, target, reduction="none")
        after = LOSSES[name](student + shifts[:, :1], teacher + shifts[:, 1:], means, target, reduction="none")
        roughly(after, before)

    @settings(max_examples=40, deadline=None)
    @given(problems(), st.sampled_from(sorted(LOSSES)))
    def test_the_order_of_the_classes_does_not_matter(self, problem, name):
        student, teacher, means, target, order, _ = problem
        student.requires_grad_()
        mixed = student.detach()[:, order].requires_grad_()
        before = LOSSES[name](student, teacher, means, target)
        renamed = order.argsort()[target]
        after = LOSSES[name](mixed, teacher[:, order], means[order][:, order], renamed)
        roughly(after, before)
        roughly(gradients(after, mixed)[0], gradients(before, student)[0][:, order])

    @settings(max_examples=40, deadline=None)
    @given(problems())
    def test_wmse_is_not_negative(self, problem):
        student, teacher, means, target, _, _ = problem
        wmse = ikl_terms(student, teacher, means, target, reduction="none").wmse
        assert (wmse > -1e-12).all()  # rounding may leave a zero on either side


class TestRunsAnywhere:
    def test_the_guard_of_the_next_test_works(self):
        with NoSync(), pytest.raises(AssertionError):
            torch.ones(()).item()

    @each_loss
    def test_the_host_never_waits(self, loss):
        student, teacher = logits(4, 5)
        means, target = class_means(5), torch.arange(4)
        with NoSync():
            loss(student, teacher, means, target).backward()

    @each_loss
    def test_compiles_whole(self, loss):
        student, teacher = logits(4, 5)
        means, target = class_means(5), torch.arange(4)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")(student, teacher, means, target)
        plain = loss(student, teacher, means, target)
        close(compiled, plain)
        close(gradients(compiled, student, teacher), gradients(plain, student, teacher))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @each_loss
    def test_same_on_cuda_without_waiting(self, loss):
        student, teacher = logits(4, 5)
        means, target = class_means(5), torch.arange(4)
        there = [x.detach().cuda() for x in (student, teacher, means, target)]
        there[0].requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(*there)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain = loss(student, teacher, means, target)
        close(value.cpu(), plain)
        close(there[0].grad.cpu(), gradients(plain, student)[0])

    def test_import_loads_torch_only(self):
        heavy = "{'lightning', 'pytorch_lightning', 'torchmetrics', 'timm', 'kornia'}"
        code = f"import sys, lightning_methods.functional; sys.exit({heavy} & set(sys.modules) or 0)"
        subprocess.run([sys.executable, "-c", code], check=True)
