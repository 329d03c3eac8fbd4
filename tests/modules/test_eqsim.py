import copy
import pickle

import pytest
import torch
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import (
    cross_modal_consistency_loss,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_sample_close,
    in_modal_consistency_loss,
)
from lightning_methods.modules import EqSimLoss

G = 6
CLOSE = torch.tensor([[1, 2], [0, 3], [4, 5]])


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    image, text = torch.randn(2, G, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return image.requires_grad_(), text.requires_grad_()


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([torch.stack([x @ y / (x.norm() * y.norm()) for y in second]) for x in first])


OPTIONS = {"margin": 0.001, "weight": 3.0, "group_side": True, "positive_reg": True, "image_side": False}


@pytest.mark.parametrize("activation", ["softmax", None])
def test_modes_are_the_functions_of_cosines_or_logits(activation):
    image, text = features()
    scores = cosines(image, text) * (7.0 if activation else 1.0)
    both = {"activation": activation, **OPTIONS}

    found = EqSimLoss(**both, far_scale=2.0, far_margin=1e-6)(image, text, 7.0, CLOSE)
    torch.testing.assert_close(found, eqsim_close_far_loss(scores, CLOSE, **both, far_scale=2.0, far_margin=1e-6))
    only = EqSimLoss("close_only", **both)(image, text, torch.tensor(7.0), CLOSE, num_anchors=3)
    assert only.total == only.close == found.close
    assert only.far == 0
    found = EqSimLoss("all_pairs", **both)(image, text, 7.0)
    torch.testing.assert_close(found.total, eqsim_all_pairs_loss(scores, **both))
    found = EqSimLoss("all_pairs", **both)(image, text, 7.0, num_anchors=4)
    torch.testing.assert_close(found.total, eqsim_all_pairs_loss(scores[:4], **both))


def test_consistency():
    image, text = features()
    cross = cross_modal_consistency_loss(7 * cosines(image, text), logit_scale=7.0, weight=3.0)
    within = in_modal_consistency_loss(7 * cosines(image, image), 7 * cosines(text, text), logit_scale=7.0, weight=3.0)
    for mode, expected in (("cross_modal", cross), ("in_modal", within), ("cyclic", cross + within)):
        found = EqSimLoss(mode, weight=3.0)(image, text, 7.0)
        torch.testing.assert_close(found.total, expected)
        assert found.close == found.total
        assert found.far == 0
    found = EqSimLoss("cross_modal", weight=3.0).terms(cosines(image, text))
    torch.testing.assert_close(found.total, cross)


def test_match_scores():
    s00, rest = torch.rand(5), torch.rand(3, 5, 2)
    found = EqSimLoss("itm", activation="linear", **OPTIONS).match(s00, *rest)
    torch.testing.assert_close(found.total, eqsim_itm_loss(s00, *rest, activation="linear", **OPTIONS))


def test_draws_from_the_global_generator():
    image, text = features()
    loss = EqSimLoss(num_samples=2, margin=0.0)
    torch.manual_seed(3)
    found = loss(image, text, 7.0, num_anchors=4)
    torch.manual_seed(3)
    index = eqsim_sample_close(7 * cosines(image, text), num_samples=2, num_anchors=4)
    torch.testing.assert_close(found, loss(image, text, 7.0, index))


@pytest.mark.parametrize("mode", ["close_far", "all_pairs"])
def test_excluded_samples(mode):
    image, text = features()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    exclude = ids[:, None] == ids
    loss = EqSimLoss(mode, activation=None, margin=0.0, num_samples=4)
    torch.manual_seed(0)
    found = loss(image, text, 7.0, num_anchors=3, exclude=exclude)
    scores = cosines(image, text)
    if mode == "all_pairs":
        expected = eqsim_all_pairs_loss(scores[:3], activation=None, margin=0.0, exclude=exclude[:3, :3])
    else:
        torch.manual_seed(0)
        index = eqsim_sample_close(7 * scores, num_anchors=3, exclude=exclude)
        expected = eqsim_close_far_loss(scores, index, activation=None, margin=0.0, exclude=exclude).total
    torch.testing.assert_close(found.total, expected)


@pytest.mark.parametrize("mode", ["close_far", "all_pairs", "cyclic"])
def test_gradcheck(mode):
    loss = EqSimLoss(mode, margin=0.0)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: loss(i, t, s, CLOSE).total, (*features(), scale))


