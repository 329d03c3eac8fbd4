from itertools import pairwise

import pytest
import torch

from lightning_methods.datamodules import PhrasesDataModule
from lightning_methods.datamodules.acf_worlds import phrase_vote


def test_phrases_run_on_and_have_one_class_each():
    _, target, phrase = PhrasesDataModule(train_size=200).splits["train"]
    for classes, numbers in zip(target.tolist(), phrase.tolist(), strict=True):
        steps = [after - before for before, after in pairwise(numbers)]
        assert numbers[0] == 0
        assert set(steps) <= {0, 1}
        lengths = [numbers.count(number) for number in set(numbers)]
        assert max(lengths) <= 8
        assert len(set(zip(numbers, classes, strict=True))) == len(lengths)


def test_the_cue_marks_first_tokens():
    x, _, phrase = PhrasesDataModule().splits["test"]
    first = torch.diff(phrase, dim=1, prepend=torch.full((len(phrase), 1), -1)) == 1
    assert x[..., 6][first].mean() == pytest.approx(1, abs=0.01)
    assert x[..., 6][~first].mean() == pytest.approx(0, abs=0.01)
    assert x[..., 6][first].std() == pytest.approx(0.15, abs=0.01)


def test_half_of_the_tokens_show_their_class_and_some_of_the_others_by_chance():
    x, target, _ = PhrasesDataModule().splits["test"]
    shown = x[..., :6].argmax(2)
    assert (shown == target).float().mean() == pytest.approx(0.5 + 0.5 / 6, abs=0.01)


def test_a_vote_in_the_true_phrase_helps():
    x, target, phrase = PhrasesDataModule().splits["test"]
    assert (phrase_vote(x, phrase) == target).float().mean() == pytest.approx(0.82, abs=0.01)


def test_lengths_are_uniform():
    _, _, phrase = PhrasesDataModule(train_size=4000, length=40).splits["train"]
    lengths = (phrase[:, :, None] == torch.arange(3)).sum(1).flatten()  # of phrases that cannot have been cut off
    assert torch.bincount(lengths)[1:].tolist() == pytest.approx([1500] * 8, rel=0.15)


def test_seeds_draw_the_training_split_alone():
    first, again, other = (PhrasesDataModule(seed=seed).splits for seed in (0, 0, 1))
    for split in first:
        assert all(map(torch.equal, first[split], again[split]))
    assert not torch.equal(first["train"][0], other["train"][0])
    assert torch.equal(first["test"][0], other["test"][0])
    assert not torch.equal(first["val"][0][:10], first["test"][0][:10])


@pytest.mark.parametrize("name", ["train_size", "length", "max_phrase", "batch_size"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got 0"):
        PhrasesDataModule(**{name: 0})
