import io
import itertools
import pickle
import re
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from lightning_methods.datamodules import CIFAR100DistillDataModule

# --- files as they are on disk ---------------------------------------------------------


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


# --- splits, samples, pixels -----------------------------------------------------------


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


def test_cifar_batches_in_lightning_are_augmented_in_training_only(model, trainer, cifar):
    data = CIFAR100DistillDataModule(cifar, with_index=True)
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
def test_cifar_images_follow_the_precision_of_the_trainer(model, trainer, cifar, precision, dtype):
    trainer(precision=precision, limit_train_batches=1, limit_val_batches=1).fit(
        model, CIFAR100DistillDataModule(cifar)
    )
    assert model.seen["train"][0][0].dtype == model.seen["val"][0][0].dtype == dtype


# --- what can be wrong -----------------------------------------------------------------


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
