"""One package for both of Lightning's: `pytorch_lightning` and `lightning.pytorch`."""

import pytest

OTHER = {"pytorch_lightning": "lightning.pytorch", "lightning.pytorch": "pytorch_lightning"}

NET = """
import torch, warnings
import torch.nn.functional as F
import {package} as used
warnings.filterwarnings("ignore")

class Net(used.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class ByHand(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.5 * self.net.weight.square().sum()

class Batches:
    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            yield torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)

def fit(module, *callbacks):
    used.seed_everything(1, verbose=False)
    trainer = used.Trainer(
        callbacks=list(callbacks), max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )
    trainer.fit(module, Batches())
    return trainer
"""

METHOD = """
from lightning_methods.attach import Method, address

class Penalty(Method):
    def __init__(self, weight: float = 1.0):
        super().__init__(name="penalty", weights={"l2": weight})
        self.logits = address("module.net")
    def helpers(self):
        return {"unused": torch.nn.Linear(1, 1).requires_grad_(False)}
    def losses(self, step):
        assert step[self.logits].shape == (6, 3)
        return {"l2": step.module.net.weight.square().sum()}
"""

TRAINS = """
attached, by_hand = Net(), ByHand()
trainer = fit(attached, Penalty(0.5))
fit(by_hand)
assert torch.allclose(attached.net.weight, by_hand.net.weight), "the term did not train"
assert not torch.allclose(attached.net.weight, Net().net.weight)
assert set(trainer.callback_metrics) == {"penalty/l2", "penalty/loss"}, trainer.callback_metrics
assert "training_step" not in vars(attached)
"""


@pytest.mark.parametrize("package", OTHER)
def test_the_base_class_is_that_of_the_package_in_use(fresh, package):
    fresh[package](f"""
import sys
import {package} as used
import lightning_methods.attach, lightning_methods.callbacks, lightning_methods.mixins, lightning_methods.datamodules
from lightning_methods.attach import Method, _lightning as ours
assert issubclass(Method, used.Callback)
assert ours.Callback is used.Callback
assert ours.CallbackType is used.Callback
assert ours.LightningDataModule is used.LightningDataModule
assert issubclass(ours.MisconfigurationException, Exception)
assert "{OTHER[package]}" not in sys.modules, "the other package was imported for nothing"
""")


@pytest.mark.parametrize("package", OTHER)
def test_methods_train_in_the_package_in_use(fresh, package):
    fresh[package](NET.format(package=package) + METHOD + TRAINS)


@pytest.mark.parametrize("package", OTHER)
def test_with_both_imported_a_callback_is_one_of_both(fresh, package):
    fresh[package](
        f"import {OTHER[package]} as other\n"
        + NET.format(package=package)
        + METHOD
        + TRAINS
        + """
assert issubclass(Penalty, used.Callback)
assert issubclass(Penalty, other.Callback)
from jsonargparse import ArgumentParser
item = {"class_path": "lightning_methods.callbacks.IKLDistillation", "init_args": {"teacher": "timm:resnet10t"}}
for package in (used, other):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=package.Callback)
    parser.parse_object({"callback": item})
"""
    )


@pytest.mark.parametrize("package", OTHER)
def test_a_callback_of_the_other_package_trains_here(fresh, package):
    """Ours is imported beside one Lightning; then a module and a Trainer of the other."""
    fresh[OTHER[package]](
        "import torch\n"
        + METHOD
        + NET.format(package=package)
        + TRAINS
        + "assert not isinstance(Penalty(), used.Callback)\n"
    )


@pytest.mark.parametrize("package", OTHER)
def test_lightningcli_takes_the_callbacks(fresh, package):
    fresh[package](
        NET.format(package=package)
        + f"""
from {package}.cli import LightningCLI
from lightning_methods.callbacks import IKLDistillation
cli = LightningCLI(Net, run=False, save_config_callback=None, args=[
    "--trainer.callbacks+=lightning_methods.callbacks.IKLDistillation",
    "--trainer.callbacks.teacher=timm:resnet10t",
    "--trainer.callbacks.class_wise=false",
    "--trainer.logger=false",
])
found = [callback for callback in cli.trainer.callbacks if isinstance(callback, IKLDistillation)]
assert len(found) == 1
assert not found[0].class_wise
"""
    )
