import io
import itertools
import pickle
import random
import re
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torchvision import transforms

from lightning_methods.datamodules import CIFAR100DistillDataModule, ImageNetDataModule, ImageNetLTDataModule

WNIDS = ["n01440764", "n01443537", "n01484850"]


class Recorder(LightningModule):
    """Keeps the batches that each kind of step was given."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.LazyLinear(1)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.head(batch[0].flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)
        self.head(batch[0].flatten(1))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)
        self.head(batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**kwargs):
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# --- CIFAR-100: files as they are on disk ---------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes and str with the opcodes of Python 2's `str`, as the official files have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str2(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        short = len(value) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(value)]) if short else pickle.BINSTRING + struct.pack("<i", len(value))
        )
        self.write(value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_str2


def python2(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def as_text(content):
    """The same dict with str keys, as people who re-pickle it have them."""
    return {key.decode(): value for key, value in content.items()}


DUMPS = {
    "python 2": python2,
    "python 3, protocol 2": lambda content: pickle.dumps(content, protocol=2),
    "python 3, protocol 4, str keys": lambda content: pickle.dumps(as_text(content), protocol=4),
    "python 3, protocol 5, str keys": lambda content: pickle.dumps(as_text(content), protocol=5),
    "python 3, numpy labels": lambda content: pickle.dumps(
        {key: np.array(value) if key == b"fine_labels" else value for key, value in content.items()}, protocol=5
    ),
    "python 3, column by column": lambda content: pickle.dumps(
        {key: np.asfortranarray(value) if key == b"data" else value for key, value in content.items()}, protocol=2
    ),
    "python 3, big-endian labels": lambda content: pickle.dumps(
        {key: np.array(value, ">i2") if key == b"fine_labels" else value for key, value in content.items()}
    ),
    "python 3, list of numpy labels": lambda content: pickle.dumps(
        {key: list(np.array(value)) if key == b"fine_labels" else value for key, value in content.items()}
    ),
}


def cifar_content(per_class, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(100), per_class)).tolist()
    pixels = np.random.default_rng(seed + 1).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {
        b"filenames": [b"some_thing_s_%06d.png" % number for number in range(len(labels))],
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": labels,
        b"coarse_labels": [label // 5 for label in labels],
        b"data": pixels,
    }


TRAIN, TEST = cifar_content(3, seed=0), cifar_content(1, seed=10)
META = {
    b"fine_label_names": [b"name%d" % label for label in range(100)],
    b"coarse_label_names": [b"group%d" % label for label in range(20)],
}


@pytest.fixture
def cifar(tmp_path):
    return write_cifar(tmp_path, python2)


def write_cifar(root, dump):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, content in (("train", TRAIN), ("test", TEST), ("meta", META)):
        (folder / name).write_bytes(dump(content))
    return root


def test_python2_files_of_these_tests_are_what_python_reads_as_such(cifar):
    with (cifar / "cifar-100-python" / "train").open("rb") as file:
        content = pickle.load(file, encoding="bytes")
    assert content.keys() == TRAIN.keys()
    np.testing.assert_array_equal(content[b"data"], TRAIN[b"data"])
    assert b"_codecs" not in (cifar / "cifar-100-python" / "train").read_bytes()


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar_reads_every_way_of_pickling_the_files(tmp_path, dump):
    data = CIFAR100DistillDataModule(write_cifar(tmp_path, dump))
    for split, content in (("train", TRAIN), ("test", TEST)):
        images, targets = data.splits[split]
        assert images.dtype == torch.uint8
        assert targets.dtype == torch.int64
        assert targets.tolist() == content[b"fine_labels"]
        np.testing.assert_array_equal(images.flatten(1).numpy(), content[b"data"])
        # 1,024 bytes each of red, green and blue, row by row
        for channel, row, column in ((0, 0, 1), (1, 2, 0), (2, 31, 30)):
            assert images[5, channel, row, column] == content[b"data"][5, 1024 * channel + 32 * row + column]
    assert data.class_names == [f"name{label}" for label in range(100)]


def test_cifar_reading_leaves_numpy_without_deprecation_warnings(cifar, recwarn):
    CIFAR100DistillDataModule(cifar).setup("fit")
    assert not [warning for warning in recwarn if "numpy" in str(warning.message)]


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cifar_files_cannot_run_code(cifar, name):
    marker = cifar / "was_run"
    path = cifar / "cifar-100-python" / name
    path.write_bytes(pickle.dumps({b"data": Payload(Path.touch, marker)}))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*it asks for pathlib"):
        _ = CIFAR100DistillDataModule(cifar).class_names if name == "meta" else CIFAR100DistillDataModule(cifar).splits
    assert not marker.exists()


def test_cifar_files_cannot_reach_other_codecs(cifar):
    path = cifar / "cifar-100-python" / "train"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(ValueError, match="encoding 'rot13'"):
        CIFAR100DistillDataModule(cifar).setup("fit")


def test_cifar_files_cannot_lay_objects_over_bytes(cifar):
    """`numpy.ndarray` called with an object dtype and a buffer makes pointers out of the file's bytes."""
    path = cifar / "cifar-100-python" / "train"
    for call in (
        Payload(np.ndarray, (1,), np.dtype("O"), b"A" * 8),
        Payload(np.ndarray, (1,), "O", b"A" * 8),
        Payload(np.zeros(1).__reduce_ex__(5)[0], b"A" * 8, np.dtype("V8"), (1,), "C"),
        Payload(np.zeros(1).__reduce_ex__(5)[0], b"A" * 8, np.dtype("O"), (1,), "C"),
        Payload(np.int64(0).__reduce__()[0], np.dtype("O"), b"A" * 8),
        np.array([None]),
    ):
        path.write_bytes(pickle.dumps({b"data": call, b"fine_labels": [0]}))
        with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read"):
            CIFAR100DistillDataModule(cifar).setup("fit")


