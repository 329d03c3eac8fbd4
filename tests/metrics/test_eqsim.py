import copy
import itertools
import math
import warnings

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from lightning_methods.functional import retrieval_recall
from lightning_methods.metrics import EqBenScore, EquivarianceGap, FoilScore, PairGroupScore, RetrievalRecall

SUBSETS = 3  # the second never occurs
GENERATOR = torch.Generator().manual_seed(0)
QUADS = torch.randint(6, (4, 40), generator=GENERATOR).float()  # ties abound
QUADS[2, 3] = math.nan
SUBSET = 2 * torch.randint(2, (40,), generator=GENERATOR)
SMOOTH = torch.randn(4, 40, generator=GENERATOR) + torch.tensor([[1.0], [0.0], [0.0], [1.0]])


def plain_hits(quad: tuple[float, ...]) -> tuple[bool, bool, bool]:
    s00, s01, s10, s11 = quad
    text, image = s00 > s01 and s11 > s10, s00 > s10 and s11 > s01
    return text, image, text and image


def plain_groups() -> dict[str, list[float]]:
    hits = [plain_hits(tuple(quad)) for quad in QUADS.T.tolist()]
    found = {}
    for place, name in enumerate(("text", "image", "group")):
        of_subsets = []
        for subset in range(SUBSETS):
            own = [hit[place] for hit, number in zip(hits, SUBSET.tolist(), strict=True) if number == subset]
            of_subsets.append(sum(own) / len(own) if own else math.nan)
        found[name] = of_subsets
        found[f"mean_{name}"] = (of_subsets[0] + of_subsets[2]) / 2
    return found


def check(found: dict[str, Tensor], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(value), equal_nan=True, rtol=1e-5, atol=1e-6)


def shares(index: Tensor, rank: int) -> Tensor:
    """A rank's part, made equally long by repeating the first ones, as a distributed sampler does."""
    padded = torch.cat([index, index[: -len(index) % 2]])
    return padded[rank::2]


# --- quadruples -----------------------------------------------------------------------------------------


def groups(rows: slice) -> PairGroupScore:
    metric = PairGroupScore(SUBSETS)
    for part in torch.arange(40)[rows].split(7):
        metric.update(*QUADS[:, part], SUBSET[part])
    return metric


def test_groups_are_counted_by_subset():
    assert 0 < plain_groups()["group"][0] < plain_groups()["text"][0] < 1
    check(groups(slice(None)).compute(), plain_groups())
    metric = PairGroupScore()
    metric.update(*QUADS.view(4, 5, 8))  # any shape
    expected = [sum(hit) / 40 for hit in zip(*(plain_hits(tuple(quad)) for quad in QUADS.T.tolist()), strict=True)]
    names = ("text", "image", "group")
    check(
        metric.compute(),
        dict(zip(names, expected, strict=True)) | {f"mean_{name}": e for name, e in zip(names, expected, strict=True)},
    )


def flat() -> tuple[Tensor, ...]:
    """All single pairs, shuffled: score, corner, sample (a number over all subsets) and subset."""
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    corner, sample = order // 40, order % 40
    return QUADS.flatten()[order], corner, 1000 - 3 * sample, SUBSET[sample]


def flat_metric(index: Tensor) -> EqBenScore:
    metric = EqBenScore(SUBSETS)
    for part in index.split(9):
        metric.update(*(values[part] for values in flat()))
    return metric


def test_single_pairs_in_any_order():
    check(flat_metric(torch.arange(160)).compute(), plain_groups())
    repeated = torch.cat([torch.arange(160), torch.arange(50)])
    check(flat_metric(repeated).compute(), plain_groups())
    metric = EqBenScore()
    metric.update(torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.arange(4), torch.zeros(4, dtype=torch.int32))
    assert metric.compute()["text"] == 1


def test_missing_pairs_are_counted():
    with pytest.raises(ValueError, match=r"2 of 40 are incomplete"):
        flat_metric(torch.arange(158)).compute()


def test_foils():
    caption, foil = SMOOTH[:2].sigmoid()
    metric = FoilScore(threshold=0.6)
    for part in torch.arange(40).split(9):
        metric.update(caption[part], foil[part])
    pairs = list(zip(caption.tolist(), foil.tolist(), strict=True))
    right = [sum(c > 0.6 for c, _ in pairs) / 40, sum(f < 0.6 for _, f in pairs) / 40]
    expected = {"accuracy": sum(right) / 2, "min_precision": min(right), "pairwise": sum(c > f for c, f in pairs) / 40}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(metric.compute(), expected)


def test_foils_that_are_no_probabilities():
    metric = FoilScore()
    metric.update(torch.tensor([0.5, 1.5]), torch.tensor([0.5, -0.1]))
    with pytest.warns(UserWarning, match=r"2 scores outside \[0, 1\]"):
        check(metric.compute(), {"accuracy": 0.5, "min_precision": 0.5, "pairwise": 0.5})


