"""Reading and writing inside every kind of container that batches and outputs are made of."""

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Mapping, MutableMapping
from enum import Enum
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_methods.attach import AddressError, address
from lightning_methods.attach.address import read_items, write_items

# --- the containers --------------------------------------------------------------------------------


class Opaque:
    """An object that nothing can look into, such as a graph library's."""

    __slots__ = ()


class GraphBatch(NamedTuple):
    graph: Any
    label: Any


@dataclasses.dataclass
class IterablePair:
    image: Any
    target: Any

    def __iter__(self):
        return iter((self.image, self.target))


@dataclasses.dataclass(slots=True)
class Slotted:
    image: Any
    target: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    target: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    image: Any
    target: Any


class ModelOutput(OrderedDict):
    """Keys that are attributes too, kept in step, as in transformers."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Encoding(UserDict):
    """Attributes that are looked up in the data, as in transformers' BatchEncoding."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class OwnMapping(MutableMapping):
    """Keeps its items in a dict of its own, which a shallow copy shares."""

    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class ReadOnly(Mapping):
    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Instances:
    """Attributes that live in a dict, as in detection libraries."""

    def __init__(self, **fields):
        object.__setattr__(self, "_fields_of_image", dict(fields))

    def __setattr__(self, name, value):
        self._fields_of_image[name] = value

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._fields_of_image[name]
        except KeyError:
            raise AttributeError(name) from None


class Views(list):
    """A list with a name."""

    def __init__(self, views, crop="random"):
        super().__init__(views)
        self.crop = crop


class Triple(tuple):
    __slots__ = ()


class Field(str, Enum):
    IMAGE = "image"


def image():
    return torch.zeros(2, 3)


X, Y = image(), torch.zeros(2, dtype=torch.long)

#: A batch, the address of X in it. Every other leaf must stay the same object when X is replaced.
CONTAINERS = {
    "the batch itself": (X, "batch"),
    "dict": ({"image": X, "target": Y}, "batch.image"),
    "dict with a dot in the key": ({"image.left": X, "target": Y}, r"batch.image\.left"),
    "dict with int keys": ({0: X, 1: Y}, "batch.0"),
    "dict with negative int keys": ({-1: X, 0: Y}, "batch.-1"),
    "dict with digits as text": ({"0": X, "1": Y}, "batch.0"),
    "dict with both, the text wins": ({0: Y, "0": X}, "batch.0"),
    "dict with enum keys": ({Field.IMAGE: X, "target": Y}, "batch.image"),
    "OrderedDict": (OrderedDict(image=X, target=Y), "batch.image"),
    "defaultdict": (defaultdict(list, image=X, target=Y), "batch.image"),
    "MappingProxyType": (MappingProxyType({"image": X, "target": Y}), "batch.image"),
    "read-only mapping": (ReadOnly(image=X, target=Y), "batch.image"),
    "mapping with a dict inside": (OwnMapping(image=X, target=Y), "batch.image"),
    "ModelOutput": (ModelOutput(image=X, target=Y), "batch.image"),
    "UserDict": (Encoding({"image": X, "target": Y}), "batch.image"),
    "list": ([Y, X], "batch.1"),
    "list from behind": ([X, Y], "batch.-2"),
    "list with a name": (Views([X, Y]), "batch.0"),
    "UserList": (UserList([Y, X]), "batch.1"),
    "deque": (deque([Y, X]), "batch.1"),
    "tuple": ((X, Y), "batch.0"),
    "nested tuple with None": ((Y, (None, X), None), "batch.1.1"),
    "tuple subclass": (Triple((X, Y, Y)), "batch.0"),
    "NamedTuple by name": (GraphBatch(Opaque(), X), "batch.label"),
    "NamedTuple by index": (GraphBatch(Opaque(), X), "batch.1"),
    "NamedTuple from behind": (GraphBatch(Opaque(), X), "batch.-1"),
    "iterable dataclass": (IterablePair(X, Y), "batch.image"),
    "slots dataclass": (Slotted(X, Y), "batch.image"),
    "frozen dataclass": (Frozen(X, Y), "batch.image"),
    "frozen slots dataclass": (FrozenSlotted(X, Y), "batch.image"),
    "plain object": (SimpleNamespace(image=X, target=Y), "batch.image"),
    "object with its attributes in a dict": (Instances(image=X, target=Y), "batch.image"),
    "list of dicts": ([{"image": Y}, {"image": X, "boxes": [None, Y]}], "batch.1.image"),
    "all of them": (
        {"views": (Y, [Frozen(Y, GraphBatch(Opaque(), {"deep": Slotted(Y, OwnMapping(x=[Y, X]))}))])},
        "batch.views.1.0.target.label.deep.target.x.-1",
    ),
}


