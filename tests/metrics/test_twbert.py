import copy

import numpy as np
import pytest
import torch
from ranks import on_ranks

from lightning_methods.functional import two_stage_retrieval_metrics
from lightning_methods.metrics import AnswerAccuracy, TextVideoRecall, TwoStageRecall


def pairs():
    """Fourteen texts of nine videos, in batches; features of texts lie near those of their videos."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 3, 7, 5]) * 3
    videos = torch.randn(9, 6, generator=generator)[ids // 3]
    texts = videos + 1.2 * torch.randn(14, 6, generator=generator)
    return [(texts[rows], 3 * videos[rows], ids[rows]) for rows in torch.arange(14).split([4, 5, 3, 2])]


def statistics(ranks, ks):
    return {
        **{f"r{k}": 100 * np.mean([rank <= k for rank in ranks]) for k in ks},
        "median_rank": np.median(ranks),
        "mean_rank": np.mean(ranks),
    }


def plain(direction, with_ids, ks=(1, 5, 10)):
    texts, videos, ids = (torch.cat(column) for column in zip(*pairs(), strict=True))
    ids = ids.tolist() if with_ids else list(range(14))
    unit = [t / t.norm() for t in texts]
    clips = {i: v / v.norm() for i, v in zip(ids, videos, strict=True)}
    ranks = []
    if direction == "t2v":
        for text, right in zip(unit, ids, strict=True):
            scores = {i: float(text @ clip) for i, clip in clips.items()}
            ranks.append(sum(1 for i in scores if i == right or scores[i] >= scores[right] - 1e-7))
    else:
        for i, clip in clips.items():
            scores = [float(clip @ text) for text in unit]
            right = max(row for row, own in enumerate(ids) if own == i)
            ranks.append(sum(1 for row in range(14) if row == right or scores[row] >= scores[right] - 1e-7))
    return statistics(ranks, ks)


def fed(direction="t2v", with_ids=True, part=slice(None), **options):
    metric = TextVideoRecall(direction=direction, **options)
    for texts, videos, ids in pairs()[part]:
        metric.update(texts, videos, ids if with_ids else None)
    return metric


@pytest.mark.parametrize("direction", ["t2v", "v2t"])
@pytest.mark.parametrize("with_ids", [True, False])
class TestRecall:
    def test_is_the_plain_loop(self, direction, with_ids):
        for chunk in (3, 100):
            found = fed(direction, with_ids, ks=(1, 2, 7), chunk=chunk).compute()
            assert {name: value.item() for name, value in found.items()} == pytest.approx(
                plain(direction, with_ids, (1, 2, 7)), rel=1e-5
            )

    def test_ranks_share_the_work(self, direction, with_ids):
        results = on_ranks(lambda rank: fed(direction, with_ids, slice(2 * rank, 2 * rank + 2)).compute())
        for found in results:
            assert {name: value.item() for name, value in found.items()} == pytest.approx(
                plain(direction, with_ids), rel=1e-5
            )

    def test_merges_copies_and_resets(self, direction, with_ids):
        merged = fed(direction, with_ids, slice(1))
        merged.merge_state(fed(direction, with_ids, slice(1, None)))
        expected = fed(direction, with_ids).compute()
        assert merged.compute() == expected if direction == "t2v" else merged.compute().keys() == expected.keys()
        copied = copy.deepcopy(merged)
        merged.reset()
        assert copied.compute().keys() == expected.keys()
        assert not merged.state_dict()


def test_repeated_videos_tie_without_numbers():
    eye = torch.eye(2)
    video = torch.stack([eye[0], eye[0]])
    assert TextVideoRecall(ks=(1,))(video, video)["r1"] == 0
    assert TextVideoRecall(ks=(1,), ties="optimistic")(video, video)["r1"] == 100
    assert TextVideoRecall(ks=(1,))(video, video, torch.tensor([4, 4]))["r1"] == 100


def triples(size=12):
    generator = torch.Generator().manual_seed(1)
    match = torch.rand(size, size, generator=generator) + 0.4 * torch.eye(size)
    similarity = torch.randn(size, size, generator=generator) + 2 * torch.eye(size)
    order = torch.randperm(size * size, generator=generator)
    return match, similarity, order.split([40, 50, 30, 24])


def staged(part=slice(None), candidates=4):
    match, similarity, batches = triples()
    metric = TwoStageRecall(candidates)
    for places in batches[part]:
        text, video = places // 12, places % 12
        metric.update(5 * text, 5 * video, match[text, video], similarity[text, video])
    return metric


def values(result):
    return {name: value.item() for name, value in result.items()}


class TestTwoStages:
    def test_is_the_function(self):
        match, similarity, _ = triples()
        for candidates in (1, 4, 50):
            expected = two_stage_retrieval_metrics(match, similarity, candidates=candidates)
            assert values(staged(candidates=candidates).compute()) == pytest.approx(expected, rel=1e-6)

    def test_ranks_share_the_work(self):
        expected = values(staged().compute())
        for found in on_ranks(lambda rank: staged(slice(2 * rank, 2 * rank + 2)).compute()):
            assert values(found) == expected

    def test_pairs_that_never_arrive_are_no_candidates(self):
        match, similarity, _ = triples()
        best = similarity.topk(4).indices
        metric = TwoStageRecall(4)
        text = torch.arange(12)[:, None].expand(12, 4).flatten()
        metric.update(text, best.flatten(), match[text, best.flatten()], similarity[text, best.flatten()])
        assert values(metric.compute()) == values(staged().compute())

    def test_several_texts_of_a_video(self):
        """Texts 0 and 2 belong to video 7: for that video text 2 counts."""
        metric = TwoStageRecall(10)
        text, video = torch.arange(3).repeat_interleave(2), torch.tensor([7, 9] * 3)
        match = torch.tensor([0.9, 0.1, 0.3, 0.8, 0.5, 0.6])
        metric.update(text, video, match, match, torch.tensor([7, 7, 9, 9, 7, 7]))
        found = values(metric.compute())
        assert found["t2v_r1"] == pytest.approx(200 / 3)
        assert found["v2t_r1"] == pytest.approx(50.0)  # video 9 has text 1; of video 7 text 2 stands behind text 0
        assert found["v2t_mean_rank"] == pytest.approx(1.5)


def answers(part=slice(None)):
    generator = torch.Generator().manual_seed(0)
    metric = AnswerAccuracy()
    logits = torch.randn(40, 6, generator=generator)
    target = torch.where(torch.rand(40, generator=generator) < 0.5, logits.argmax(1), -1)
    kind = torch.randint(4, (40,), generator=generator)  # none asks "when"
    for rows in torch.arange(40).split([11, 19, 10])[part]:
        metric.update(logits[rows], target[rows], kind[rows])
    return metric, logits, target, kind


class TestAnswers:
    def test_is_the_plain_count(self):
        metric, logits, target, kind = answers()
        right = [int(row.argmax()) == int(label) for row, label in zip(logits, target, strict=True)]
        expected = {"accuracy": 100 * np.mean(right)}
        for number, name in enumerate(("what", "who", "how", "where")):
            expected[name] = 100 * np.mean([one for one, its in zip(right, kind, strict=True) if its == number])
        found = values(metric.compute())
        assert np.isnan(found.pop("when"))
        assert found == pytest.approx(expected)

    def test_ranks_share_the_work(self):
        whole = values(answers()[0].compute())
        for found in on_ranks(lambda rank: values(answers(slice(rank, None, 2))[0].compute())):
            assert found == pytest.approx(whole, nan_ok=True)

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_before_anything_was_asked(self):
        assert all(np.isnan(value) for value in values(AnswerAccuracy().compute()).values())


X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
BAD_CALLS = {
    "ks": (lambda: TextVideoRecall(ks=(0,)), r"ks.*\(0,\)"),
    "no ks": (lambda: TextVideoRecall(ks=()), "ks"),
    "direction": (lambda: TextVideoRecall(direction="both"), "direction.*t2v.*both"),
    "ties": (lambda: TextVideoRecall(ties="mean"), "ties.*mean"),
    "chunk": (lambda: TextVideoRecall(chunk=0), "chunk.*0"),
    "videos": (lambda: TextVideoRecall().update(X, X[:1]), "videos"),
    "texts": (lambda: TextVideoRecall().update(X[0], X[0]), "texts"),
    "video_ids": (lambda: TextVideoRecall().update(X, X, Y[:1]), "video_ids"),
    "floating ids": (lambda: TextVideoRecall().update(X, X, X[:, 0]), "video_ids.*float32"),
    "candidates": (lambda: TwoStageRecall(0), "candidates.*0"),
    "text_ids": (lambda: TwoStageRecall().update(X, Y, X[:, 0], X[:, 0]), "text_ids"),
    "match": (lambda: TwoStageRecall().update(Y, Y, X, X[:, 0]), "match_scores"),
    "similarities": (lambda: TwoStageRecall().update(Y, Y, X[:, 0], X), "similarities"),
    "answer types": (lambda: AnswerAccuracy(("who", "who")), "answer_types.*who"),
    "the name of all": (lambda: AnswerAccuracy(("who", "accuracy")), "answer_types.*accuracy"),
    "logits": (lambda: AnswerAccuracy().update(X[0], Y, Y), "logits"),
    "answers": (lambda: AnswerAccuracy().update(X, Y[:1], Y), "target"),
    "floating answers": (lambda: AnswerAccuracy().update(X, X[:, 0], Y), "target.*float32"),
    "types": (lambda: AnswerAccuracy().update(X, Y, Y[:1]), "answer_type"),
    "targets": (lambda: TwoStageRecall().update(Y, Y, X[:, 0], X[:, 0], Y[:1]), "target_ids"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


def test_ids_in_some_updates_only():
    metric = TextVideoRecall()
    metric.update(X + 1, X + 1)
    metric.update(X + 1, X + 1, Y)
    with pytest.raises(ValueError, match=r"video_ids.*all updates or in none"):
        metric.compute()