def plain_gap() -> dict[str, float]:
    text, image, margin = [], [], []
    for s00, s01, s10, s11 in SMOOTH.T.double().tolist():
        text.append(abs((s00 - s01) - (s11 - s10)))
        image.append(abs((s00 - s10) - (s11 - s01)))
        margin.append((s00 + s11 - s01 - s10) / 2)
    return {
        "text": sum(text) / 40,
        "image": sum(image) / 40,
        "relative_text": sum(text) / sum(margin),
        "relative_image": sum(image) / sum(margin),
    }


def gap_metric(index: Tensor) -> EquivarianceGap:
    metric = EquivarianceGap()
    for part in index.split(9):
        metric.update(*SMOOTH[:, part])
    return metric


def test_gap():
    check(gap_metric(torch.arange(40)).compute(), plain_gap())
    shrunk = EquivarianceGap()
    shrunk.update(*(SMOOTH / 8).double())
    found = shrunk.compute()
    assert found["text"].item() == pytest.approx(plain_gap()["text"] / 8)
    assert found["relative_image"].item() == pytest.approx(plain_gap()["relative_image"])
    half = EquivarianceGap()
    half.update(*torch.tensor([[1.0], [0.0], [0.0], [1.0]]).half().expand(4, 5000))
    assert half.compute()["relative_text"] == 0


# --- retrieval ------------------------------------------------------------------------------------------

IMAGES, TEXTS = 12, 30
IMAGE_IDS = 100 - torch.arange(IMAGES)
TEXT_IDS = IMAGE_IDS[torch.randint(IMAGES, (TEXTS,), generator=GENERATOR)]  # some images have no text
CAPTION_IDS = 7 * torch.arange(TEXTS) % 30
IMAGE = torch.randn(IMAGES, 4, generator=GENERATOR)
TEXT = IMAGE[100 - TEXT_IDS] + torch.randn(TEXTS, 4, generator=GENERATOR)


def recall(images: Tensor, texts: Tensor, **settings: object) -> RetrievalRecall:
    metric = RetrievalRecall(**settings)
    for part in images.split(5):
        metric.update(IMAGE[part], IMAGE_IDS[part])
    for part in texts.split(7):
        metric.update(text_features=TEXT[part], text_ids=TEXT_IDS[part], caption_ids=CAPTION_IDS[part])
    return metric


def plain_recall() -> dict[str, float]:
    similarity = (IMAGE @ TEXT.T).tolist()
    matches = [[int(t == i) for t in TEXT_IDS.tolist()] for i in IMAGE_IDS.tolist()]
    found = {}
    for name, scores, right in (
        ("text_recall", similarity, matches),
        ("image_recall", list(zip(*similarity, strict=True)), list(zip(*matches, strict=True))),
    ):
        for k in (1, 5, 10):
            hits = []
            for row, own in zip(scores, right, strict=True):
                best = sorted(range(len(row)), key=lambda j: -row[j])[:k]
                hits.append(any(own[j] for j in best))
            found[f"{name}@{k}"] = sum(hits) / len(hits)
    return found


def test_recall():
    expected = plain_recall()
    assert 0 < expected["text_recall@1"] < expected["text_recall@5"] < 1
    everything = torch.arange(IMAGES), torch.arange(TEXTS)
    check(recall(*everything).compute(), expected)
    check(recall(*everything, chunk=4).compute(), expected)
    again = torch.cat([torch.arange(IMAGES), torch.arange(5)]), torch.cat([torch.arange(20), torch.arange(TEXTS)])
    check(recall(*again).compute(), expected)
    together = RetrievalRecall(k=(3, 100))
    together.update(IMAGE, IMAGE_IDS, IMAGE, IMAGE_IDS, IMAGE_IDS)
    found = retrieval_recall(IMAGE @ IMAGE.T, IMAGE_IDS, IMAGE_IDS, k=(3, 100))
    assert together.compute()["text_recall@3"] == found.text_recall[0]
    assert together.compute()["image_recall@100"] == 1


# --- several processes ----------------------------------------------------------------------------------


def merged(rank: int) -> list[dict[str, Tensor]]:
    quads, pairs, images, texts = (shares(torch.arange(size), rank) for size in (40, 159, IMAGES - 1, TEXTS - 1))
    last = torch.tensor([159]) if rank else torch.tensor([], dtype=torch.long)  # uneven: 80 and 81
    group = PairGroupScore(SUBSETS)
    group.update(*QUADS[:, quads], SUBSET[quads])
    foils = FoilScore(threshold=0.6)
    foils.update(*SMOOTH[:2, quads].sigmoid())
    images, texts = torch.cat([images, last - 159 + IMAGES - 1]), torch.cat([texts, last - 159 + TEXTS - 1])
    metrics = [group, foils, gap_metric(quads), flat_metric(torch.cat([pairs, last])), recall(images, texts)]
    return [metric.compute() for metric in metrics]


