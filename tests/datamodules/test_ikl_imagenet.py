import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lightning_methods.datamodules import ImageNetDataModule, ImageNetLTDataModule

WNIDS = ["n01440764", "n01443537", "n01484850"]


# --- ImageNet -------------------------------------------------------------------------------------


def save_jpeg(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path, "JPEG")


@pytest.fixture
def imagenet(tmp_path):
    for label, wnid in reversed(list(enumerate(WNIDS))):
        for number in range(2):
            save_jpeg(tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG", seed=10 * label + number)
        save_jpeg(tmp_path / "val" / wnid / f"ILSVRC2012_val_{label:08d}.JPEG", seed=100 + label, size=(500, 375))
    return tmp_path


def small(root, **kwargs):
    return ImageNetDataModule(root, batch_size=4, num_workers=0, num_classes=3, **kwargs)


def test_imagenet_labels_are_places_among_the_sorted_wnids(imagenet):
    data = small(imagenet)
    data.setup("fit")
    assert data.classes == WNIDS
    for split, count in (("train", 6), ("val", 3)):
        samples = data.datasets[split].samples
        assert len(samples) == count
        assert all(Path(path).parent == imagenet / split / WNIDS[label] for path, label in samples)
    assert torch.cat([target for _, target in data.val_dataloader()]).tolist() == [0, 1, 2]
    torch.manual_seed(0)
    orders = [torch.cat([target for _, target in data.train_dataloader()]).tolist() for _ in range(4)]
    assert all(sorted(order) == [0, 0, 1, 1, 2, 2] for order in orders)  # the incomplete batch of 2 is kept
    assert len({tuple(order) for order in orders}) > 1


def test_imagenet_evaluation_is_the_usual_resize_and_centre_crop(imagenet):
    data = small(imagenet)
    data.setup("validate")
    usual = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    for (image, _), (path, _) in zip(data.datasets["val"], data.datasets["val"].samples, strict=True):
        assert torch.equal(image, usual(Image.open(path)))


def test_imagenet_training_draws_crops_of_all_sizes_and_mirrors_half(tmp_path, imagenet):
    # Red rises to the right, green rises downwards: the colours of a crop tell where it came from.
    across, down = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 256))
    path = imagenet / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8)).save(path, "JPEG", quality=100)
    data = small(imagenet)
    data.setup("fit")
    torch.manual_seed(0)
    random.seed(0)
    drawn = torch.stack([data.datasets["train"][0][0] for _ in range(60)])
    assert drawn.shape == (60, 3, 224, 224)
    width = (drawn[:, 0, :, -1] - drawn[:, 0, :, 0]).mean(1) * 0.229
    height = (drawn[:, 1, -1] - drawn[:, 1, 0]).mean(1) * 0.224
    assert 15 < (width < 0).sum() < 45
    assert (height > 0).all()
    area = width.abs() * height
    assert 0.06 < area.min() < 0.2
    assert 0.8 < area.max() <= 1.01
    ratio = width.abs() / height
    assert 0.70 < ratio.min() < 0.9
    assert 1.1 < ratio.max() < 1.42
    # blue is 0 everywhere: no colour jitter, and normalised by the usual numbers
    torch.testing.assert_close(drawn[:, 2].mean(), torch.tensor(-0.406 / 0.225), atol=0.02, rtol=0)
    centre_red = drawn[:, 0].mean((1, 2)) * 0.229 + 0.485
    assert (centre_red - width.abs() / 2 > -0.02).all()


def test_imagenet_grey_images_become_rgb(imagenet):
    path = imagenet / "val" / WNIDS[0] / "ILSVRC2012_val_00000000.JPEG"
    Image.open(path).convert("L").save(path, "JPEG")
    data = small(imagenet)
    data.setup("validate")
    assert data.datasets["val"][0][0].shape == (3, 224, 224)


def test_imagenet_evaluates_without_the_training_folder(model, trainer, imagenet):
    (imagenet / "train").rename(imagenet / "elsewhere")
    data = small(imagenet)
    trainer().validate(model, data, verbose=False)
    trainer().test(model, data, verbose=False)
    for split in ("val", "test"):
        assert [target.tolist() for _, target in model.seen[split]] == [[0, 1, 2]]


