"""A frozen network beside the module: what it is given and gives, and that it stays out of everything."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import (
    CLASSES,
    IN,
    ONE,
    Batches,
    Plain,
    Probe,
    Taught,
    assert_taught,
    fit,
    network,
    pairs,
    same,
    trace,
    trainer,
    weights,
)
from pytorch_lightning import Callback
from torch import nn

from lightning_methods.attach import AddressError, Method

# --- it is not part of the student -----------------------------------------------------------------


class WithParts(Plain):
    def __init__(self):
        super().__init__()
        self.other = network()


def shares_a_parameter(student):
    teacher = network()
    teacher[0].weight = student.other[0].weight
    return teacher


def shares_storage(student):
    teacher = network()
    teacher[0].weight = nn.Parameter(student.other[0].weight.detach())
    return teacher


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda student: student, "The `teacher` is the student itself or one of its submodules"),
        (lambda student: student.other, "The `teacher` is the student itself or one of its submodules"),
        (lambda student: nn.Sequential(student.other), "shares its parameter '0.0.weight' with the student"),
        (shares_a_parameter, "shares its parameter '0.weight' with the student.*copy.deepcopy"),
        (shares_storage, "shares its parameter '0.weight' with the student"),
    ],
)
def test_a_teacher_that_would_learn_is_refused(teacher, message):
    module = WithParts()
    with pytest.raises(ValueError, match=message):
        fit(module, Taught(teacher(module)))
    assert "training_step" not in vars(module)
    fit(module, Taught(copy.deepcopy(module.other)))


def test_it_is_in_none_of_the_students_parts_and_does_not_learn(tmp_path):
    looked = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            own = {id(p) for p in teacher.parameters()}
            listed = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            looked.append((own & listed, own & {id(p) for p in pl_module.parameters()}))
            assert teacher not in list(pl_module.modules())
            assert list(pl_module.state_dict()) == list(Plain().state_dict())
            trainer.save_checkpoint(path)

    path, teacher = tmp_path / "some.ckpt", network()
    method = Taught(teacher, "teacher", "teacher.0")
    fit(Plain(), method, Looks())
    assert looked == [(set(), set())] * 3
    assert all(not value.requires_grad for value in method.seen[0])
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters()), "its own flags stay"
    assert same(teacher, network())
    content = torch.load(path)
    assert list(content["state_dict"]) == list(Plain().state_dict())
    assert content["callbacks"][method.state_key]["helpers"] == {}


class Recording(nn.Module):
    """Notes in which mode it is called."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.norm = nn.BatchNorm1d(CLASSES)
        self.drop = nn.Dropout(0.5)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.norm.training, self.drop.training))
        return self.drop(self.norm(self.net(x)))


