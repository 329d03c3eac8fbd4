import functools
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_methods.functional import (
    embedding_recall,
    eqben_subset_scores,
    foil_scores,
    pair_group_scores,
    retrieval_recall,
)

few = st.sampled_from([0.0, 1.0, 2.0, math.nan])  # ties are frequent


def columns(count: int, height: int):
    row = st.tuples(*[few] * count)
    return st.lists(row, min_size=1, max_size=height).map(lambda rows: torch.tensor(rows).T)


def plain_groups(quads: list[list[float]]) -> Tensor:
    text = [s00 > s01 and s11 > s10 for s00, s01, s10, s11 in quads]
    image = [s00 > s10 and s11 > s01 for s00, s01, s10, s11 in quads]
    group = [t and i for t, i in zip(text, image, strict=True)]
    return torch.tensor([sum(hits) / len(quads) for hits in (text, image, group)])


class TestGroups:
    @settings(max_examples=60, deadline=None)
    @given(columns(4, 6))
    def test_definition(self, scores):
        torch.testing.assert_close(torch.stack(pair_group_scores(*scores)), plain_groups(scores.T.tolist()))

    def test_text_is_what_an_image_prefers(self):
        # Image 0 scores every text higher than image 1 does.
        found = pair_group_scores(*torch.tensor([[9.0], [8.0], [1.0], [2.0]]))
        assert [score.item() for score in found] == [1, 0, 0]

    def test_chance(self):
        scores = torch.rand(4, 100_000, generator=torch.Generator().manual_seed(0))
        found = torch.stack(pair_group_scores(*scores))
        torch.testing.assert_close(found, torch.tensor([1 / 4, 1 / 4, 1 / 6]), rtol=0, atol=0.006)

    def test_dtypes_and_none(self):
        scores = torch.rand(4, 3, dtype=torch.bfloat16, requires_grad=True)
        assert pair_group_scores(*scores).text.dtype == torch.float32
        assert not pair_group_scores(*scores).text.requires_grad
        assert pair_group_scores(*scores.double()).text.dtype == torch.float64
        assert all(score.isnan() for score in pair_group_scores(*torch.zeros(4, 0)))

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_single_pairs_in_any_order(self, data):
        quads = data.draw(st.lists(st.tuples(st.integers(0, 2), *[few] * 4), min_size=1, max_size=6))
        pairs = [
            (score, corner, 10 * number, subset)
            for number, (subset, *scores) in enumerate(quads)
            for corner, score in enumerate(scores)
        ]
        pairs += data.draw(st.lists(st.sampled_from(pairs), max_size=4))  # as a sampler that pads does
        pairs = data.draw(st.permutations(pairs))
        score, corner, sample, subset = (torch.tensor(list(column)) for column in zip(*pairs, strict=True))
        found = eqben_subset_scores(score, corner, sample, subset, num_subsets=4)
        for number in range(4):
            mine = torch.stack([shares[number] for shares in found])
            members = [scores for of, *scores in quads if of == number]
            expected = plain_groups(members) if members else torch.full((3,), math.nan)
            torch.testing.assert_close(mine, expected, equal_nan=True)

    def test_samples_are_numbered_within_their_subset(self):
        scores = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.1, 0.9, 0.8, 0.2])
        corner, sample, subset = torch.arange(8) % 4, torch.zeros(8, dtype=torch.int32), torch.arange(8) // 4
        found = eqben_subset_scores(scores, corner, sample, subset, num_subsets=2)
        assert found.group.tolist() == [1, 0]