# --- CIFAR-100: splits, samples, pixels -----------------------------------------------------------


def test_cifar_validates_on_the_test_images_unless_told_otherwise(cifar):
    data = CIFAR100DistillDataModule(cifar)
    assert torch.equal(data.splits["val"][0], data.splits["test"][0])
    assert len(data.splits["train"][0]) == 300


def test_cifar_holds_out_the_same_images_of_every_class_for_every_seed(cifar):
    train, val = (
        CIFAR100DistillDataModule(cifar, val_per_class=1, with_index=True).splits[s] for s in ("train", "val")
    )
    assert val[1].bincount().tolist() == [1] * 100
    assert train[1].bincount().tolist() == [2] * 100
    together = torch.cat([train[0], val[0]]).flatten(1).tolist()
    assert sorted(together) == sorted(TRAIN[b"data"].tolist())
    other = CIFAR100DistillDataModule(cifar, val_per_class=1, seed=9).splits["val"]
    assert torch.equal(val[0], other[0])
    assert len(val) == 2


def test_cifar_index_is_the_place_in_the_file(cifar):
    data = CIFAR100DistillDataModule(cifar, val_per_class=1, with_index=True)
    indices = []
    for images, targets, index in data.train_dataloader():
        np.testing.assert_array_equal(images.flatten(1).numpy(), TRAIN[b"data"][index.numpy()])
        assert targets.tolist() == np.array(TRAIN[b"fine_labels"])[index.numpy()].tolist()
        indices += index.tolist()
    assert len(set(indices)) == 200
    assert indices != sorted(indices)
    assert all(len(batch) == 2 for batch in data.test_dataloader())


def plain(images):
    mean = torch.tensor([0.5071, 0.4867, 0.4408]).view(3, 1, 1)
    std = torch.tensor([0.2675, 0.2565, 0.2761]).view(3, 1, 1)
    return (images / 255 - mean) / std


def test_cifar_evaluation_scales_and_normalises(cifar):
    data = CIFAR100DistillDataModule(cifar)
    images = data.splits["test"][0]
    torch.testing.assert_close(data.prepare(images, augment=False), plain(images))


def crop(image, top, left, mirrored):
    part = image[:, top : top + 32, left : left + 32]
    return part.flip(-1) if mirrored else part


