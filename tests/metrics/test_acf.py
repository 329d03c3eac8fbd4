import copy

import pytest
import torch
from ranks import on_ranks

from lightning_methods.functional import bleu, cider_d, document_frequency
from lightning_methods.metrics import CaptionBLEU, CiderD

BATCHES = [
    (["A man rides a horse.", "Two dogs play."], [["a man on a horse", "A man rides!"], ["two dogs play in snow"]]),
    (["a red bus"], [["the bus is red", "a red bus, on a street"]]),
    ([["a", "cat", "naps"]], [[["a", "cat", "naps"], ["the", "cat", "é\n☃"]]]),
]
CANDIDATES = ["a man rides a horse", "two dogs play", "a red bus", ["a", "cat", "naps"]]
REFERENCES = [
    ["a man on a horse", "a man rides"],
    ["two dogs play in snow"],
    ["the bus is red", "a red bus on a street"],
    [["a", "cat", "naps"], ["the", "cat", "é\n☃"]],
]


def fed(make, part=slice(None)):
    metric = make()
    for batch in BATCHES[part]:
        metric.update(*batch)
    return metric


def check(make, found):
    if make is CiderD:
        assert found.item() == pytest.approx(cider_d(CANDIDATES, REFERENCES).score.item(), rel=1e-6)
    else:
        expected = bleu(CANDIDATES, REFERENCES)._asdict()
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-6
        )


@pytest.mark.parametrize("make", [CiderD, CaptionBLEU])
class TestBoth:
    def test_is_the_function(self, make):
        check(make, fed(make).compute())

    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_ranks_share_the_work(self, make, cut):
        """With cut 3 the second rank has no data at all; frequencies are those of the union."""
        parts = [slice(cut), slice(cut, None)]
        for found in on_ranks(lambda rank: fed(make, parts[rank]).compute()):
            check(make, found)

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_merges_copies_and_resets(self, make):
        merged = fed(make, slice(1))
        merged.merge_state(fed(make, slice(1, None)))
        # the merged order differs, the corpus does not
        found = merged.compute()
        check(make, found)
        copied = copy.deepcopy(merged)
        merged.reset()
        check(make, copied.compute())
        assert not merged.state_dict()
        with pytest.raises(ValueError, match=f"{make.__name__}.*update"):
            merged.compute()

    def test_moves(self, make):
        check(make, fed(make).to("cpu").double().compute())

    def test_bad_input(self, make):
        with pytest.raises(ValueError, match=r"candidates.*references.*1 and 2"):
            make().update(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match=r"`n`.*0"):
            make(n=0)


def test_given_frequencies_and_tokens():
    table = document_frequency(REFERENCES)
    metric = CiderD(table, n=2, sigma=1.0, tokenizer=str.split)
    metric.update(["a red bus."], [["a red bus"]])
    expected = cider_d(["a red bus."], [["a red bus"]], document_frequency=table, n=2, sigma=1.0).score
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="sigma"):
        CiderD(sigma=0.0)


def test_ids_are_tokens():
    metric = CiderD()
    metric.update([torch.tensor([1, 2, 9]), [3, 9]], [torch.tensor([[1, 2, 9]]), [[3, 4, 9]]])
    assert metric.compute().item() == pytest.approx(
        cider_d([[1, 2, 9], [3, 9]], [[[1, 2, 9]], [[3, 4, 9]]]).score.item(), rel=1e-6
    )


def test_orders():
    metric = CaptionBLEU(n=2)
    metric.update(torch.tensor([[1, 2, 3]]).tolist(), [[[1, 2, 4]]])
    assert list(metric.compute()) == ["bleu_1", "bleu_2"]


def test_pycocoevalcap_gives_the_same():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    texts = [text if isinstance(text, str) else " ".join(text) for text in CANDIDATES]
    references = [[text if isinstance(text, str) else "a cat naps" for text in item] for item in REFERENCES]
    candidates, truths = ({str(number): item for number, item in enumerate(part)} for part in (texts, references))
    candidates = {number: [text] for number, text in candidates.items()}
    metrics = CiderD(tokenizer=str.split), CaptionBLEU(tokenizer=str.split)
    for metric in metrics:
        metric.update(texts, references)
    score, _ = Cider().compute_score(truths, candidates)
    assert metrics[0].compute().item() == pytest.approx(score, rel=1e-6)
    scores, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
    assert [value.item() for value in metrics[1].compute().values()] == pytest.approx(scores, rel=1e-6)
