import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_methods.datamodules import CocoCaptionDataModule
from lightning_methods.datamodules._vocabulary import Vocabulary

CAPTIONS = {
    "train": [["a", "Cat", "sleeps"], ["a", "cat"], ["a", "dog", "and", "a", "cat", "play"]],
    "restval": [["a", "dog"]],
    "val": [["a", "zebra"], ["one", "cat"]],
    "test": [["a", "dog", "sleeps"]],
}


@pytest.fixture
def coco(tmp_path):
    """One image in each split, numbered 11, 12, ..., as a JPEG and as features of a 2 x 3 grid."""
    images = []
    for number, (split, captions) in enumerate(CAPTIONS.items(), start=11):
        folder = "train2014" if split == "train" else "val2014"
        sentences = [{"tokens": words, "raw": " ".join(words) + "."} for words in captions]
        images.append(
            {
                "filepath": folder,
                "filename": f"{number}.jpg",
                "cocoid": number,
                "imgid": number - 11,
                "split": split,
                "sentences": sentences,
            }
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / folder / f"{number}.jpg", quality=100)
        (tmp_path / "features").mkdir(exist_ok=True)
        grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 100 * number
        np.savez(tmp_path / "features" / f"{number}.npz", feat=grid)
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path


def data(root, stage="fit", **options):
    where = {} if "image_dir" in options else {"feature_dir": root / "features"}
    settings = {"min_count": 1, "max_words": 4, "captions_per_image": 2, "batch_size": 2, "num_workers": 0}
    module = CocoCaptionDataModule(root / "dataset_coco.json", **{**where, **settings, **options})
    module.setup(stage)
    return module


def test_training_has_captions_as_numbers_and_holds_restval(coco):
    module = data(coco)
    (batch,) = module.train_dataloader()
    assert sorted(batch["image_id"].tolist()) == [11, 12]
    assert batch["features"].shape == (2, 6, 4)
    assert batch["feature_mask"].all()
    row = batch["image_id"].tolist().index(11)
    assert torch.equal(batch["features"][row], torch.arange(24).view(6, 4) + 1100.0)
    words = module.vocabulary
    for said, read, counted in zip(*(batch[key].flatten(0, 1) for key in ("target", "input", "mask")), strict=True):
        length = int(counted.sum())
        assert said.shape == (5,)
        assert counted.tolist() == [True] * length + [False] * (5 - length)
        assert said[length - 1] == words.end
        assert read[0] == words.start
        assert torch.equal(read[1:length], said[: length - 1])
        assert words.decode(said) in {"a cat sleeps", "a cat", "a dog and a", "a dog"}
    assert words.decode(batch["target"][1 - row][0]) == "a dog"  # one caption, drawn twice


def test_captions_are_a_window_from_a_random_place_on(coco):
    torch.manual_seed(0)
    module = data(coco)
    index = next(place for place, image in enumerate(module.datasets["train"].images) if image.image_id == 11)
    seen = {tuple(map(module.vocabulary.decode, module.datasets["train"][index]["target"])) for _ in range(30)}
    assert seen == {("a cat sleeps", "a cat"), ("a cat", "a dog and a")}


@pytest.mark.parametrize(
    ("stage", "number", "references"),
    [
        ("fit", 13, ["a zebra", "one cat"]),
        ("validate", 13, ["a zebra", "one cat"]),
        ("test", 14, ["a dog sleeps"]),
    ],
)
def test_evaluation_has_captions_as_text(coco, stage, number, references):
    module = data(coco, stage)
    (batch,) = module.test_dataloader() if stage == "test" else module.val_dataloader()
    assert batch["image_id"].tolist() == [number]
    assert batch["references"] == [references]
    assert "target" not in batch
    assert len(module.vocabulary) == 10  # start, 6 words of the training captions, unknown, mask, end
    assert [len(image) for image in module.train_references] == [3, 1]


def test_images_in_place_of_features(coco):
    module = data(coco, image_dir=coco, transform=lambda image: torch.tensor(image.getpixel((0, 0))))
    (batch,) = module.train_dataloader()
    assert (batch["image"][:, 0] - batch["image_id"]).abs().max() <= 2


def test_regions_are_padded(coco):
    regions = {11: 3, 12: 5}
    for number, count in regions.items():
        np.savez(coco / "features" / f"{number}.npz", feat=np.full((count, 4), number, dtype=np.float32))
    (batch,) = data(coco).train_dataloader()
    assert batch["features"].shape == (2, 5, 4)
    for number, features, mask in zip(*(batch[key] for key in ("image_id", "features", "feature_mask")), strict=True):
        count = regions[int(number)]
        assert mask.tolist() == [place < count for place in range(5)]
        assert features[:count].eq(number).all()
        assert features[count:].eq(0).all()


def test_rare_words_share_a_number(coco):
    module = data(coco, min_count=2)
    words = module.vocabulary
    assert words.words == ["a", "cat", "dog", "UNK"]
    assert words.encode(["a", "zebra", "sleeps"]) == [1, 4, 4]
    assert (words.mask, words.end, len(words)) == (5, 6, 7)


def test_vocabulary_is_ordered_by_count_and_then_by_letters():
    assert Vocabulary([["b", "a", "c", "c"]], min_count=1).words == ["c", "a", "b", "UNK"]


@pytest.mark.parametrize(("captions", "count", "match"), [([["a"]], 2, "no word .* 2 times"), ([], 0, "min_count.*0")])
def test_an_empty_vocabulary(captions, count, match):
    with pytest.raises(ValueError, match=match):
        Vocabulary(captions, count)


def test_missing_features_are_counted(coco):
    for number in (11, 12):
        (coco / "features" / f"{number}.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 .*first: 11\.npz"):
        data(coco)


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda path: path.write_bytes(b"no array"), "cannot be read"),
        (lambda path: np.savez(path, other=np.zeros((2, 2))), "cannot be read.*feat"),
        (lambda path: np.savez(path, feat=np.zeros(3)), r"must be floats of shape \(N, D\).*\(3,\)"),
        (lambda path: np.savez(path, feat=np.zeros((2, 3), dtype=np.int64)), "must be floats.*int64"),
    ],
)
def test_damaged_features_are_named(coco, write, match):
    write(coco / "features" / "13.npz")
    with pytest.raises(ValueError, match=rf"13\.npz.*{match}"):
        list(data(coco).val_dataloader())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"split": "dev"}, "entry images/0: 'split' must be one of train, restval, val, test, found 'dev'"),
        ({"sentences": []}, "entry images/0: 'sentences' is empty"),
        ({"sentences": [{"raw": "a cat"}]}, "entry images/0/sentences/0: 'tokens' must be a list of words"),
        ({"sentences": [{"tokens": []}]}, "entry images/0/sentences/0: 'tokens' must be a list of words"),
        ({"cocoid": "11"}, "entry images/0: 'cocoid' must be an integer"),
    ],
)
def test_a_damaged_annotation_is_named(coco, change, match):
    path = coco / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(match)):
        data(coco)


def test_an_empty_split(coco):
    path = coco / "dataset_coco.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"images": content["images"][:2]}))
    with pytest.raises(ValueError, match="split 'val' has no images"):
        data(coco)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_dir": None},
        {"image_dir": "images"},
        {"min_count": 0},
        {"max_words": 0},
        {"captions_per_image": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"transform": "swin"},
    ],
)
def test_arguments_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        CocoCaptionDataModule("captions.json", **{"feature_dir": "features", **options})