@pytest.mark.parametrize("mode", ["close_far", "all_pairs", "cyclic"])
def test_an_embedding_of_length_0(mode):
    image, text = features(dtype=torch.float32)
    with torch.no_grad():
        image[2], text[2], text[4] = 0, 0, 0
    loss = EqSimLoss(mode, margin=0.0, num_samples=G - 1)
    total = loss(image, text, 7.0).total
    total.backward()
    assert total.isfinite()
    for gradient in (image.grad, text.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 100


def test_length_plays_no_part_unless_asked():
    image, text = features()
    loss = EqSimLoss("all_pairs", activation=None, margin=0.0)
    lengths = torch.arange(1, G + 1)[:, None]
    torch.testing.assert_close(loss(image * lengths, text * 9, 1.0), loss(image, text, 1.0))
    plain = EqSimLoss("all_pairs", activation=None, margin=0.0, normalize=False)
    torch.testing.assert_close(
        plain(image, text, 1.0).total, eqsim_all_pairs_loss(image @ text.T, activation=None, margin=0.0)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    image, text = features(dtype=dtype)
    loss = EqSimLoss(margin=0.0)
    expected = loss(image.float(), text.float(), 100.0, CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(image, text, torch.tensor(100.0, dtype=dtype), CLOSE)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["close_far", "close_only", "all_pairs", "cyclic"])
def test_never_waits_for_the_device(mode):
    image, text = features(dtype=torch.float32)
    with NoSync():
        EqSimLoss(mode)(image, text, 7.0, exclude=torch.zeros(G, G, dtype=torch.bool)).total.backward()


def test_has_no_parameters_copies_and_shows_its_settings():
    loss = EqSimLoss("close_only", margin=0.0, activation=None, num_samples=2)
    assert not list(loss.state_dict())
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(same) == "EqSimLoss(mode='close_only', activation=None, num_samples=2, margin=0.0)"
    assert repr(EqSimLoss()) == "EqSimLoss()"


IMAGE, TEXT = (part.detach() for part in features())
BAD_CALLS = {
    "mode": (lambda: EqSimLoss("hard_itc"), "`mode`.*'hard_itc'"),
    "activation": (lambda: EqSimLoss(activation="linear"), "`activation`"),
    "itm activation": (lambda: EqSimLoss("itm", activation="tanh"), "`activation`"),
    "samples": (lambda: EqSimLoss(num_samples=0), "`num_samples`.*0"),
    "weight": (lambda: EqSimLoss(weight=-1.0), "`weight`"),
    "margin": (lambda: EqSimLoss(margin=-1.0), "`margin`"),
    "far margin": (lambda: EqSimLoss(far_margin=-1.0), "`far_margin`"),
    "far scale": (lambda: EqSimLoss(far_scale=0.0), "`far_scale`"),
    "hinge": (lambda: EqSimLoss(hinge="max"), "`hinge`"),
    "sides": (lambda: EqSimLoss(text_side=False, image_side=False), "at least one of"),
    "small batch": (lambda: EqSimLoss(num_samples=G)(IMAGE, TEXT, 1.0), "`num_samples`.*batch of 6"),
    "tokens": (lambda: EqSimLoss()(IMAGE[:, None], TEXT, 1.0), r"`image_features`.*\(6, 1, 4\)"),
    "text tokens": (lambda: EqSimLoss()(IMAGE, TEXT[:, None], 1.0), r"`text_features`.*\(6, 1, 4\)"),
    "sizes": (lambda: EqSimLoss()(IMAGE, TEXT[1:], 1.0), r"`text_features`.*\(6, 4\).*\(5, 4\)"),
    "integers": (lambda: EqSimLoss()(IMAGE.long(), TEXT, 1.0), "`image_features`.*int64"),
    "anchors": (lambda: EqSimLoss()(IMAGE, TEXT, 1.0, CLOSE, num_anchors=2), "`close_index`.*`num_anchors`.*2.*3"),
    "no partners": (lambda: EqSimLoss().terms(IMAGE @ TEXT.T), "`close_index` is missing.*'close_far'"),
    "no features": (lambda: EqSimLoss("in_modal").terms(IMAGE @ TEXT.T), "'in_modal'.*features"),
    "no scores": (lambda: EqSimLoss("itm")(IMAGE, TEXT, 1.0), "'itm'.*`match`"),
    "no match": (lambda: EqSimLoss().match(*torch.rand(4, 3)), "'itm'.*'close_far'"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