def parts(value, prefix=()):
    """Every leaf by its place, and every container's type, by the plainest means."""
    if isinstance(value, Mapping):
        inner = dict(value.items())
    elif isinstance(value, (list, tuple, deque, UserList)):
        inner = dict(enumerate(value))
    elif dataclasses.is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, SimpleNamespace):
        inner = vars(value)
    elif isinstance(value, Instances):
        inner = value._fields_of_image
    else:
        return {prefix: value}
    found = {(*prefix, "type"): type(value)}
    for key, item in inner.items():
        found |= parts(item, (*prefix, key))
    return found


def same_parts(first, second):
    return first.keys() == second.keys() and all(first[place] is second[place] for place in first)


@pytest.mark.parametrize("name", CONTAINERS)
def test_reads(name):
    batch, text = CONTAINERS[name]
    assert read_items(batch, address(text), "batch") is X


@pytest.mark.parametrize("name", CONTAINERS)
def test_writes_a_new_container_of_the_same_type_and_leaves_the_old_one(name):
    batch, text = CONTAINERS[name]
    where = address(text)
    before, new = parts(batch), image()
    written = write_items(batch, where.items, new, where, "batch")
    assert same_parts(parts(batch), before), "the batch itself was changed"
    assert read_items(written, where, "batch") is new
    expected = {place: new if part is X else part for place, part in before.items()}
    if isinstance(batch, (MappingProxyType, ReadOnly)):
        expected[("type",)] = dict  # nothing of their own type can be written
    assert same_parts(parts(written), expected)


def test_writing_keeps_what_else_a_container_carries():
    views = write_items(Views([X, Y], crop="centre"), ("0",), Y, address("batch.0"), "batch")
    assert views.crop == "centre"
    counts = write_items(defaultdict(list, image=X), ("image",), Y, address("batch.image"), "batch")
    assert counts["other"] == []
    output = write_items(ModelOutput(image=X), ("image",), Y, address("batch.image"), "batch")
    assert output.image is Y
    assert output["image"] is Y
    encoding = write_items(Encoding(image=X), ("image",), Y, address("batch.image"), "batch")
    assert encoding.image is Y


def test_torchs_own_tuples():
    packed = pack_sequence([torch.ones(3), torch.zeros(2)])
    where = address("batch.data")
    written = write_items(packed, where.items, packed.data * 2, where, "batch")
    assert type(written) is type(packed)
    assert torch.equal(written.data, packed.data * 2)
    assert written.batch_sizes is packed.batch_sizes
    top = torch.arange(6).view(2, 3).max(1)
    assert read_items(top, address("output.indices"), "output") is top.indices
    assert read_items(top, address("output.1"), "output") is top.indices
    assert type(write_items(top, ("1",), Y, address("batch.1"), "batch")) is type(top)


def test_reading_a_wrong_key_of_a_defaultdict_does_not_make_it():
    batch = defaultdict(list, image=X)
    with pytest.raises(AddressError, match="Did you mean 'image'"):
        read_items(batch, address("batch.imge"), "batch")
    assert list(batch) == ["image"]


