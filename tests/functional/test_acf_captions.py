import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.functional import DocumentFrequency, bleu, caption_tokens, cider_d, document_frequency

words = st.lists(st.sampled_from("abcd"), min_size=0, max_size=7)
corpora = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4)


def grams(tokens, order):
    return Counter(zip(*(tokens[k:] for k in range(order)), strict=False))


def plain_cider(candidates, references, n=4, sigma=6.0, table=None):
    """The formula, one order and one reference at a time."""
    images = len(references) if table is None else table.num_images

    def frequency(gram):
        if table is not None:
            return table.counts.get(gram, 0)
        return sum(any(gram in grams(text, len(gram)) for text in texts) for texts in references)

    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        total = 0.0
        for text in texts:
            for order in range(1, n + 1):
                c, r = (
                    {g: k * (math.log(images) - math.log(max(1, frequency(g)))) for g, k in grams(t, order).items()}
                    for t in (candidate, text)
                )
                product = sum(min(c[g], r[g]) * r[g] for g in c if g in r)
                norm = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in r.values()))
                delta = max(0, len(candidate) - 1) - max(0, len(text) - 1)
                total += (product / norm if norm else product) * math.exp(-(delta**2) / (2 * sigma**2)) / n
        scores.append(10 * total / len(texts))
    return scores


def plain_bleu(candidates, references, order):
    precisions = []
    for k in range(1, order + 1):
        correct = guessed = 0
        for candidate, texts in zip(candidates, references, strict=True):
            for gram, count in grams(candidate, k).items():
                correct += min(count, max(grams(text, k)[gram] for text in texts))
            guessed += max(0, len(candidate) - k + 1)
        precisions.append((correct + 1e-15) / (guessed + 1e-9))
    length = sum(map(len, candidates))
    closest = 0
    for candidate, texts in zip(candidates, references, strict=True):
        closest += min(map(len, texts), key=lambda size: (abs(size - len(candidate)), size))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return math.prod(precisions) ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


class TestCider:
    @settings(max_examples=60, deadline=None)
    @given(corpus=corpora, n=st.integers(1, 4), sigma=st.sampled_from([1.0, 6.0]))
    def test_is_the_formula(self, corpus, n, sigma):
        candidates, references = zip(*corpus, strict=True)
        found = cider_d(candidates, references, n=n, sigma=sigma)
        assert found.per_item.tolist() == pytest.approx(plain_cider(candidates, references, n, sigma), abs=1e-12)
        assert found.score.item() == pytest.approx(found.per_item.mean().item())

    def test_a_given_table(self):
        corpus = [["a b c", "a c"], ["b d"], ["a d d"]]
        table = document_frequency(corpus)
        assert table.counts[("a",)] == 2
        assert table.counts[("a", "b")] == 1
        assert table.counts[("d",)] == 2
        assert table.num_images == 3
        texts = [[text.split() for text in item] for item in corpus]
        found = cider_d(["a b"], [["a b c"]], document_frequency=table)
        assert found.per_item.tolist() == pytest.approx(plain_cider([["a", "b"]], [[["a", "b", "c"]]], table=table))
        assert found.score > 0
        same = cider_d(["a c", "d", "a d"], corpus, document_frequency=table)
        assert same.per_item.tolist() == cider_d(["a c", "d", "a d"], corpus).per_item.tolist()
        assert same.per_item.tolist() == pytest.approx(plain_cider([["a", "c"], ["d"], ["a", "d"]], texts))

    def test_copies_share_the_table(self):
        table = document_frequency([["a b"], ["a"]])
        assert copy.deepcopy(table) is table
        assert pickle.loads(pickle.dumps(table)) == table

    def test_candidates_may_share_references(self):
        first, second = ["a b", "a"], ["c d"]
        shared = cider_d(["a b", "b", "c", "a"], [first, first, second, first])
        apart = cider_d(["a b", "b", "c", "a"], [list(texts) for texts in (first, first, second, first)])
        assert shared.per_item.tolist() == apart.per_item.tolist()

    def test_one_image_scores_nothing(self):
        assert cider_d(["a b"], [["a b"]]).score == 0

    def test_strings_ids_and_bounds(self):
        ids = cider_d([[1, 2, 9], [3, 9]], [[[1, 2, 9]], [[3, 4, 9]]])
        assert ids.per_item.tolist() == cider_d(["x y end", "z end"], [["x y end"], ["z w end"]]).per_item.tolist()
        tensors = cider_d([torch.tensor([1, 2, 9]), torch.tensor([3, 9])], [torch.tensor([[1, 2, 9]]), [[3, 4, 9]]])
        assert tensors.per_item.tolist() == ids.per_item.tolist()
        perfect = cider_d(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
        assert perfect.per_item.tolist() == pytest.approx([10.0, 10.0])


class TestBleu:
    @settings(max_examples=60, deadline=None)
    @given(corpus=corpora)
    def test_is_the_formula(self, corpus):
        candidates, references = zip(*corpus, strict=True)
        if not any(candidates):
            return
        found = bleu(candidates, references)
        for order, value in enumerate(found, 1):
            assert value.item() == pytest.approx(plain_bleu(candidates, references, order), rel=1e-9, abs=1e-300)

    def test_orders(self):
        one = bleu(["a b"], [["a b c"]], n=2)
        assert one.bleu_2.isfinite()
        assert one.bleu_3.isnan()
        assert one[:2] == bleu(["a b"], [["a b c"]])[:2]

    def test_of_equally_close_references_the_shorter_counts(self):
        # lengths 2 and 4 are equally close to 3: no penalty with the shorter one
        assert bleu(["a b c"], [["a b", "a b c d"]]).bleu_1.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man rides a horse.", "a man rides a horse"),
        ("Two dogs, one cat; and -- well - a (brown) cow!", "two dogs one cat and well a brown cow"),
        ("It's the man's; they don't know...", "it 's the man 's they do n't know"),
        ("He said: \"stop!\" and 'go'", "he said stop and go"),
        ("a well-fed cow of 1,000 kg at 10:30 a.m. sharp?", "a well-fed cow of 1,000 kg at 10:30 a.m sharp"),
        ("  ", ""),
    ],
)
def test_tokens(text, tokens):
    assert caption_tokens(text) == tokens.split()


BAD_CALLS = {
    "numbers differ": (lambda: cider_d(["a"], []), "candidates.*references.*1 and 0"),
    "nothing": (lambda: bleu([], []), "at least one.*0 and 0"),
    "a bare string": (lambda: bleu("a", [["a"]]), "candidates.*got 'a'"),
    "no reference": (lambda: cider_d(["a"], [[]]), r"references.*\[\].*item 0"),
    "a bare reference": (lambda: bleu(["a", "b"], [["a"], "b"]), "references.*'b'.*item 1"),
    "order": (lambda: bleu(["a"], [["a"]], n=5), r"`n`.*\[1, 4\].*5"),
    "no order": (lambda: cider_d(["a"], [["a"]], n=0), "`n`.*0"),
    "no order in the table": (lambda: document_frequency([["a"]], n=0), "`n`.*0"),
    "sigma": (lambda: cider_d(["a"], [["a"]], sigma=0.0), "sigma.*0.0"),
    "an empty table": (
        lambda: cider_d(["a"], [["a"]], document_frequency=DocumentFrequency({}, 0)),
        "document_frequency.*at least one image",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