def test_imagenet_trains(model, trainer, imagenet):
    trainer(num_sanity_val_steps=0).fit(model, small(imagenet))
    assert [len(images) for images, _ in model.seen["train"]] == [4, 2]
    assert model.seen["val"][0][0].shape == (3, 3, 224, 224)


@pytest.mark.parametrize("split", ["train", "val"])
def test_imagenet_missing_folder_says_where_and_how_to_get_it(imagenet, split):
    (imagenet / split).rename(imagenet / "elsewhere")
    pattern = re.escape(f"folder {imagenet / split} is missing. Expected layout: <root>/train/<wnid>/*.JPEG")
    with pytest.raises(FileNotFoundError, match=pattern + ".*image-net.org"):
        small(imagenet).setup("fit")


def test_imagenet_unsorted_validation_images_are_explained(imagenet):
    for path in (imagenet / "val").glob("*/*.JPEG"):
        path.rename(imagenet / "val" / path.name)
        path.parent.rmdir()
    pattern = (
        re.escape(f"{imagenet / 'val'} holds 0 class folders, expected num_classes=3.") + ".*sorted into one folder"
    )
    with pytest.raises(ValueError, match=pattern):
        small(imagenet).setup("fit")


def test_imagenet_other_classes_in_train_than_in_val(imagenet):
    (imagenet / "val" / WNIDS[1]).rename(imagenet / "val" / "n09999999")
    with pytest.raises(ValueError, match=f"same class folders; 2 are in one of them only; first: {WNIDS[1]}"):
        small(imagenet).setup("fit")


def test_imagenet_empty_class_folder(imagenet):
    for path in (imagenet / "train" / WNIDS[2]).iterdir():
        path.rename(path.with_suffix(".part"))
    with pytest.raises(FileNotFoundError, match=f"1 of 3 class folders in .*train hold no image; first: {WNIDS[2]}"):
        small(imagenet).setup("fit")


@pytest.mark.parametrize("content", [b"", b"no image at all", None], ids=["empty", "text", "truncated"])
def test_imagenet_undecodable_image_is_named(imagenet, content):
    path = imagenet / "val" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    data = small(imagenet)
    data.setup("test")
    with pytest.raises(ValueError, match=f"image {re.escape(str(path))} cannot be decoded"):
        list(data.test_dataloader())


@pytest.mark.parametrize(
    ("argument", "value", "least"), [("batch_size", 0, 1), ("num_workers", -1, 0), ("num_classes", 0, 1)]
)
@pytest.mark.parametrize("kind", [ImageNetDataModule, ImageNetLTDataModule])
def test_imagenet_refuses_arguments(kind, argument, value, least):
    with pytest.raises(ValueError, match=f"{argument} must be at least {least}, got {value}"):
        kind("data", **{argument: value})


# --- ImageNet-LT ----------------------------------------------------------------------------------

LT_TRAIN = [
    f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG 0",
    f"train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG 0",
    f"train/{WNIDS[2]}/{WNIDS[2]}_1.JPEG 2",
]
LT_TEST = [f"val/{wnid}/ILSVRC2012_val_{label:08d}.JPEG {label}" for label, wnid in enumerate(WNIDS)]
LT_VAL = [f"train/{WNIDS[1]}/{WNIDS[1]}_0.JPEG 1"]


