"""Where a teacher comes from: modules, functions, timm names and checkpoint files."""

import pytest
import torch
from plain import (
    CLASSES,
    Plain,
    Taught,
    assert_taught,
    fit,
    fitted_trace,
    network,
    same,
    trace,
)
from pytorch_lightning import Callback
from torch import nn

from lightning_methods.attach import Teacher
from lightning_methods.attach.teacher import read_weights

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
