"""The grammar of addresses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_methods.attach import AddressError, address, computed
from lightning_methods.attach.address import Address, Computed, describe, flat

# --- the grammar -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("batch", Address("batch")),
        ("output", Address("output")),
        ("module", Address("module")),
        ("teacher", Address("teacher")),
        ("batch.0", Address("batch", items=("0",))),
        ("batch.-1", Address("batch", items=("-1",))),
        ("batch.targets.boxes", Address("batch", items=("targets", "boxes"))),
        ("output.logits", Address("output", items=("logits",))),
        ("module.net.0", Address("module", ("net", "0"))),
        ("module:0", Address("module", items=("0",))),
        ("module.clip:image_embeds", Address("module", ("clip",), ("image_embeds",))),
        ("module.clip:a.b", Address("module", ("clip",), ("a", "b"))),
        ("module@input", Address("module", received=True)),
        ("module.head@input", Address("module", ("head",), received=True)),
        ("module#0", Address("module", call=0)),
        ("module.encoder#-2", Address("module", ("encoder",), call=-2)),
        ("teacher.a@input#1:x.0", Address("teacher", ("a",), ("x", "0"), received=True, call=1)),
        (r"batch.a\.b", Address("batch", items=("a.b",))),
        (r"batch.a\:b\@c\#d\\e", Address("batch", items=("a:b@c#d\\e",))),
        (r"batch.\a", Address("batch", items=("a",))),  # an escape that was not needed
        (r"module.a\.b:c\:d", Address("module", ("a.b",), ("c:d",))),
        ("batch.two words", Address("batch", items=("two words",))),
        ("batch.line\nbreak", Address("batch", items=("line\nbreak",))),
        ("batch.über.画像", Address("batch", items=("über", "画像"))),
        ("batch.input", Address("batch", items=("input",))),
        ("module.input", Address("module", ("input",))),
    ],
)
def test_parses(text, parsed):
    assert address(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", ".", "batch.", ".batch", "batch..x", "batch.a\\", "module.", "module:", "module#", "module#x", "module#0.5",
     "module@inputs", "module@output", "module@", "module:a:b", "module#0@input", "module:0#0", "module:0@input"],
)  # fmt: skip
def test_refuses_what_is_no_address(text):
    with pytest.raises(AddressError, match="does not parse") as error:
        address(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "near"), [("btch.0", "batch"), ("modul.net", "module"), ("outputs", "output")])
def test_unknown_root_proposes_the_nearest(text, near):
    with pytest.raises(AddressError, match=f"Did you mean '{near}'"):
        address(text)


def test_unknown_root_with_nothing_near_lists_the_roots():
    with pytest.raises(AddressError, match="one of batch, output, module, teacher") as error:
        address("xyz.0")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("text", ["batch@input", "batch#0", "batch:0", "output:loss", "output.a#0", "batch.0@input:x"])
def test_capture_syntax_outside_captures_is_explained(text):
    with pytest.raises(AddressError, match="belong to 'module' and 'teacher'"):
        address(text)


names = st.text(min_size=1, max_size=5) | st.text(alphabet=".:@#\\-09a\n", min_size=1, max_size=5)
paths = st.lists(names, max_size=3).map(tuple)
addresses = st.builds(Address, st.sampled_from(["batch", "output"]), items=paths) | st.builds(
    Address,
    st.sampled_from(["module", "teacher"]),
    path=paths,
    items=paths,
    received=st.booleans(),
    call=st.none() | st.integers(-20, 20),
)


@given(addresses)
def test_text_and_address_are_the_same_thing(where):
    assert address(str(where)) == where
    assert str(address(str(where))) == str(where)


def test_is_parsed_once():
    assert address("module.some.path") is address("module.some.path")


def test_is_immutable_and_hashable():
    where = address("batch.0")
    with pytest.raises(dataclasses.FrozenInstanceError):
        where.root = "output"
    assert {where: 1}[address("batch.0")] == 1


def test_accepts_what_is_parsed_already_and_functions():
    def read(step):
        return step.batch

    def write(step, value):
        return value

    parsed = address("batch.0")
    assert address(parsed) is parsed
    assert address(read) == Computed(read)
    assert address((read, write)) == Computed(read, write)
    both = computed(read, "module.a", "teacher.b")
    assert address(both) is both
    assert both.captures == (address("module.a"), address("teacher.b"))
    assert flat([parsed, both, Computed(read)]) == [parsed, address("module.a"), address("teacher.b")]
    assert "read" in repr(both)


@pytest.mark.parametrize("value", [3, None, ["batch"], ("batch", "output"), (len,), (len, len, len), torch.zeros(1)])
def test_refuses_other_types(value):
    with pytest.raises(AddressError, match=r"but got an? |but got None") as error:
        address(value)
    assert describe(value) in str(error.value)


def test_a_wrong_capture_fails_where_the_function_is_given():
    with pytest.raises(AddressError, match="Did you mean 'module'"):
        computed(len, "modle.net")
