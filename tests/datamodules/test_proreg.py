import io
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule
from torchvision import transforms

from lightning_methods.callbacks import ProReg
from lightning_methods.datamodules import (
    ArrowClassificationDataModule,
    BARDataModule,
    DomainNetDataModule,
    NICODataModule,
    PACSDataModule,
)

SMALL = {"batch_size": 4, "num_workers": 0}


def picture(seed, size=(40, 30)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def save(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def clip(image):
    """CLIP's preprocessing, as in its repository."""
    return transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )(image)


def listed(dataset, root):
    """(path under root, label, group) of each sample."""
    paths = [Path(path).relative_to(root).as_posix() for path in dataset.paths]
    return list(zip(paths, dataset.labels, dataset.groups, strict=True))


# --- BAR ------------------------------------------------------------------------------------------

ACTIONS = ["climbing", "diving", "fishing", "racing", "throwing", "vaulting"]


@pytest.fixture
def bar(tmp_path):
    for label, name in enumerate(ACTIONS):
        written = "pole vaulting" if name == "vaulting" else name
        for number in range(4):
            save(tmp_path / "train" / f"{written}_{number}.jpg", seed=10 * label + number)
        save(tmp_path / "test" / f"{name}_7.jpg", seed=100 + label, size=(300, 260))
    return tmp_path


def test_bar_classes_are_read_off_the_names(bar):
    data = BARDataModule(bar, val_fraction=0.25, **SMALL)
    data.setup("fit")
    data.setup("test")
    assert data.classes == ACTIONS
    train, val = (listed(data.datasets[split], bar) for split in ("train", "val"))
    everything = {
        (f"train/{'pole vaulting' if name == 'vaulting' else name}_{number}.jpg", label, 0)
        for label, name in enumerate(ACTIONS)
        for number in range(4)
    }
    assert set(train) | set(val) == everything
    assert not set(train) & set(val)
    assert sorted(label for _, label, _ in val) == list(range(6))  # a quarter of each class
    assert listed(data.datasets["test"], bar) == [(f"test/{n}_7.jpg", i, 0) for i, n in enumerate(ACTIONS)]


def test_bar_holds_the_same_images_out_every_time(bar):
    def held_out():
        data = BARDataModule(bar, val_fraction=0.25, **SMALL)
        torch.rand(1)
        data.setup("validate")
        return data.datasets["val"].paths

    assert held_out() == held_out()
    whole = BARDataModule(bar, val_fraction=0.0, **SMALL)
    whole.setup("fit")
    assert (len(whole.datasets["train"]), len(whole.datasets["val"])) == (24, 0)


def test_evaluation_prepares_as_clip_and_training_augments(bar):
    data = BARDataModule(bar, **SMALL)
    data.setup("fit")
    data.setup("test")
    sample = data.datasets["test"][2]
    assert torch.equal(sample.image, clip(Image.open(bar / "test" / "fishing_7.jpg")))
    assert (sample.label, sample.group, sample.index) == (2, 0, 2)
    train = data.datasets["train"]
    plain = clip(Image.open(train.paths[0]))
    drawn = [train[0].image for _ in range(12)]
    assert all(image.shape == (3, 224, 224) for image in drawn)
    changed = [not torch.equal(image, plain) for image in drawn]
    assert sum(changed) >= 8
    augment = train.transform.augment
    assert augment.num_layers == 2
    assert {(op.magnitude, op.prob, op.magnitude_std) for op in augment.ops} == {(3, 1.0, 0)}  # 9 of 30, always


def test_batches_are_tuples_with_names(bar):
    data = BARDataModule(bar, **SMALL)
    data.setup("fit")
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [len(batch.image) for batch in batches] == [4, 2]
    image, label, *_ = batches[0]
    assert torch.equal(batches[0][0], image)
    assert label.tolist() == [0, 1, 2, 3]
    assert batches[1].index.tolist() == [4, 5]
    orders = [torch.cat([batch.index for batch in data.train_dataloader()]) for _ in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) > 1
    assert all(order.sort().values.tolist() == list(range(24)) for order in orders)


class Tuned(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.LazyLinear(6))
        self.seen = []

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch):
        self.seen.append(batch)
        image, label, *_ = batch
        return torch.nn.functional.cross_entropy(self(image), label)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_prompt_logits_come_by_the_number_of_the_sample(bar, tmp_path, trainer):
    torch.manual_seed(0)
    zero_shot = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(147, 6))
    file = tmp_path / "prompts.pt"
    saved = BARDataModule(bar, 0.25, **SMALL).save_prompt_logits(zero_shot, file)
    assert saved.shape == (18, 6)
    assert not saved.requires_grad

    data = BARDataModule(bar, 0.25, prompt_logits=file, **SMALL)
    module = Tuned()
    method = ProReg(prompt="batch.prompt_logits")
    trainer(limit_val_batches=0, callbacks=[method]).fit(module, data)
    assert len(module.seen) == 5
    for batch in module.seen:
        torch.testing.assert_close(batch.prompt_logits, saved[batch.index])
        # of the very images that the model sees: nothing is augmented
        torch.testing.assert_close(batch.prompt_logits, zero_shot(batch.image).detach())
    assert {index for batch in module.seen for index in batch.index.tolist()} == set(range(18))
    assert not hasattr(data.datasets["val"][0], "prompt_logits")


