"""A teacher that follows the student."""

import copy

import pytest
import torch
from plain import fit
from pytorch_lightning import LightningModule
from torch import nn

from lightning_methods.attach import Method, MomentumTeacher, address
from lightning_methods.attach.momentum import follow
from lightning_methods.testing import check_method


class MeanTeacher(Method):
    """The smallest method with a momentum teacher: consistency with it."""

    def __init__(self, inputs="module@input", momentum=0.9, log=True):
        super().__init__(name="mean", weights={"consistency": 2.0}, log=log)
        self.teacher = MomentumTeacher(inputs=inputs, momentum=momentum)
        self.student_logits, self.teacher_logits = address("module"), address("teacher")
        self.seen = []

    def losses(self, step):
        self.teacher.update(step.module)
        self.seen.append(copy.deepcopy(self.teacher.network.state_dict()))
        return {"consistency": (step[self.student_logits] - step[self.teacher_logits]).square().mean()}

    def state_dict(self):
        return {**super().state_dict(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.teacher.load_state_dict(state_dict["teacher"])


class Net(LightningModule):
    """Two arguments, noise in its input, and weights that move from the first step on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x, scale):
        return self.fc(x) * scale

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, target = batch
        return nn.functional.cross_entropy(self(x, torch.full((len(x), 1), 2.0).to(x)), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
DOUBLE = ["batch.0", lambda step: torch.full((len(step.batch[0]), 1), 2.0).to(step.batch[0])]


def test_a_method_with_a_momentum_teacher_passes_the_suite():
    class Quiet(MeanTeacher):
        def losses(self, step):
            terms = super().losses(step)
            self.seen.clear()
            return terms

    report = check_method(Quiet(inputs=DOUBLE), Net(), BATCH)
    assert {"resumes_exactly", "two_processes_equal_one", "checkpoint_is_plain", "leaves_no_trace"} <= set(
        report.passed
    )


def test_it_follows_by_the_formula():
    weights = []

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            weights.append(self.fc.weight.detach().clone())
            return super().training_step(batch, batch_idx)

    module, method = Watched(), MeanTeacher(inputs=DOUBLE, momentum=0.75)
    average = module.fc.weight.detach().clone()
    fit(module, method, batches=[BATCH] * 3)
    for weight, seen in zip(weights, method.seen, strict=True):
        average = 0.75 * average + 0.25 * weight
        torch.testing.assert_close(seen["fc.weight"], average)
    assert not torch.equal(average, weights[-1])
    assert [seen["steps"].item() for seen in method.seen] == list(range(1, len(weights) + 1))


def test_it_never_learns_by_gradients():
    module, method = Net(), MeanTeacher(inputs=DOUBLE, momentum=1.0)
    before = module.fc.weight.detach().clone()
    fit(module, method, batches=[BATCH] * 2)
    assert torch.equal(method.teacher.network.fc.weight, before)
    assert not any(parameter.requires_grad for parameter in method.teacher.network.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_input_for_each_argument():
    class Records(Net):
        def forward(self, x, scale):
            self.__dict__.setdefault("received", []).append((x, scale))
            return super().forward(x, scale)

    method = MeanTeacher(inputs=DOUBLE)
    fit(Records(), method, batches=[BATCH])
    x, scale = method.teacher.network.received[0]
    assert torch.equal(x, BATCH[0])
    assert (scale == 2).all()


def test_follow_leaves_alone_what_it_does_not_know():
    average, module = nn.Linear(2, 2), nn.Linear(2, 2)
    average.extra = nn.Parameter(torch.ones(1))
    follow(average, module, 0.0)
    assert torch.equal(average.weight, module.weight)
    assert average.extra == 1


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="`momentum`"):
        MomentumTeacher(momentum=momentum)


def test_repr():
    assert repr(MomentumTeacher(momentum=0.5)) == "MomentumTeacher(0.5)"
