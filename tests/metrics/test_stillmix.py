import copy
import math

import pytest
import torch
from ranks import on_ranks

from lightning_methods.metrics import (
    ContrastedAccuracy,
    MeanClassAccuracy,
    PairedContrastedAccuracy,
    StaticBiasReport,
)

CLASSES = 3


def batches(count=4, size=6):
    """Predictions on clips, on their twins, and targets."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(CLASSES, (3, size), generator=generator).unbind() for _ in range(count)]


def plain(pairs):
    """Shares over (prediction on the clip, on its twin, target)."""
    return {
        "scuba": sum(a == y for a, _, y in pairs) / len(pairs),
        "scufo": sum(b == y for _, b, y in pairs) / len(pairs),
        "contrasted": sum(a == y and b != y for a, b, y in pairs) / len(pairs),
    }


def flat(some):
    return [tuple(int(value) for value in pair) for batch in some for pair in zip(*batch, strict=True)]


def numbers(result):
    return {name: float(value) for name, value in result.items()}


def test_contrasted_accuracy_is_the_plain_count():
    metric = ContrastedAccuracy()
    for batch in batches():
        metric.update(*batch)
    assert numbers(metric.compute()) == pytest.approx(plain(flat(batches())))
    assert {name: state.dtype for name, state in metric._defaults.items()} == dict.fromkeys(
        ("n", "scuba", "scufo", "contrasted"), torch.int64
    )


def test_scores_count_like_classes():
    by_class, by_score = ContrastedAccuracy(), ContrastedAccuracy()
    for scuba, scufo, target in batches():
        by_class.update(scuba, scufo, target)
        by_score.update(*(torch.eye(CLASSES)[preds] for preds in (scuba, scufo)), target)
    assert numbers(by_score.compute()) == numbers(by_class.compute())


def test_copies_resets_and_does_not_enter_checkpoints():
    for metric in (ContrastedAccuracy(), StaticBiasReport(["a"])):
        arguments = ("a",) if isinstance(metric, StaticBiasReport) else ()
        metric.update(*arguments, *batches()[0])
        copied = copy.deepcopy(metric)
        metric.reset()
        metric.update(*arguments, *batches()[1])
        metric.reset()  # the defaults must not have been counted into
        metric.update(*arguments, *batches()[0])
        assert numbers(metric.compute()) == numbers(copied.compute())
        assert not metric.state_dict()


def test_no_pair_is_nan_with_a_warning():
    with pytest.warns(UserWarning, match="ContrastedAccuracy has seen no pair"):
        assert all(math.isnan(value) for value in numbers(ContrastedAccuracy().compute()).values())
    with pytest.warns(UserWarning, match="PairedContrastedAccuracy has seen no pair"):
        found = numbers(PairedContrastedAccuracy().compute())
    assert all(math.isnan(found[name]) for name in ("scuba", "scufo", "contrasted"))


def test_report_has_every_background_and_their_plain_mean():
    metric = StaticBiasReport(["places365", "stripes"])
    first, *rest = batches()  # unequal numbers: the mean is over backgrounds, not over clips
    metric.update("places365", *first)
    for batch in rest:
        metric.update("stripes", *batch)
    of = {"places365": plain(flat([first])), "stripes": plain(flat(rest))}
    expected = {f"{background}/{name}": share for background in of for name, share in of[background].items()}
    expected |= {f"mean/{name}": (of["places365"][name] + of["stripes"][name]) / 2 for name in of["stripes"]}
    assert numbers(metric.compute()) == pytest.approx(expected)


def test_report_has_the_accuracy_of_sets_without_twins():
    metric, alone = (StaticBiasReport(["stripes", "vqgan"], plain=plain) for plain in (["iid", "conflicting"], []))
    first, second, third, fourth = batches()
    for background, batch in (("stripes", first), ("vqgan", second)):
        metric.update(background, *batch)
        alone.update(background, *batch)
    for name, (scuba, _, target) in (("iid", third), ("conflicting", fourth)):
        metric.update(name, scuba, None, target)
    of_sets = {"iid/accuracy": plain(flat([third]))["scuba"], "conflicting/accuracy": plain(flat([fourth]))["scuba"]}
    assert numbers(metric.compute()) == pytest.approx(numbers(alone.compute()) | of_sets)


@pytest.mark.filterwarnings("ignore:.*seen no pair")
def test_a_background_that_was_not_seen_is_nan_alone():
    metric = StaticBiasReport(["a", "b"])
    metric.update("a", *batches()[0])
    found = numbers(metric.compute())
    assert math.isnan(found["b/scuba"])
    assert not math.isnan(found["a/scuba"])


def named(start, size=6):
    return [f"run/video {number}__{number % 5}" for number in range(start, start + size)]


def feed_paired(metric, part=slice(None), order=1):
    """Twins come later, in another order; the ids are names."""
    indexed = list(enumerate(batches()))[part]
    for place, (scuba, _, target) in indexed:
        metric.update(scuba, target, named(6 * place), kind="scuba")
    for place, (_, scufo, target) in indexed[::order]:
        metric.update(scufo.flip(0), target.flip(0), named(6 * place)[::-1], kind="scufo")
    return metric


def test_separate_loaders_pair_by_name():
    found = numbers(feed_paired(PairedContrastedAccuracy(), order=-1).compute())
    assert found == pytest.approx({**plain(flat(batches())), "unpaired_scuba": 0, "unpaired_scufo": 0})


def test_clips_seen_twice_count_once_and_unpaired_ones_are_counted():
    metric = feed_paired(PairedContrastedAccuracy())
    expected = numbers(metric.compute())
    scuba, scufo, target = batches()[1]
    metric.update(scuba[:2], target[:2], named(6)[:2], kind="scuba")
    metric.update(scufo[:3], target[:3], named(6)[:3], kind="scufo")
    assert numbers(metric.compute()) == expected
    metric.update(torch.tensor([2, 2]), torch.tensor([1, 1]), torch.tensor([7, 8]), kind="scuba")
    found = numbers(metric.compute())
    assert (found["unpaired_scuba"], found["unpaired_scufo"]) == (2, 0)
    assert found["contrasted"] == expected["contrasted"]
    assert found["scuba"] == pytest.approx(expected["scuba"] * 24 / 26)


def test_pairs_must_agree_on_the_target():
    metric = PairedContrastedAccuracy()
    one = torch.tensor([1])
    metric.update(one, torch.tensor([0]), ["a__0"], kind="scuba")
    metric.update(one, torch.tensor([2]), ["a__0"], kind="scufo")
    with pytest.raises(ValueError, match="same target, got 0 and 2"):
        metric.compute()
    metric.update(one, torch.tensor([1]), ["a__0"], kind="scuba")
    with pytest.raises(ValueError, match="seen twice must have the same target, got 0 and 1"):
        metric.compute()


def test_mean_class_accuracy_weighs_classes_alike():
    preds, target = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 2])
    metric = MeanClassAccuracy(3)
    metric.update(preds, target)
    assert float(metric.compute()) == pytest.approx((3 / 4 + 0 + 1) / 3)


def merged(rank):
    """Each rank sees half of the batches; rank 1 sees no twin-by-name batch at all, and one clip of rank 0 again."""
    own = slice(rank, None, 2)
    together, report, paired = ContrastedAccuracy(), StaticBiasReport(["a", "b"]), PairedContrastedAccuracy()
    recall, empty = MeanClassAccuracy(CLASSES), PairedContrastedAccuracy()
    for place, (scuba, scufo, target) in list(enumerate(batches()))[own]:
        together.update(scuba, scufo, target)
        report.update("ab"[place // 2], scuba, scufo, target)
        recall.update(scuba, target)
    feed_paired(paired, own)
    if rank == 1:
        scuba, _, target = batches()[0]
        paired.update(scuba[:1], target[:1], named(0)[:1], kind="scuba")
    else:
        feed_paired(empty)
    return [numbers(metric.compute()) for metric in (together, report, paired, empty)] + [float(recall.compute())]


def test_two_ranks_give_what_one_gives():
    results = on_ranks(merged)
    assert results[0] == results[1]
    together, report, paired, empty, recall = results[0]
    everything = flat(batches())
    assert together == pytest.approx(plain(everything))
    assert report["b/contrasted"] == pytest.approx(plain(flat(batches()[2:]))["contrasted"])
    assert paired == pytest.approx({**plain(everything), "unpaired_scuba": 0, "unpaired_scufo": 0})
    assert empty == paired
    of_class = [[a == y for a, _, y in everything if y == label] for label in range(CLASSES)]
    assert recall == pytest.approx(sum(sum(hits) / len(hits) for hits in of_class) / CLASSES)


ONE = torch.tensor([1])
BAD_CALLS = {
    "names": (lambda: StaticBiasReport([], ["iid"]), "`backgrounds` and `plain` must be distinct names"),
    "name of both": (lambda: StaticBiasReport(["a"], ["a"]), "`backgrounds` and `plain`"),
    "no twins": (lambda: StaticBiasReport(["a"]).update("a", ONE, None, ONE), "`scufo_preds` .* for no other: 'a'"),
    "twins": (lambda: StaticBiasReport(["a"], ["b"]).update("b", ONE, ONE, ONE), r"None for the sets \['b'\]"),
    "name twice": (lambda: StaticBiasReport(["a", "a"]), "`backgrounds`"),
    "mean": (lambda: StaticBiasReport(["mean"]), "`backgrounds`"),
    "background": (
        lambda: StaticBiasReport(["a"]).update("b", ONE, ONE, ONE),
        r"`background` must be one of \['a'\], got 'b'",
    ),
    "shape": (lambda: ContrastedAccuracy().update(ONE, ONE[:0], ONE), "`scufo_preds` must have shape"),
    "kind": (lambda: PairedContrastedAccuracy().update(ONE, ONE, ONE, kind="iid"), "`kind` must be one of"),
    "ids": (lambda: PairedContrastedAccuracy().update(ONE, ONE, ["a", "b"], kind="scuba"), "`ids` must be 1"),
    "float ids": (
        lambda: PairedContrastedAccuracy().update(ONE, ONE, ONE / 2, kind="scuba"),
        "`ids` must hold integers",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
