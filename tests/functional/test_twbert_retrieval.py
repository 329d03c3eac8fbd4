import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.functional import retrieval_ranks, two_stage_retrieval_metrics


def plain_rank(row, target, ties):
    better = sum(1 for score in row if score > row[target])
    same = sum(1 for j, score in enumerate(row) if score == row[target] and j != target)
    return 1 + better + (same if ties == "pessimistic" else 0)


class TestRanks:
    @settings(max_examples=50, deadline=None)
    @given(rows=st.integers(1, 5), columns=st.integers(1, 6), ties=st.sampled_from(["pessimistic", "optimistic"]))
    def test_is_the_definition(self, rows, columns, ties):
        generator = torch.Generator().manual_seed(rows * 10 + columns)
        scores = torch.randint(3, (rows, columns), generator=generator).double()  # many ties
        targets = torch.randint(columns, (rows,), generator=generator)
        expected = [plain_rank(row, t, ties) for row, t in zip(scores.tolist(), targets.tolist(), strict=True)]
        assert retrieval_ranks(scores, targets, ties=ties).tolist() == expected
        if rows <= columns:
            own = [plain_rank(row, i, ties) for i, row in enumerate(scores.tolist())]
            assert retrieval_ranks(scores, ties=ties).tolist() == own

    def test_pessimistic_is_the_default_and_nan_is_a_tie(self):
        scores = torch.tensor([[0.5, float("nan"), 0.5]])
        assert retrieval_ranks(scores).tolist() == [3]
        assert retrieval_ranks(scores, torch.tensor([1])).tolist() == [3]
        assert retrieval_ranks(scores, ties="optimistic").tolist() == [1]


def plain_two_stage(match, similarity, candidates):
    size = len(match)
    kept = np.zeros((size, size))
    for i in range(size):
        for j in sorted(range(size), key=lambda j: -similarity[i][j])[:candidates]:
            kept[i, j] = np.round(match[i][j], 4)
    result = {}
    for name, matrix in (("t2v", kept), ("v2t", kept.T)):
        ranks = np.array([plain_rank(list(row), i, "pessimistic") for i, row in enumerate(matrix)])
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = 100 * np.mean(ranks <= k)
        result[f"{name}_median_rank"] = np.median(ranks)
        result[f"{name}_mean_rank"] = np.mean(ranks)
    return result


class TestTwoStages:
    @pytest.mark.parametrize("candidates", [1, 4, 12, 50])
    def test_is_the_protocol(self, candidates):
        generator = torch.Generator().manual_seed(candidates)
        match = torch.rand(12, 12, generator=generator, dtype=torch.float64)
        match += 0.3 * torch.eye(12)
        similarity = torch.randn(12, 12, generator=generator) + 2 * torch.eye(12)
        found = two_stage_retrieval_metrics(match, similarity, candidates=candidates)
        assert found == pytest.approx(plain_two_stage(match.tolist(), similarity.tolist(), candidates))
        assert all(isinstance(value, float) for value in found.values())

    def test_rounding_makes_ties_and_ties_count_against(self):
        match = torch.tensor([[0.50001, 0.50004], [0.0, 0.9]])
        assert two_stage_retrieval_metrics(match, torch.eye(2), candidates=2)["t2v_r1"] == 50.0

    def test_fifty_candidates_are_the_default(self):
        size = 52
        match, similarity = torch.full((size, size), 0.5), torch.arange(size).float().expand(size, size)
        ranks_of_kept = two_stage_retrieval_metrics(match, similarity)
        # the first two videos are nobody's candidates: their scores are 0, behind everything
        assert ranks_of_kept["t2v_mean_rank"] == pytest.approx((2 * 52 + 50 * 50) / 52)


S = torch.rand(3, 2)
BAD_CALLS = {
    "shape": (lambda: retrieval_ranks(S[0]), r"scores.*\(R, C\)"),
    "integers": (lambda: retrieval_ranks(S.long()), "scores.*int64"),
    "no targets": (lambda: retrieval_ranks(S), "targets.*missing.*3.*2"),
    "few targets": (lambda: retrieval_ranks(S, torch.tensor([0])), "targets.*3"),
    "floating targets": (lambda: retrieval_ranks(S, S[:, 0]), "targets.*float32"),
    "targets outside": (lambda: retrieval_ranks(S, torch.tensor([0, 1, 2])), r"targets.*\[0, 2\).*from 0 to 2"),
    "ties": (lambda: retrieval_ranks(S, torch.zeros(3).long(), ties="mean"), "ties.*pessimistic.*mean"),
    "not square": (lambda: two_stage_retrieval_metrics(S, S), r"match_scores.*\(3, 2\)"),
    "other shape": (lambda: two_stage_retrieval_metrics(S[:2], S), r"similarities.*\(2, 2\).*\(3, 2\)"),
    "candidates": (lambda: two_stage_retrieval_metrics(S[:2], S[:2], candidates=0), "candidates.*0"),
    "empty": (lambda: two_stage_retrieval_metrics(S[:0, :0], S[:0, :0]), "at least one"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