@pytest.mark.parametrize("shape", [(23, 6), (24, 5), (24,)])
def test_prompt_logits_of_other_data_are_refused(bar, tmp_path, shape):
    torch.save(torch.zeros(shape), tmp_path / "prompts.pt")
    data = BARDataModule(bar, prompt_logits=tmp_path / "prompts.pt", **SMALL)
    with pytest.raises(ValueError, match=re.escape(f"must have shape (24, 6), got {shape}")):
        data.setup("fit")
    data.setup("test")


def test_missing_prompt_logits_say_how_to_make_them(bar, tmp_path):
    data = BARDataModule(bar, prompt_logits=tmp_path / "none.pt", **SMALL)
    with pytest.raises(FileNotFoundError, match=r"none\.pt is missing; BARDataModule\.save_prompt_logits writes it"):
        data.setup("fit")


def test_bar_errors(bar):
    with pytest.raises(ValueError, match=r"val_fraction must lie in \[0, 1\), got 1"):
        BARDataModule(bar, val_fraction=1)
    save(bar / "train" / "juggling_1.jpg")
    with pytest.raises(ValueError, match=r"1 of 25 images are of no known class; first: .*juggling_1\.jpg"):
        BARDataModule(bar, **SMALL).setup("fit")
    for path in (bar / "test").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no image.*alinlab/BAR"):
        BARDataModule(bar, **SMALL).setup("test")
    (bar / "test").rmdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f"folder {bar / 'test'} is missing")):
        BARDataModule(bar, **SMALL).setup("test")


# --- PACS -----------------------------------------------------------------------------------------

DOMAINS = ["photo", "art_painting", "cartoon", "sketch"]


