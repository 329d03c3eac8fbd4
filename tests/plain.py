"""What the engine's tests share: the smallest LightningModule, its data, a quiet `fit`, methods to attach, and the
same written by hand into the module's step.
"""

import copy
import functools
import warnings

import torch
import torch.nn.functional as F
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from lightning_methods.attach import Method, Teacher, address

IN, CLASSES, ROWS = 4, 3, 6


class Plain(LightningModule):
    """A small classifier that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches:
    """A loader over given batches; a list would be taken for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def pairs(count=3):
    """Batches (x, y)."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(ROWS, IN, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator))
        for _ in range(count)
    ]


ONE = pairs(1)


def trainer(*callbacks, **arguments):
    """A Trainer with everything noisy switched off."""
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def fit(module, *callbacks, batches=None, val=None, ckpt_path=None, **arguments):
    """Fits on batches (three pairs by default) from a fixed seed; returns the Trainer."""
    seed_everything(1, verbose=False)
    run = trainer(*callbacks, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)  # Lightning's advice on workers and the like
        run.fit(module, Batches(pairs() if batches is None else batches), val and Batches(val), ckpt_path=ckpt_path)
    return run


def weights(module):
    """A copy of a module's values."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Whether two modules or sets of weights agree bit for bit."""
    first, second = (weights(one) if isinstance(one, nn.Module) else one for one in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trace(module):
    """All that a method could leave on a module: attributes, submodules, modes, hooks."""
    return {
        "attributes": sorted(vars(module)),
        **{
            name: (
                part.training,
                sorted(part._modules),
                {kind: len(hooks) for kind, hooks in vars(part).items() if kind.endswith("_hooks")},
            )
            for name, part in module.named_modules()
        },
    }


def fitted_trace(module):
    """The trace of a copy that was fitted without any method: Lightning leaves some attributes itself."""
    module = copy.deepcopy(module)
    fit(module, max_steps=1)
    return trace(module)


class Probe(Method):
    """Keeps what its addresses give in each step; adds nothing."""

    def __init__(self, *addresses, name="probe", **arguments):
        super().__init__(name=name, **arguments)
        self.asked = [address(where) for where in addresses]
        self.seen = []

    def losses(self, step):
        self.seen.append([step[where] for where in self.asked])
        self.did_something = True  # no warning
        return {}


def seen(module, *addresses, batches=ONE, **arguments):
    """What addresses give in the last step."""
    probe = Probe(*addresses)
    fit(module, probe, batches=batches, **arguments)
    return probe.seen[-1]


class Penalty(Method):
    """Adds half the squared length of all the weights of `net`: every step has it, and it is easy to write by hand."""

    def __init__(self, weight=1.0, *, name="penalty", **arguments):
        super().__init__(name=name, weights={"l2": weight}, **arguments)

    def losses(self, step):
        return {"l2": penalty(step.module)}


def penalty(module):
    return sum(p.square().sum() for p in module.net.parameters()) / 2


class ByHand(Plain):
    """What `Plain` with `Penalty(weight)` should do, written into the step."""

    def __init__(self, weight=1.0, task_weight=1.0):
        super().__init__()
        self.weight, self.task_weight = weight, task_weight

    def training_step(self, batch, batch_idx):
        return self.task_weight * super().training_step(batch, batch_idx) + self.weight * penalty(self)


class CallsForward(Plain):
    """Calls its `forward` by name, which runs no hook."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.forward(x), y)


def assert_close(module, expected):
    """Two modules have the same weights, up to the order of float additions."""
    torch.testing.assert_close(weights(module), weights(expected))


def network(seed=5):
    """A network to teach with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(IN, 7), nn.ReLU(), nn.Linear(7, CLASSES))


class Taught(Method):
    """Squared distance between the logits of the module and of its teacher; keeps what further addresses give."""

    def __init__(self, source, *addresses, name="taught", logits="teacher", **arguments):
        super().__init__(name=name)
        self.teacher = Teacher(source, **arguments)
        self.student, self.logits = address("module"), address(logits)
        self.asked = [address(where) for where in addresses]
        self.seen = []

    def losses(self, step):
        self.seen.append([step[where] for where in self.asked])
        return {"mse": F.mse_loss(step[self.student], step[self.logits].to(step[self.student].dtype))}


class TaughtByHand(Plain):
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
    """A module has the weights that the default fit gives under a teacher, `network()` by default."""
    by_hand = TaughtByHand(network() if teacher is None else copy.deepcopy(teacher))
    fit(by_hand, **arguments)
    assert_close(module, by_hand)


class Spy(Callback):
    """Keeps what the wrapped step returns, before Lightning unpacks it."""

    def on_train_start(self, trainer, pl_module):
        self.step, self.returned = vars(pl_module).get("training_step"), []
        wrapped = pl_module.training_step

        @functools.wraps(wrapped)
        def spied(*args):
            self.returned.append(wrapped(*args))
            return self.returned[-1]

        pl_module.training_step = spied

    def on_train_end(self, trainer, pl_module):
        del vars(pl_module)["training_step"]
        if self.step is not None:
            vars(pl_module)["training_step"] = self.step


def returned(module, *methods):
    """What the step gives back, and the same without methods."""
    spies = []
    for attached in ((), methods):
        spies.append(Spy())
        fit(module(), *attached, spies[-1], batches=ONE)
    return spies[1].returned[0], spies[0].returned[0]