def test_cifar_augmentation_is_a_crop_of_the_padded_image_perhaps_mirrored(cifar):
    torch.manual_seed(0)
    data = CIFAR100DistillDataModule(cifar)
    images = data.splits["train"][0][:64]
    augmented = data.prepare(images, augment=True)
    # Padding is black before normalisation, hence padded as uint8.
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    found = []
    for image, result in zip(padded, augmented, strict=True):
        candidates = [
            (top, left, mirrored)
            for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            if torch.allclose(plain(crop(image, top, left, mirrored)), result, atol=1e-4)
        ]
        assert len(candidates) == 1
        found += candidates
    tops, lefts, mirrored = zip(*found, strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    assert 16 < sum(mirrored) < 48


def test_cifar_batches_in_lightning_are_augmented_in_training_only(cifar):
    data, model = CIFAR100DistillDataModule(cifar, with_index=True), Recorder()
    torch.manual_seed(0)
    trainer().fit(model, data)
    trainer().test(model, data, verbose=False)
    assert [len(batch[0]) for batch in model.seen["train"]] == [64, 64, 64, 64, 44]
    everything = plain(torch.from_numpy(TRAIN[b"data"]).view(-1, 3, 32, 32))
    unchanged = [
        torch.allclose(image, everything[number], atol=1e-4)
        for images, _, index in model.seen["train"]
        for image, number in zip(images, index, strict=True)
    ]
    assert sum(unchanged) < 20  # one in 162 is expected to come out as it was
    expected = plain(torch.from_numpy(TEST[b"data"]).view(-1, 3, 32, 32))
    for split in ("val", "test"):
        batches = model.seen[split][-2:]  # before them, Lightning's sanity check saw both batches too
        torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
        assert torch.cat([targets for _, targets in batches]).tolist() == TEST[b"fine_labels"]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_cifar_images_follow_the_precision_of_the_trainer(cifar, precision, dtype):
    model = Recorder()
    trainer(precision=precision, limit_train_batches=1, limit_val_batches=1).fit(
        model, CIFAR100DistillDataModule(cifar)
    )
    assert model.seen["train"][0][0].dtype == model.seen["val"][0][0].dtype == dtype


# --- CIFAR-100: what can be wrong -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cifar_missing_file_says_where_and_how_to_get_it(cifar, name):
    path = cifar / "cifar-100-python" / name
    path.unlink()
    data = CIFAR100DistillDataModule(cifar)
    pattern = re.escape(f"{path} is missing. Expected layout: <root>/cifar-100-python/") + ".*cs.toronto.edu"
    with pytest.raises(FileNotFoundError, match=pattern):
        _ = data.class_names if name == "meta" else data.setup("fit")


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_cifar_truncated_file_is_named(cifar, length):
    path = cifar / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read .*cs.toronto.edu"):
        CIFAR100DistillDataModule(cifar).setup("fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop(b"fine_labels"),
            "has no fine_labels; its keys: ['batch_label', 'coarse_labels', 'data', 'filenames']",
        ),
        (lambda c: [c.pop(b"fine_labels"), c.pop(b"data")], "has no data and no fine_labels"),
        (
            lambda c: c.update({b"data": c[b"data"][:, :3000]}),
            "data must be uint8 of shape (N, 3072), found uint8 (300, 3000)",
        ),
        (lambda c: c.update({b"data": c[b"data"].astype(np.float32)}), "found float32 (300, 3072)"),
        (lambda c: c[b"fine_labels"].pop(), "fine_labels must be 300 integers, one per image, found int64 (299,)"),
        (lambda c: c.update({b"fine_labels": [0.5] * 300}), "found float64 (300,)"),
        (
            lambda c: c[b"fine_labels"].__setitem__(slice(7, 9), [100, -1]),
            "2 of 300 fine_labels are outside 0 … 99; first: fine_labels[7] = 100",
        ),
    ],
)
def test_cifar_wrong_content_is_described(cifar, change, message):
    content = {**TRAIN, b"fine_labels": list(TRAIN[b"fine_labels"])}
    change(content)
    path = cifar / "cifar-100-python" / "train"
    path.write_bytes(python2(content))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        CIFAR100DistillDataModule(cifar).setup("fit")


def test_cifar_files_that_are_something_else(cifar):
    (cifar / "cifar-100-python" / "train").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="must hold a dict, found list"):
        CIFAR100DistillDataModule(cifar).setup("fit")
    (cifar / "cifar-100-python" / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"one"]}))
    with pytest.raises(ValueError, match="fine_label_names must be 100 names, found 1"):
        _ = CIFAR100DistillDataModule(cifar).class_names


def test_cifar_refuses_arguments(cifar):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CIFAR100DistillDataModule(cifar, batch_size=0)
    with pytest.raises(ValueError, match="val_per_class must not be negative, got -1"):
        CIFAR100DistillDataModule(cifar, val_per_class=-1)
    with pytest.raises(ValueError, match=r"val_per_class must be below 3, .*; got 3"):
        CIFAR100DistillDataModule(cifar, val_per_class=3).setup("fit")


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
    train = torch.cat([target for _, target in data.train_dataloader()])
    assert sorted(train.tolist()) == [0, 0, 1, 1, 2, 2]  # the incomplete batch of 2 is kept


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


def test_imagenet_evaluates_without_the_training_folder(imagenet):
    (imagenet / "train").rename(imagenet / "elsewhere")
    data, model = small(imagenet), Recorder()
    trainer().validate(model, data, verbose=False)
    trainer().test(model, data, verbose=False)
    for split in ("val", "test"):
        assert [target.tolist() for _, target in model.seen[split]] == [[0, 1, 2]]


def test_imagenet_trains(imagenet):
    model = Recorder()
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


def test_imagenet_lt_trains_and_drops_the_incomplete_batch(imagenet_lt):
    data, model = small_lt(imagenet_lt), Recorder()
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