@pytest.fixture
def pacs(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for domain in DOMAINS:
        lines = {"train": [("dog", 1, "a")], "crossval": [("giraffe", 3, "b")]}
        lines["test"] = lines["train"] + lines["crossval"] + [("person", 7, "c")]
        for kind, entries in lines.items():
            text = "".join(f"{domain}/{name}/pic_{stem}.png {label}\n" for name, label, stem in entries)
            (lists / f"{domain}_{kind}_kfold.txt").write_text(text)
        for name, _, stem in lines["test"]:
            save(tmp_path / "kfold" / domain / name / f"pic_{stem}.png")
    return tmp_path


@pytest.mark.parametrize("kept", DOMAINS)
def test_pacs_keeps_a_domain_for_testing(pacs, kept):
    data = PACSDataModule(pacs, kept, pacs / "lists", **SMALL)
    data.setup("fit")
    data.setup("test")
    assert data.classes[2] == "giraffe"
    assert list(data.domains) == DOMAINS
    others = [(group, domain) for group, domain in enumerate(DOMAINS) if domain != kept]
    assert listed(data.datasets["train"], pacs) == [(f"kfold/{d}/dog/pic_a.png", 0, g) for g, d in others]
    assert listed(data.datasets["val"], pacs) == [(f"kfold/{d}/giraffe/pic_b.png", 2, g) for g, d in others]
    group = DOMAINS.index(kept)
    test = listed(data.datasets["test"], pacs)
    assert [(label, of) for _, label, of in test] == [(0, group), (2, group), (6, group)]
    assert len(next(iter(data.test_dataloader())).image) == 3


def test_pacs_errors(pacs):
    with pytest.raises(ValueError, match=r"test_domain must be one of photo, .*, got 'clipart'"):
        PACSDataModule(pacs, "clipart")
    with pytest.raises(FileNotFoundError, match=r"photo_train_kfold\.txt is missing\. Expected layout: <root>/kfold"):
        PACSDataModule(pacs).setup("fit")
    file = pacs / "lists" / "photo_train_kfold.txt"
    file.write_text("photo/dog/pic_a.png 0\nphoto/dog/pic_a.png 8\nphoto/dog/pic_a.png 1\n")
    with pytest.raises(ValueError, match=r"2 of 3 lines .*; first: line 1, .*outside 1 … 7"):
        PACSDataModule(pacs, lists=pacs / "lists").setup("fit")
    file.write_text("photo/dog/pic_z.png 1\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images of .*; first: line 1, .*pic_z\.png\. .*kfold"):
        PACSDataModule(pacs, lists=pacs / "lists").setup("fit")


# --- DomainNet ------------------------------------------------------------------------------------


@pytest.fixture
def domainnet(tmp_path):
    for domain in ("sketch", "clipart", "painting", "real"):
        for kind, names in (("train", ["axe", "axe", "zebra"]), ("test", ["zebra"])):
            lines = []
            for number, name in enumerate(names):
                path = f"{domain}/{name}/{kind}_{number}.jpg"
                save(tmp_path / path)
                lines.append(f"{path} {['axe', 'bat', 'zebra'].index(name)}\n")
            (tmp_path / f"{domain}_{kind}.txt").write_text("".join(lines))
    return tmp_path


def test_domainnet_trains_on_one_domain_and_tests_on_the_union_of_others(domainnet):
    data = DomainNetDataModule(domainnet, num_classes=3, **SMALL)
    data.setup("fit")
    assert data.classes == ["axe", "", "zebra"]
    data.setup("test")
    assert data.classes == ["axe", "", "zebra"]
    assert data.domains == ("sketch", "clipart", "painting", "real")
    assert listed(data.datasets["train"], domainnet) == [
        ("sketch/axe/train_0.jpg", 0, 0),
        ("sketch/axe/train_1.jpg", 0, 0),
        ("sketch/zebra/train_2.jpg", 2, 0),
    ]
    assert listed(data.datasets["val"], domainnet) == [("sketch/zebra/test_0.jpg", 2, 0)]
    (batch,) = data.test_dataloader()
    assert batch.group.tolist() == [1, 2, 3]
    other = DomainNetDataModule(domainnet, "real", ["sketch"], num_classes=3, **SMALL)
    other.setup("test")
    assert listed(other.datasets["test"], domainnet) == [("sketch/zebra/test_0.jpg", 2, 1)]


def test_domainnet_errors(domainnet):
    with pytest.raises(ValueError, match=r"sketch_train\.txt: .*outside 0 … 1"):
        DomainNetDataModule(domainnet, num_classes=2, **SMALL).setup("fit")
    path = domainnet / "sketch_train.txt"
    path.write_text(path.read_text() + "sketch/zebra/train_2.jpg 0\n")
    with pytest.raises(ValueError, match="label 0 is that of 'axe' and of 'zebra'"):
        DomainNetDataModule(domainnet, num_classes=3, **SMALL).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"quickdraw_test\.txt is missing.*M3SDA"):
        DomainNetDataModule(domainnet, test_domains=["quickdraw"], num_classes=3).setup("test")


# --- NICO -----------------------------------------------------------------------------------------


@pytest.fixture
def nico(tmp_path):
    lines = {
        "train": [("bear/on snow/1.jpg", 0, 4), ("cow/at home/2.jpg", 2, 0)],
        "val": [("cow/at home/3.jpg", 2, 0)],
        "test": [("bear/in water/4.jpg", 0, 1)],
    }
    for split, entries in lines.items():
        for path, _, _ in entries:
            save(tmp_path / "Animal" / path)
        (tmp_path / f"{split}.txt").write_text("".join(f"{path} {label} {group}\n" for path, label, group in entries))
    return tmp_path


def some_nico(root, subset="Animal"):
    return NICODataModule(root, subset, root / "train.txt", root / "val.txt", root / "test.txt", **SMALL)


def test_nico_is_split_by_the_users_lists(nico):
    data = some_nico(nico)
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == 10
    assert data.classes == ["bear", "", "cow"]
    root = nico / "Animal"
    assert listed(data.datasets["train"], root) == [("bear/on snow/1.jpg", 0, 4), ("cow/at home/2.jpg", 2, 0)]
    assert listed(data.datasets["val"], root) == [("cow/at home/3.jpg", 2, 0)]
    assert listed(data.datasets["test"], root) == [("bear/in water/4.jpg", 0, 1)]