class TestFoils:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])] * 2), min_size=1, max_size=6))
    def test_definition(self, pairs):
        caption, foil = torch.tensor(pairs).T
        for threshold in (0.5, 0.75):
            right = [c > threshold for c, _ in pairs], [f < threshold for _, f in pairs]
            n = len(pairs)
            expected = [
                (sum(right[0]) + sum(right[1])) / (2 * n),
                min(sum(right[0]) / n, sum(right[1]) / n),
                sum(c > f for c, f in pairs) / n,
            ]
            found = foil_scores(caption, foil, threshold=threshold)
            torch.testing.assert_close(torch.stack(found), torch.tensor(expected))

    def test_scores_that_are_no_probabilities(self):
        inside, outside = torch.tensor([0.0, 1.0]), torch.tensor([-0.1, 0.5])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            foil_scores(inside, inside)
        for pair in ((inside, outside), (outside, inside), (inside, 1 + inside)):
            with pytest.warns(UserWarning, match="only `pairwise`"):
                foil_scores(*pair)


def plain_recall(scores: list[list[float]], row_ids: list[int], column_ids: list[int], k: int) -> float:
    """Sort the candidates of each row, wrong ones before right ones of the same score."""
    found = 0
    for row, own in zip(scores, row_ids, strict=True):
        ranked = sorted(zip(row, column_ids, strict=True), key=lambda pair: (-pair[0], pair[1] == own))
        found += any(other == own for _, other in ranked[:k])
    return found / len(scores)


@st.composite
def retrievals(draw):
    ids = st.lists(st.integers(0, 4), min_size=1, max_size=6)
    image_ids, text_ids = draw(ids), draw(ids)
    score = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    row = st.lists(score, min_size=len(text_ids), max_size=len(text_ids))
    return draw(st.lists(row, min_size=len(image_ids), max_size=len(image_ids))), image_ids, text_ids


K = (1, 2, 4, 50)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            self.elements = max(self.elements, result.numel())
        return result


class TestRecall:
    @settings(max_examples=80, deadline=None)
    @given(retrievals(), st.integers(1, 4))
    def test_definition(self, problem, chunk):
        rows, image_ids, text_ids = problem
        found = retrieval_recall(torch.tensor(rows), torch.tensor(image_ids), torch.tensor(text_ids), k=K, chunk=chunk)
        turned = [list(column) for column in zip(*rows, strict=True)]
        expected = [plain_recall(rows, image_ids, text_ids, k) for k in K]
        torch.testing.assert_close(found.text_recall, torch.tensor(expected))
        expected = [plain_recall(turned, text_ids, image_ids, k) for k in K]
        torch.testing.assert_close(found.image_recall, torch.tensor(expected))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_features(self, dtype):
        generator = torch.Generator().manual_seed(0)
        image_ids, text_ids = torch.arange(40), torch.arange(100) % 40
        image = torch.randn(40, 8, generator=generator).to(dtype)
        text = image[text_ids] + torch.randn(100, 8, generator=generator).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        expected = retrieval_recall(image.to(wide) @ text.to(wide).T, image_ids, text_ids)
        assert 0 < expected.text_recall[0] < 1
        assert expected.text_recall.dtype == wide
        with torch.autocast("cpu", torch.bfloat16):
            found = embedding_recall(image, text, image_ids, text_ids, chunk=7)
        torch.testing.assert_close(found, expected)

    def test_the_similarities_never_stand_in_memory(self):
        angle = torch.linspace(0, 6, 60)
        image = torch.stack([angle.cos(), angle.sin()], 1)
        text = image.repeat_interleave(3, 0)
        call = functools.partial(embedding_recall, image, text, torch.arange(60), torch.arange(180) // 3, k=(1, 3))
        with LargestTensor() as largest:
            found = call(chunk=10)
        assert torch.equal(torch.stack(found), torch.ones(2, 2))
        assert largest.elements <= 10 * 180
        with LargestTensor() as largest:
            call(chunk=1000)
        assert largest.elements == 60 * 180

    def test_a_score_that_is_nan_is_wrong(self):
        scores = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        for i, j in itertools.product(range(2), range(2)):
            broken = scores.clone()
            broken[i, j] = math.nan
            found = retrieval_recall(broken, torch.arange(2), torch.arange(2), k=(1,))
            assert found.text_recall.item() == found.image_recall.item() == 0.5

    def test_default_k(self):
        found = retrieval_recall(torch.eye(3), torch.arange(3), torch.arange(3))
        assert found.text_recall.shape == (3,)
