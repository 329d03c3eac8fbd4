"""Flickr30K and COCO, read from files that these tests write by hand in the published layouts."""

import itertools
import json

import pytest
import torch
from eqben_tree import pixels, save

from lightning_methods.datamodules import RetrievalDataModule

CAPTIONS = {
    0: ("train", ["b dog", "a dog", "b dog "]),
    1: ("train", ["cat"]),
    2: ("restval", ["hen"]),
    3: ("val", ["cow", "ox"]),
    4: ("test", ["pig", "sow", "pig"]),
    5: ("test", ["hog"]),
}


def karpathy(folder, dataset="flickr30k", **options):
    images = []
    for number, (split, captions) in CAPTIONS.items():
        if dataset == "flickr30k" and split == "restval":
            continue
        place = "flickr30k-images" if dataset == "flickr30k" else ("train2014" if number < 2 else "val2014")
        save(folder / place / f"{number}.jpg", (number * 10,) * 3)
        sentences = [{"raw": text, "tokens": text.split(), "sentid": 0, "imgid": 50 + number} for text in captions]
        image = {"filename": f"{number}.jpg", "split": split, "sentences": sentences, "imgid": 50 + number}
        images.append(image | ({"filepath": place, "cocoid": 900} if dataset == "coco" else {"sentids": [0]}))
    path = folder / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    options = {"dataset": dataset, "transform": pixels, "batch_size": 2, "num_workers": 0} | options
    return RetrievalDataModule(folder, path, **options)


def trained_on(data):
    """(text, image, id) of all training samples, sorted; several passes, for an incomplete batch is left out."""
    data.setup("fit")
    assert all(len(batch["text"]) == 2 for batch in data.train_dataloader())
    return sorted((row["text"], int(row["image"][0]), row["image_id"]) for row in data.datasets["train"][0])


def evaluated_on(loaders):
    images, texts = (list(loader) for loader in loaders)
    ids = torch.cat([batch["image_id"] for batch in images]).tolist()
    assert [int(pixel) for batch in images for pixel in batch["image"][:, 0]] == [10 * (number - 50) for number in ids]
    words = [text for batch in texts for text in batch["text"]]
    owners = torch.cat([batch["image_id"] for batch in texts]).tolist()
    assert torch.cat([batch["text_id"] for batch in texts]).tolist() == list(range(len(words)))
    assert [list(batch) for batch in images + texts] == [["image", "image_id"]] * len(images) + [
        ["text", "image_id", "text_id"]
    ] * len(texts)
    return ids, list(zip(words, owners, strict=True))


TRAIN = [("a dog", 0, 50), ("b dog", 0, 50), ("cat", 10, 51)]
VAL = ([53], [("cow", 53), ("ox", 53)])
TEST = ([54, 55], [("pig", 54), ("sow", 54), ("hog", 55)])


@pytest.mark.parametrize("dataset", ["flickr30k", "coco"])
def test_retrieval_keeps_to_the_splits(tmp_path, dataset):
    data = karpathy(tmp_path, dataset)
    assert trained_on(data) == TRAIN
    assert evaluated_on(data.val_dataloader()) == VAL
    data.setup("test")
    assert evaluated_on(data.test_dataloader()) == TEST


@pytest.mark.parametrize("dataset", ["flickr30k", "coco"])
def test_official_splits_validate_on_test(tmp_path, dataset):
    data = karpathy(tmp_path, dataset, official_splits=True)
    assert trained_on(data) == sorted([*TRAIN, ("cow", 30, 53), ("ox", 30, 53)])
    assert evaluated_on(data.val_dataloader()) == TEST
    data.setup("test")
    assert evaluated_on(data.predict_dataloader()) == TEST


def test_captions_are_in_alphabetical_order(tmp_path):
    data = karpathy(tmp_path)
    sentences = [{"raw": f"{letter} dog"} for letter in "hgfedcbaabc"]
    change_image(data.annotation, sentences=sentences)
    data.setup("fit")
    texts = [row["text"] for row in data.datasets["train"][0] if row["image_id"] == 50]
    assert texts == [f"{letter} dog" for letter in "abcdefgh"]


def test_restval_joins_training_if_asked_for(tmp_path):
    assert trained_on(karpathy(tmp_path, "coco", use_restval=True)) == sorted([*TRAIN, ("hen", 20, 52)])
    with pytest.raises(ValueError, match="use_restval is for COCO; flickr30k has no such split"):
        karpathy(tmp_path, use_restval=True)


def test_retrieval_shuffles_training_and_transforms_it_apart(tmp_path):
    data = karpathy(tmp_path, train_transform=lambda image: pixels(image) + 1000, batch_size=1)
    data.setup("fit")
    torch.manual_seed(0)
    orders = {tuple(batch["text"][0] for batch in data.train_dataloader()) for _ in range(20)}
    assert orders == set(itertools.permutations(["a dog", "b dog", "cat"]))
    assert min(int(batch["image"].min()) for batch in data.train_dataloader()) >= 1000
    assert int(next(iter(data.val_dataloader()[0]))["image"][0, 0]) == 30


def test_retrieval_looks_for_images_of_its_stage_only(tmp_path):
    data = karpathy(tmp_path)
    for number in (4, 5):
        (tmp_path / "flickr30k-images" / f"{number}.jpg").unlink()
    data.setup("fit")
    data.setup("validate")
    message = r"2 of 2 images of .*dataset_flickr30k.json are not under .*; first: flickr30k-images/4.jpg.*Karpathy"
    with pytest.raises(FileNotFoundError, match=message):
        data.setup("test")


def change_image(path, **change):
    content = json.loads(path.read_text())
    content["images"][0] |= change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "entry images/0: 'split' must be one of train, restval, val, test, found 'dev'"),
        ({"filename": None}, "entry images/0: 'filename' must be text, found null"),
        ({"sentences": [{"tokens": []}]}, r"entry images/0/sentences/0: there is no 'raw'; its keys: \['tokens'\]"),
        ({"sentences": {}}, "entry images/0/sentences: expected a list, found {}"),
        ({"imgid": "x"}, "entry images/0: 'imgid' must be an integer, found \"x\""),
    ],
)
def test_retrieval_errors_name_file_and_entry(tmp_path, change, message):
    data = karpathy(tmp_path)
    change_image(data.annotation, **change)
    with pytest.raises(ValueError, match="dataset_flickr30k.json, " + message):
        data.setup("fit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "split 'train' has no captions"),
        ([], "there is no 'images'"),
        ({"dataset": "coco", "images": []}, "is that of 'coco', but dataset is 'flickr30k'"),
    ],
)
def test_retrieval_refuses_other_files(tmp_path, content, message):
    data = karpathy(tmp_path)
    data.annotation.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_retrieval_numbers_images_itself_if_the_file_does_not(tmp_path):
    data = karpathy(tmp_path)
    content = json.loads(data.annotation.read_text())
    for image in content["images"]:
        del image["imgid"]
    data.annotation.write_text(json.dumps(content))
    assert {owner for _, _, owner in trained_on(data)} == {0, 1}


def test_retrieval_refuses_other_data():
    with pytest.raises(ValueError, match="dataset must be one of flickr30k, coco, got 'cc3m'"):
        RetrievalDataModule("data", "ann.json", dataset="cc3m")
    with pytest.raises(ValueError, match="train_transform must be a function"):
        RetrievalDataModule("data", "ann.json", train_transform="augment")