def test_nico_errors(nico):
    with pytest.raises(ValueError, match="subset must be one of Animal, Vehicle, got 'Plant'"):
        some_nico(nico, "Plant")
    with pytest.raises(FileNotFoundError, match=r"2 of 2 images of .*Vehicle; first: line 1, bear"):
        some_nico(nico, "Vehicle").setup("fit")
    for line, message in (("bear/on snow/1.jpg 0", "no label"), ("a", "no group"), ("a/b/c.jpg 0 x", "no group")):
        (nico / "train.txt").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"1 of 1 lines are not .* label group.*{message}"):
            some_nico(nico).setup("fit")
    (nico / "train.txt").write_text("a/b/c.jpg 10 0\n")
    with pytest.raises(ValueError, match="outside 0 … 9"):
        some_nico(nico).setup("fit")


# --- Arrow ----------------------------------------------------------------------------------------


def encoded(seed, form):
    content = io.BytesIO()
    picture(seed).convert("L" if form == "PNG" else "RGB").save(content, form)
    return content.getvalue()


def write_arrow(path, labels, first=0, **columns):
    images = [encoded(first + i, "PNG" if i % 2 else "JPEG") for i in range(len(labels))]
    table = pa.table({"image": pa.array(images, pa.binary()), "label": labels, **columns})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)  # several record batches
    return images


@pytest.fixture
def arrow(tmp_path):
    write_arrow(tmp_path / "sketch_train.arrow", [2, 0, 1], source=["a", "b", "c"])
    write_arrow(tmp_path / "photo_train.arrow", [1, 1], first=10)
    write_arrow(tmp_path / "sketch_test.arrow", [0], first=20)
    (tmp_path / "names.txt").write_text("dog\nguitar player\nhouse\n")
    return tmp_path


def some_arrow(root, **settings):
    files = {"train": ["sketch_train", "photo_train"], "val": ["sketch_test"], "test": ["sketch_test"]}
    return ArrowClassificationDataModule(root, **{**files, "num_classes": 3, **SMALL, **settings})


def test_arrow_files_of_a_split_follow_one_another(arrow):
    data = some_arrow(arrow, class_names=arrow / "names.txt")
    data.setup("fit")
    assert data.classes == ["dog", "guitar player", "house"]
    train = data.datasets["train"]
    assert (list(train.labels), list(train.groups)) == ([2, 0, 1, 1, 1], [0, 0, 0, 1, 1])
    for index, seed in enumerate([0, 1, 2, 10, 11]):
        expected = Image.open(io.BytesIO(encoded(seed, "PNG" if seed % 2 else "JPEG"))).convert("RGB")
        assert np.array_equal(np.asarray(train.image(index)), np.asarray(expected))
    (batch,) = data.val_dataloader()
    assert torch.equal(batch.image[0], clip(picture_in(arrow / "sketch_test.arrow")))


def picture_in(path):
    table = pa.ipc.open_file(str(path)).read_all()
    return Image.open(io.BytesIO(table["image"][0].as_py())).convert("RGB")


def test_arrow_images_are_pickled_without_their_files(arrow):
    data = some_arrow(arrow)
    data.setup("test")
    dataset = data.datasets["test"]
    pickled = pickle.dumps(dataset)
    assert encoded(20, "JPEG")[100:140] not in pickled
    assert torch.equal(pickle.loads(pickled)[0].image, dataset[0].image)


def test_arrow_errors(arrow):
    with pytest.raises(FileNotFoundError, match=re.escape(f"file {arrow / 'none.arrow'} is missing")):
        some_arrow(arrow, train=["sketch_train", "none"]).setup("fit")
    (arrow / "text.arrow").write_text("no table" * 20)
    with pytest.raises(ValueError, match=r"text\.arrow is not in Arrow's IPC file format"):
        some_arrow(arrow, test=["text"]).setup("test")
    with pytest.raises(ValueError, match=r"sketch_train\.arrow: the labels must lie in 0 … 1, got 2"):
        some_arrow(arrow, num_classes=2).setup("fit")
    with pytest.raises(ValueError, match=r"class_names must be 4, one for each class, got 3 in .*names\.txt"):
        some_arrow(arrow, num_classes=4, class_names=arrow / "names.txt").setup("fit")
    table = pa.table({"img": [b"1"], "label": [0]})
    with pa.OSFile(str(arrow / "other.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"other\.arrow has no column image; it has img, label"):
        some_arrow(arrow, test=["other"]).setup("test")
    with pa.OSFile(str(arrow / "bad.arrow"), "wb") as sink:
        table = pa.table({"image": [b"no image"], "label": [0]})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    data = some_arrow(arrow, test=["bad"])
    data.setup("test")
    with pytest.raises(ValueError, match=r"image 0 of .*bad\.arrow cannot be decoded"):
        list(data.test_dataloader())


def test_arrow_without_pyarrow(arrow, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-methods\[arrow\]\""):
        some_arrow(arrow).setup("test")
