"""A frozen network beside the module: where it comes from, what it is given, and that it stays out of everything."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import CLASSES, IN, Batches, Plain, Probe, fit, fitted_trace, pairs, same, trace, trainer, weights
from pytorch_lightning import Callback
from torch import nn

from lightning_methods.attach import AddressError, Method, Teacher, address
from lightning_methods.attach.teacher import read_weights

ONE = pairs(1)


def network(seed=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(IN, 7), nn.ReLU(), nn.Linear(7, CLASSES))


class Taught(Method):
    """Squared distance between the logits of the module and of its teacher."""

    def __init__(self, source, *addresses, name="taught", logits="teacher", **arguments):
        super().__init__(name=name)
        self.teacher = Teacher(source, **arguments)
        self.student, self.logits = address("module"), address(logits)
        self.asked = [address(where) for where in addresses]
        self.seen = []

    def losses(self, step):
        self.seen.append([step[where] for where in self.asked])
        return {"mse": F.mse_loss(step[self.student], step[self.logits].to(step[self.student].dtype))}


class ByHand(Plain):
    """The same written into the module."""

    def __init__(self, teacher):
        super().__init__()
        self.others = [teacher.eval()]  # a list keeps it out of the module

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            target = self.others[0](x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, target)


def assert_taught(module, teacher=None, **arguments):
    by_hand = ByHand(network() if teacher is None else copy.deepcopy(teacher))
    fit(by_hand, **arguments)
    torch.testing.assert_close(weights(module), weights(by_hand))


# --- where it comes from ---------------------------------------------------------------------------


class Lit(Plain):
    """A LightningModule as a teacher."""

    def __init__(self):
        super().__init__()
        self.net = network()


@pytest.mark.parametrize("source", [network, network(), Lit, Lit()], ids=["function", "module", "class", "Lightning"])
def test_a_module_or_a_function_that_makes_one(source):
    module, method = Plain(), Taught(source)
    fit(module, method)
    assert_taught(module)
    assert isinstance(method.teacher.network, nn.Module)
    assert method.teacher.network is method.teacher.network


def test_a_function_is_called_when_training_begins_and_once():
    calls = []

    def make():
        calls.append(1)
        return network()

    method = Taught(make)
    assert not calls
    for _ in range(2):
        fit(Plain(), method)
    assert len(calls) == 1


@pytest.mark.parametrize("source", ["resnet18", "tim:resnet18", 3, None])
def test_refuses_other_sources(source):
    with pytest.raises(ValueError, match="Expected `teacher` to be a module, a function or 'timm:NAME', but got"):
        Teacher(source)


def test_a_function_must_return_a_module():
    module = Plain()
    with pytest.raises(ValueError, match="Expected the `teacher` function to return a module, but got a dict of 1"):
        fit(module, Taught(lambda: {"net": 1}))
    assert "training_step" not in vars(module)


# --- checkpoints -----------------------------------------------------------------------------------


def prefixed(prefix, module=None):
    state = (network() if module is None else module).state_dict()
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (prefixed(""), None),
        ({"state_dict": prefixed(""), "epoch": 3, "callbacks": {}}, None),
        ({"model": prefixed(""), "args": [1, 2]}, None),
        ({"state_dict": {**prefixed("net."), "loss.weight": torch.ones(2)}}, "net."),
        ({"model": prefixed("module.")}, None),
        (prefixed("module."), None),
        ({"state_dict": {**prefixed("model.module."), "model.other": torch.ones(1)}}, "model.module."),
        ({"state_dict": {**prefixed("model.module."), "ema.x": torch.ones(1)}}, "model."),
    ],
)
def test_checkpoint_files_of_every_kind(tmp_path, content, key):
    path, module = tmp_path / "teacher.ckpt", Plain()
    torch.save(content, path)
    fit(module, Taught(lambda: network(seed=6), checkpoint=path, key=key))
    assert_taught(module)


def test_a_lightning_checkpoint_of_a_lightning_module(tmp_path):
    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)

    path, trained, module, other = tmp_path / "lit.ckpt", Lit(), Plain(), Plain()
    fit(trained, Saves())
    fit(module, Taught(Lit, checkpoint=path))
    assert_taught(module, trained.net)
    fit(other, Taught(lambda: network(6), checkpoint=str(path), key="net."))
    assert same(other, module)


@pytest.fixture(scope="module")
def timm_teacher():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=CLASSES, in_chans=2).eval()


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["bare", "state_dict"])
def test_timm_takes_its_classes_and_channels_from_the_checkpoint(tmp_path, timm_teacher, wrap):
    path = tmp_path / "resnet.pt"
    torch.save(wrap(timm_teacher.state_dict()), path)
    loaded = Teacher("timm:resnet10t", checkpoint=path).network
    assert loaded.num_classes == CLASSES
    assert loaded.conv1[0].in_channels == 2
    x = torch.randn(2, 2, 32, 32)
    assert torch.equal(loaded.eval()(x), timm_teacher(x))


def test_timm_as_a_teacher_in_a_fit(tmp_path, timm_teacher):
    class Images(Plain):
        def forward(self, x):
            return self.net(x.mean((2, 3)).repeat(1, 2))

    path = tmp_path / "resnet.pt"
    torch.save({"state_dict": {f"net.{name}": value for name, value in timm_teacher.state_dict().items()}}, path)
    method = Taught("timm:resnet10t", "teacher.layer4", "teacher.fc@input", "teacher", checkpoint=path, key="net.")
    images = torch.randn(3, 2, 32, 32)
    fit(Images(), method, batches=[(images, torch.tensor([0, 1, 2]))])
    layer, pooled, logits = method.seen[0]
    assert layer.shape == (3, 512, 1, 1)
    torch.testing.assert_close(pooled, layer.flatten(1))
    assert torch.equal(logits, timm_teacher(images))


def test_an_unknown_timm_name_proposes_others():
    with pytest.raises(ValueError, match=r"timm has no model 'resnet10'\. It has .*resnet10t"):
        fit(Plain(), Taught("timm:resnet10"))


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, {}, r"`teacher_checkpoint`: there is no file .*teacher\.ckpt"),
        (b"not a checkpoint", {}, r"`teacher_checkpoint`: .*teacher\.ckpt cannot be read as a checkpoint"),
        (b"", {}, r"`teacher_checkpoint`: .*teacher\.ckpt cannot be read as a checkpoint"),
        ([1, 2], {}, r"`teacher_checkpoint`: .*teacher\.ckpt holds a list of 2; expected a state dict"),
        ({"a": 1}, {}, r"`teacher_checkpoint`: .*teacher\.ckpt holds a dict of 1; expected a state dict"),
        (prefixed("net."), {"key": "model."}, r"`teacher_key`: no key of .*teacher\.ckpt begins with 'model\.'; the "
         r"first is 'net\.0\.weight'"),
        (prefixed("net."), {}, r"`teacher_checkpoint`: .*teacher\.ckpt does not fit Sequential: (?s:.*)0\.weight"),
        (prefixed("", Plain().net), {}, r"`teacher_checkpoint`: .*teacher\.ckpt does not fit Sequential: (?s:.*)size"),
        ({**prefixed(""), "extra": torch.ones(1)}, {}, r"teacher\.ckpt does not fit Sequential: (?s:.*)extra"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_is_named_before_training_and_leaves_no_trace(tmp_path, content, arguments, message):
    path, module = tmp_path / "teacher.ckpt", Plain()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before, given = fitted_trace(module), network()
    with pytest.raises(ValueError, match=message):
        fit(module, Taught(given, checkpoint=path, **arguments))
    after = trace(module)
    assert {name: after[name] for name in after if name != "attributes"} == {
        name: before[name] for name in before if name != "attributes"
    }
    assert "training_step" not in vars(module)


def test_a_checkpoint_holding_code_is_not_run(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": prefixed(""), "hook": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_weights(path)
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return Evil.run, ()

    @staticmethod
    def run():
        Evil.ran = True


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
