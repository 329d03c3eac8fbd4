"""How a method attaches to a LightningModule: the contract (`Method`, `Step`) and addresses.

The guarantees, each with the test that holds it, are in the README beside this file.
"""

from lightning_methods.attach.address import AddressError, AddressLike, address, computed
from lightning_methods.attach.method import Method
from lightning_methods.attach.momentum import MomentumTeacher
from lightning_methods.attach.ramp import Ramp
from lightning_methods.attach.step import Step
from lightning_methods.attach.surgery import Parts
from lightning_methods.attach.teacher import Teacher

__all__ = [
    "AddressError",
    "AddressLike",
    "Method",
    "MomentumTeacher",
    "Parts",
    "Ramp",
    "Step",
    "Teacher",
    "address",
    "computed",
]