def test_two_processes_are_one():
    """With samples that come twice, and parts of different lengths."""
    foils = FoilScore(threshold=0.6)
    foils.update(*SMOOTH[:2].sigmoid())
    expected = [
        plain_groups(),
        {name: value.item() for name, value in foils.compute().items()},
        plain_gap(),
        plain_groups(),
        plain_recall(),
    ]
    for results in on_ranks(merged):
        for found, wanted in zip(results, expected, strict=True):
            check(found, wanted)


METRICS = {
    "groups": lambda index: groups(slice(int(index[0]), int(index[-1]) + 1)),
    "pairs": lambda index: flat_metric(torch.cat([40 * i + index for i in range(4)])),
    "gap": gap_metric,
    "recall": lambda index: recall(index[index < IMAGES], index[index < TEXTS]),
}


@pytest.mark.parametrize("name", METRICS)
def test_copies_merges_resets_and_does_not_enter_checkpoints(name):
    make, everything = METRICS[name], torch.arange(40)
    metric = make(everything)
    copied = copy.deepcopy(metric)
    metric.reset()
    assert not metric.state_dict()
    first = make(everything[:10])
    first.merge_state(make(everything[10:]))
    for name_of, value in copied.compute().items():
        torch.testing.assert_close(first.compute()[name_of], value, equal_nan=True)


# --- bad input ------------------------------------------------------------------------------------------

S = torch.rand(4, 3)
N = torch.arange(3)
BAD_CALLS = {
    "subsets": (lambda: PairGroupScore(0), "`num_subsets`.*0"),
    "pair subsets": (lambda: EqBenScore(0), "`num_subsets`.*0"),
    "shapes": (lambda: PairGroupScore().update(S[0], S[1], S[2], S[3, :2]), r"`s00` \(3,\).*`s11` \(2,\)"),
    "integer scores": (lambda: PairGroupScore().update(*S.long()), "`s00`.*int64"),
    "outside": (lambda: PairGroupScore(2).update(*S, N), r"`subset` must lie in \[0, 2\), got 2"),
    "subset": (lambda: PairGroupScore(3).update(*S, N[:2]), r"`subset`.*\(3,\), got \(2,\)"),
    "floating subset": (lambda: PairGroupScore(3).update(*S, S[0]), "`subset`.*float32"),
    "pair shape": (lambda: EqBenScore().update(S, S.long(), S.long()), r"`score`.*\(P,\).*\(4, 3\)"),
    "pair score": (lambda: EqBenScore().update(N, N, N), "`score`.*int64"),
    "corner": (lambda: EqBenScore().update(S[0], S[0], N), "`corner`.*float32"),
    "sample": (lambda: EqBenScore().update(S[0], N, N[:2]), r"`sample`.*\(3,\), got \(2,\)"),
    "foils": (lambda: FoilScore().update(S[0], S[1, :2]), "`caption`.*`foil`"),
    "gap": (lambda: EquivarianceGap().update(S[0], S[1], S[2], S[3, :2]), "`s11`"),
    "k": (lambda: RetrievalRecall(k=(0, 1)), "`k`.*0"),
    "no k": (lambda: RetrievalRecall(k=()), "`k`"),
    "chunk": (lambda: RetrievalRecall(chunk=0), "`chunk`.*0"),
    "no ids": (lambda: RetrievalRecall().update(S), "`image_features`, `image_ids` come together, got only `image_f"),
    "no captions": (
        lambda: RetrievalRecall().update(text_features=S, text_ids=N),
        "`text_features`, `text_ids`, `caption_ids` come together, got only `text_features`, `text_ids`",
    ),
    "tokens": (lambda: RetrievalRecall().update(S[None], N), r"`image_features`.*\(1, 4, 3\)"),
    "ids": (lambda: RetrievalRecall().update(S, N), r"`image_ids`.*\(4,\).*`image_features`, got \(3,\)"),
    "floating ids": (lambda: RetrievalRecall().update(S, S[:, 0]), "`image_ids`.*float32"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_corner_outside_is_found():
    metric = EqBenScore()
    metric.update(S[0], N + 2, N)
    with pytest.raises(ValueError, match=r"`corner` must lie in \[0, 4\), got 4"):
        metric.compute()


def test_no_score_is_right_by_a_tie():
    for quad in itertools.product((0.0, math.nan), repeat=4):
        metric = PairGroupScore()
        metric.update(*torch.tensor(quad)[:, None])
        assert not any(value.item() for value in metric.compute().values())