# --- errors inside a value -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ({"image": X, "label": Y}, "batch.imag",
         "Address 'batch.imag': batch is a dict of 2, which has no 'imag'. It has 'image', 'label'. "
         "Did you mean 'image'?"),
        ({"a": {"image": X}}, "batch.a.imgae",
         "Address 'batch.a.imgae': batch.a is a dict of 1, which has no 'imgae'. It has 'image'. "
         "Did you mean 'image'?"),
        ((X, Y), "batch.2", "Address 'batch.2': batch is a tuple of 2, which has no '2'. It has '0', '1'."),
        ((X, Y), "batch.-3", "Address 'batch.-3': batch is a tuple of 2, which has no '-3'. It has '0', '1'."),
        ((X, Y), "batch.image", "Address 'batch.image': batch is a tuple of 2, which has no 'image'. It has '0', '1'."),
        (GraphBatch(Opaque(), Y), "batch.lable",
         "Address 'batch.lable': batch is a GraphBatch of 2, which has no 'lable'. It has 'graph', 'label'. "
         "Did you mean 'label'?"),
        (GraphBatch(Opaque(), Y), "batch.graph.x", "Address 'batch.graph.x': batch.graph is an Opaque, "
         "which has no 'x'."),
        (Slotted(X, Y), "batch.imag", "Address 'batch.imag': batch is a Slotted, which has no 'imag'. "
         "It has 'image', 'target'. Did you mean 'image'?"),
        (IterablePair(X, Y), "batch.0", "Address 'batch.0': batch is an IterablePair, which has no '0'. "
         "It has 'image', 'target'."),
        (SimpleNamespace(image=X, _cache=1), "batch.imag", "Address 'batch.imag': batch is a SimpleNamespace, "
         "which has no 'imag'. It has 'image'. Did you mean 'image'?"),
        ({0: X, 1: Y}, "batch.2", "Address 'batch.2': batch is a dict of 2, which has no '2'. It has '0', '1'."),
        (MappingProxyType({"image": X}), "batch.imag", "Address 'batch.imag': batch is a mappingproxy of 1, "
         "which has no 'imag'. It has 'image'. Did you mean 'image'?"),
        ({}, "batch.x", "Address 'batch.x': batch is a dict of 0, which has no 'x'."),
        ((X, None), "batch.1.x", "Address 'batch.1.x': batch.1 is None, which has no 'x'."),
        (["text"], "batch.0.0", "Address 'batch.0.0': batch.0 is a str, which has no '0'."),
    ],
)  # fmt: skip
def test_names_what_was_found_and_the_nearest(value, text, expected):
    with pytest.raises(AddressError) as error:
        read_items(value, address(text), "batch")
    assert str(error.value) == expected


@pytest.mark.parametrize("item", ["0", "-1", "shape", "T"])
def test_a_tensor_has_no_items(item):
    with pytest.raises(AddressError, match=r"batch\.0 is a Tensor of shape \[2, 3\] and dtype float32") as error:
        read_items((X,), address(f"batch.0.{item}"), "batch")
    assert "It has" not in str(error.value)
    with pytest.raises(AddressError, match="is a Tensor"):
        write_items((X,), ("0", item), Y, address(f"batch.0.{item}"), "batch")


def test_items_of_a_captured_value_are_named_after_a_colon():
    where = address("module.clip:a.b")
    with pytest.raises(AddressError, match=r"module\.clip:a is a dict of 1, which has no 'b'"):
        read_items({"a": {"c": X}}, where, "module.clip")


def test_many_names_are_cut():
    batch = {f"key{index:02}": X for index in range(40)}
    with pytest.raises(AddressError, match="and 28 more"):
        read_items(batch, address("batch.nothing"), "batch")


def test_writing_needs_something_to_replace():
    with pytest.raises(AddressError, match="Did you mean 'image'"):
        write_items({"image": X}, ("imag",), Y, address("batch.imag"), "batch")


def test_writing_to_a_computed_attribute_says_so():
    class Half:
        half = property(lambda self: X)

    with pytest.raises(AddressError, match=r"batch is a Half, whose 'half' cannot be set"):
        write_items(Half(), ("half",), Y, address("batch.half"), "batch")
