"""What the EqSim losses do not depend on."""

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.functional import eqsim_all_pairs_loss, eqsim_close_far_loss

OPTIONS = [
    {},
    {"image_side": False},
    {"text_side": False, "group_side": True},
    {"positive_reg": True, "group_side": True},
    {"relative": True, "weight": 3.0, "group_side": True},
    {"relative": True, "eps": 0.5, "image_side": False},
    {"hinge": "pair", "positive_reg": True, "relative": True, "group_side": True},
]
numbers = st.floats(-8, 8, width=32)


@st.composite
def problems(draw):
    size = draw(st.integers(2, 5))
    rows = draw(st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=size, max_size=size))
    order = torch.tensor(draw(st.permutations(range(size))))
    index = draw(st.lists(st.lists(st.integers(0, size - 1), min_size=2, max_size=2), min_size=size, max_size=size))
    options = draw(st.sampled_from(OPTIONS))
    return torch.tensor(rows, dtype=torch.float64), order, torch.tensor(index), {"margin": 0.0, **options}


roughly = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from(["softmax", None]))
def test_the_order_of_the_samples_does_not_matter(problem, activation):
    scores, order, index, options = problem
    mixed = scores[order][:, order]
    options = {**options, "eps": 0.1}
    if not (options.get("relative") and options.get("group_side")):  # the two hinges of the group side swap pairs
        before, after = (eqsim_all_pairs_loss(x, activation=activation, **options) for x in (scores, mixed))
        roughly(after, before)
    before = eqsim_close_far_loss(scores, index, activation=activation, **options)
    after = eqsim_close_far_loss(mixed, order.argsort()[index[order]], activation=activation, **options)
    roughly(torch.stack(after), torch.stack(before))


@settings(max_examples=30, deadline=None)
@given(problems(), st.lists(numbers, min_size=5, max_size=5))
def test_a_shift_changes_nothing(problem, shifts):
    scores, _, index, options = problem
    shifts = torch.tensor(shifts, dtype=torch.float64)
    if not options.get("relative"):
        before, after = (eqsim_all_pairs_loss(x, activation=None, **options) for x in (scores, scores + shifts[0]))
        roughly(after, before)
    rows = scores + shifts[: len(scores), None]
    before, after = (eqsim_close_far_loss(x, index, **options) for x in (scores, rows))
    roughly(torch.stack(after), torch.stack(before))


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(0.1, 10))
def test_scale(problem, factor):
    scores, _, index, options = problem
    options = {**options, "positive_reg": False, "eps": 0.0}
    scores = scores + 20  # no matched score near zero
    before = eqsim_close_far_loss(scores, index, activation=None, **options)
    after = eqsim_close_far_loss(factor * scores, index, activation=None, **options)
    roughly(after.close, before.close * (1 if options.get("relative") else factor**2))
    roughly(after.far, before.far * factor**2)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_never_negative(problem):
    scores, _, index, options = problem
    for loss in (eqsim_all_pairs_loss(scores, **options), *eqsim_close_far_loss(scores, index, **options)):
        assert loss >= 0