@pytest.fixture
def imagenet_lt(imagenet):
    for split, lines in (("train", LT_TRAIN), ("val", LT_VAL), ("test", LT_TEST)):
        (imagenet / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    return imagenet


def small_lt(root, **kwargs):
    return ImageNetLTDataModule(root, batch_size=2, num_workers=0, num_classes=3, **kwargs)


def test_imagenet_lt_samples_are_those_of_the_lists(imagenet_lt):
    data = small_lt(imagenet_lt)
    data.setup("fit")
    data.setup("test")
    for split, lines in (("train", LT_TRAIN), ("val", LT_VAL), ("test", LT_TEST)):
        assert [
            f"{Path(path).relative_to(imagenet_lt)} {label}" for path, label in data.datasets[split].samples
        ] == lines
    assert torch.cat([target for _, target in data.test_dataloader()]).tolist() == [0, 1, 2]


def test_imagenet_lt_trains_and_drops_the_incomplete_batch(model, trainer, imagenet_lt):
    data = small_lt(imagenet_lt)
    trainer(num_sanity_val_steps=0).fit(model, data)
    trainer().test(model, data, verbose=False)
    assert [len(target) for _, target in model.seen["train"]] == [2]
    assert [target.tolist() for _, target in model.seen["val"]] == [[1]]
    assert [target.tolist() for _, target in model.seen["test"]] == [[0, 1], [2]]


def test_imagenet_lt_uses_the_transforms_of_imagenet(imagenet_lt):
    data, reference = small_lt(imagenet_lt), small(imagenet_lt)
    data.setup("fit")
    data.setup("test")
    reference.setup("fit")
    assert torch.equal(data.datasets["test"][1][0], reference.datasets["val"][1][0])
    draws = []
    for source in (data, reference):
        torch.manual_seed(3)
        random.seed(3)  # timm draws its crops here
        draws.append(source.datasets["train"][0][0])
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], data.datasets["train"][0][0])


def test_imagenet_lt_counts_the_training_classes_without_looking_at_images(imagenet_lt, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("no_images")
    counts = small_lt(elsewhere, lists=imagenet_lt).class_counts
    assert counts.tolist() == [2, 0, 1]
    assert counts.dtype == torch.int64


def test_imagenet_lt_needs_only_the_lists_of_its_stage(imagenet_lt):
    for split, stages in (("train", ["fit"]), ("val", ["fit", "validate"]), ("test", ["test"])):
        path = imagenet_lt / f"ImageNet_LT_{split}.txt"
        hidden = path.rename(path.with_suffix(".hidden"))
        for stage in ("fit", "validate", "test"):
            if stage in stages:
                with pytest.raises(FileNotFoundError, match=f"list {re.escape(str(path))} is missing.*OLTR"):
                    small_lt(imagenet_lt).setup(stage)
            else:
                small_lt(imagenet_lt).setup(stage)
        hidden.rename(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (
            ["train/a.JPEG 0", "train/b.JPEG", "train/c.JPEG x"],
            "2 of 3 lines .*; first: line 2, 'train/b.JPEG': no label",
        ),
        (["train/a.JPEG 0", "", "train/b.JPEG 0"], "1 of 3 lines .*; first: line 2, '': no label"),
        (["a.JPEG 3"], r"1 of 1 lines .*; first: line 1, 'a.JPEG 3': the label is outside 0 … 2"),
        (["a.JPEG 0", "a.JPEG -1", "a.JPEG"], "2 of 3 lines .*; first: line 2, 'a.JPEG -1': the label is outside"),
    ],
)
def test_imagenet_lt_bad_lines_are_counted_and_the_first_is_shown(imagenet_lt, lines, message):
    path = imagenet_lt / "ImageNet_LT_train.txt"
    path.write_text("\n".join(lines) + "\n")
    for use in (lambda data: data.setup("fit"), lambda data: data.class_counts):
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            use(small_lt(imagenet_lt))


def test_imagenet_lt_missing_images_are_counted_and_the_first_is_named(imagenet_lt):
    (imagenet_lt / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    (imagenet_lt / "train" / WNIDS[2]).rename(imagenet_lt / "gone")
    pattern = (
        f"2 of 3 images of {re.escape(str(imagenet_lt))}/ImageNet_LT_train.txt are not under "
        f"{re.escape(str(imagenet_lt))}; first: line 2, train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG"
    )
    with pytest.raises(FileNotFoundError, match=pattern):
        small_lt(imagenet_lt).setup("fit")


def test_imagenet_lt_paths_may_hold_blanks(imagenet_lt):
    save_jpeg(imagenet_lt / "my pictures" / "a b.JPEG", seed=0)
    (imagenet_lt / "ImageNet_LT_val.txt").write_text("my pictures/a b.JPEG 2\n")
    data = small_lt(imagenet_lt)
    data.setup("validate")
    assert data.datasets["val"][0][1] == 2