def test_eval_mode_is_asserted_in_every_step_and_the_modes_given_back():
    class Trains(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            teacher.train() if batch_idx == 1 else teacher.norm.train()

    teacher = Recording()
    teacher.norm.eval()
    before, buffers = trace(teacher), weights(teacher)
    fit(Plain(), Taught(teacher), Trains())
    assert teacher.modes == [(False, False, False)] * 3
    assert same(teacher, buffers), "batch norm would have counted"
    assert trace(teacher) == before
    assert (teacher.training, teacher.norm.training, teacher.drop.training) == (True, False, True)


@pytest.mark.parametrize("fails", [True, False])
def test_hooks_and_modes_are_given_back(fails):
    class Fails(Taught):
        def losses(self, step):
            super().losses(step)
            if fails:
                raise RuntimeError("on purpose")
            return {}

    teacher = network()
    before = trace(teacher)
    method = Fails(teacher, "teacher.0", "teacher.1@input")
    try:
        fit(Plain(), method)
    except RuntimeError:
        assert fails
    assert trace(teacher) == before
    fit(Plain(), Taught(teacher, "teacher.2"))
    assert trace(teacher) == before


def test_it_is_moved_to_the_strategys_device_and_back():
    moves = []

    class Moves(nn.Sequential):
        def to(self, *args):
            moves.append(args)
            return super().to(*args)

    teacher = Moves(*network())
    fit(Plain(), Taught(teacher))
    cpu = torch.device("cpu")
    assert moves == [(cpu,), (cpu,)]


def test_random_state_is_untouched():
    class Noisy(Plain):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    class Silent(Taught):
        def losses(self, step):
            super().losses(step)
            return {}

    plain, attached = Noisy(), Noisy()
    fit(plain)
    state = torch.get_rng_state()
    fit(attached, Silent(lambda: nn.Sequential(nn.Linear(IN, CLASSES), nn.Dropout(0.5))))
    assert same(plain, attached)
    assert torch.equal(torch.get_rng_state(), state)


# --- what it is given ------------------------------------------------------------------------------


class Augments(Plain):
    """Changes the images inside its step, where no batch address can see it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + torch.randn_like(x), y), batch_idx)


def test_inputs_of_the_student_and_transform():
    method = Taught(network(), "module@input", "teacher@input", inputs="module@input", transform=lambda x: 2 * x)
    fit(Augments(), method)
    for student, teacher in method.seen:
        assert torch.equal(teacher, 2 * student)
        assert not torch.equal(student, ONE[0][0])


def test_rewrite_feeds_the_teacher_another_batch():
    class Marks(Method):
        """A rewriting method before: the teacher sees what it made."""

        def rewrite(self, step):
            step["batch.image"] = step["batch.image"] + 1

    class Dicts(Plain):
        def training_step(self, batch, batch_idx):
            self.got = batch
            return F.cross_entropy(self(batch["image"]), batch["target"])

    x, y = ONE[0]
    module = Dicts()
    method = Taught(
        network(), "teacher@input", "batch.image", inputs="batch.image", rewrite={"batch.image": "batch.clean"}
    )
    batch = {"image": x, "clean": x * 3, "target": y}
    fit(module, Marks(name="marks"), method, batches=[batch])
    teacher, student = method.seen[0]
    assert torch.equal(teacher, x * 3)
    assert torch.equal(student, x + 1)
    assert torch.equal(module.got["image"], x + 1)
    assert batch["image"] is x


def test_rewrite_with_a_function_and_with_a_captured_value():
    whole = Taught(network(), "teacher@input", inputs="batch.0", rewrite={"batch.0": lambda step: step["batch.0"] * 0})
    inner = Taught(network(), "teacher@input", "module.net.0@input", name="inner", rewrite={
        "batch.0": "module.net.0@input"})  # fmt: skip
    fit(Augments(), whole, inner, batches=ONE)
    assert torch.equal(whole.seen[0][0], torch.zeros_like(ONE[0][0]))
    assert inner.seen[0][0] is inner.seen[0][1]


def test_a_wrong_place_for_the_teacher_is_an_address_error():
    with pytest.raises(AddressError, match="batch is a tuple of 2, which has no 'clean'"):
        fit(Plain(), Taught(network(), rewrite={"batch.0": "batch.clean"}))
    teacher = network()
    before = trace(teacher)
    with pytest.raises(AddressError, match=r"'teacher' \(Sequential\) has no .*'head'; it has '0', '1', '2'"):
        fit(Plain(), Taught(teacher, "teacher.0", "teacher.head"))
    assert trace(teacher) == before
    with pytest.raises(AddressError, match=r"'module' \(Plain\) has no .*'nte'.*Did you mean 'net'"):
        fit(Plain(), Taught(network(), inputs="module.nte"))


# --- what it gives ---------------------------------------------------------------------------------


def test_taps_on_both_sides():
    teacher = network()
    method = Taught(teacher, "module.net.0", "teacher.0", "teacher.2@input", "teacher.2", "teacher", "teacher.0.weight")
    fit(Plain(), method, batches=ONE)
    student, hidden, received, head, logits, weight = method.seen[0]
    x = ONE[0][0]
    assert student.shape == (6, 8)
    assert student.requires_grad
    with torch.no_grad():
        assert torch.equal(hidden, teacher[0](x))
        assert torch.equal(received, teacher[0](x).relu())
    assert head is logits
    assert weight is teacher[0].weight


def test_items_of_what_it_returns():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return {"logits": self.net(x), "more": (x, None)}

    module, method = Plain(), Taught(Returns(), "teacher:more.0", logits="teacher:logits")
    fit(module, method)
    assert_taught(module)
    assert torch.equal(method.seen[0][0], pairs()[0][0])


def test_a_part_that_was_not_called():
    class Lazy(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    with pytest.raises(AddressError, match=r"'teacher.1' gave no value, because it was not called in this step"):
        fit(Plain(), Taught(Lazy(network(), nn.Linear(1, 1)), "teacher.1"))


def test_it_runs_once_a_step_however_many_addresses_read_it_and_not_at_all_if_none_does():
    calls = []
    teacher = network()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit(Plain(), Taught(teacher, "teacher.0", "teacher.1", "teacher", "teacher.2"))
    assert len(calls) == 3
    fit(Plain(), Probe("module"))
    assert len(calls) == 3


def test_two_methods_share_a_teacher():
    calls = []
    teacher = network()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    first, second = Taught(teacher, "teacher.0"), Taught(network(), "teacher.2", name="second")
    second.teacher = first.teacher
    before = trace(teacher)
    module = Plain()
    fit(module, first, second)
    assert len(calls) == 3, "it runs once a step for both"
    assert first.seen[0][0].shape == (6, 7)
    assert second.seen[0][0].shape == (6, CLASSES)
    assert trace(teacher) == before


def test_two_methods_have_teachers_of_their_own():
    first, second = Taught(network(1), "teacher"), Taught(network(2), "teacher", name="second")
    fit(Plain(), first, second, batches=ONE)
    x = ONE[0][0]
    assert torch.equal(first.seen[0][0], network(1)(x))
    assert torch.equal(second.seen[0][0], network(2)(x))


def test_a_teacher_in_rewrite():
    class Mixes(Taught):
        """Adds what the teacher says of the clean images to them, before the step."""

        def rewrite(self, step):
            step["batch.0"] = step["batch.0"] + step[self.logits].sum()

    method = Mixes(network(), "module@input", "teacher")
    fit(Plain(), method, batches=ONE)
    x = ONE[0][0]
    mixed, logits = method.seen[0]
    with torch.no_grad():
        assert torch.equal(mixed, x + network()(x).sum())
        assert torch.equal(logits, network()(mixed)), "what it said before was about another batch"


# --- precision and processes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "student", "teacher"),
    [
        ("64-true", torch.float64, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.bfloat16),
        ("32-true", torch.float32, torch.float32),
    ],
)
def test_precision(precision, student, teacher):
    method = Taught(network(), "module", "teacher", "teacher.0")
    fit(Plain(), method, precision=precision)
    assert [value.dtype for value in method.seen[0]] == [student, teacher, teacher]
    assert all(p.dtype == torch.float32 for p in method.teacher.network.parameters())


def test_integers_reach_the_teacher_as_they_are():
    class Tokens(Plain):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, IN)

        def forward(self, x):
            return super().forward(self.words(x))

    method = Taught(nn.Sequential(nn.Embedding(9, IN), nn.Linear(IN, CLASSES)), "teacher@input")
    fit(Tokens(), method, batches=[(torch.arange(6), ONE[0][1])], precision="64-true")
    assert method.seen[0][0].dtype == torch.int64


def test_two_processes_have_the_teacher_too():
    class Halves(Batches):
        def __iter__(self):
            rank = torch.distributed.get_rank()
            yield from (tuple(part.chunk(2)[rank] for part in batch) for batch in self.batches)

    module = Plain()
    run = trainer(Taught(network), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    run.fit(module, Halves(pairs()))
    assert_taught(module)


def test_a_method_with_a_teacher_can_be_copied():
    method = Taught(network(), "teacher.0")
    fit(Plain(), method)
    copied, module = copy.deepcopy(method), Plain()
    assert copied.teacher.network is not method.teacher.network
    fit(module, copied)
    assert_taught(module)
