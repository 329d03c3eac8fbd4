"""The rendered benchmarks: what is drawn is what is said, and every layout reads back."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_methods.datamodules import (
    EqBenDataModule,
    RetrievalDataModule,
    SyntheticEqBen,
    SyntheticEqBenDataModule,
    ValseDataModule,
    WinogroundDataModule,
)
from lightning_methods.datamodules._eqben_files import EQBEN_SUBSETS
from lightning_methods.datamodules._scenes import VALUES, Scene, changed, describe, draw_scene, render
from lightning_methods.datamodules.eqsim_scenes import CHANGES

PLAIN = Scene("two", "large", "solid", "red", "square", "at the top", "black")


def array(image):
    return torch.from_numpy(np.array(image))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestScenes:
    @pytest.mark.parametrize("tail", [True, False])
    def test_frequent_values_come_first_or_all_are_equally_frequent(self, tail):
        random = np.random.default_rng(0)
        drawn = [draw_scene(random, tail=tail) for _ in range(2000)]
        for field, values in VALUES.items():
            counts = Counter(getattr(scene, field) for scene in drawn)
            weights = [0.5**place if tail else 1.0 for place in range(len(values))]
            for value, weight in zip(values, weights, strict=True):
                assert counts[value] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)

    @pytest.mark.parametrize("field", VALUES)
    def test_a_change_changes_one_field_to_any_other_value(self, field):
        random = np.random.default_rng(0)
        found = {changed(PLAIN, field, random) for _ in range(60)}
        assert {getattr(scene, field) for scene in found} == set(VALUES[field]) - {getattr(PLAIN, field)}
        for scene in found:
            assert scene._replace(**{field: getattr(PLAIN, field)}) == PLAIN

    def test_captions_tell_all_scenes_apart(self):
        random = np.random.default_rng(0)
        scenes = {draw_scene(random, tail=False) for _ in range(500)}
        for saying in range(5):
            assert len({describe(scene, saying) for scene in scenes}) == len(scenes)
        assert len({describe(PLAIN, saying) for saying in range(5)}) == 5

    def test_pictures_show_what_the_captions_say(self):
        """Coloured pixels are counted and located."""
        picture = render([PLAIN], seed=3, size=64).astype(int)
        red = (picture[:, :, 0] > 150) & (picture[:, :, 1] < 110)
        assert red[:32].sum() > 100
        assert red[32:].sum() == 0
        areas = {number: self.red(PLAIN._replace(number=number)) for number in ("one", "two", "three", "four")}
        for count, number in enumerate(areas, start=1):
            assert areas[number] == pytest.approx(count * areas["one"], rel=0.35)
        assert self.red(PLAIN._replace(size="small")) < 0.6 * areas["two"]
        assert self.red(PLAIN._replace(fill="hollow")) < 0.8 * areas["two"]
        assert self.red(PLAIN._replace(shape="circle")) < 0.9 * areas["two"]
        assert self.red(PLAIN._replace(colour="blue")) == 0
        places = {"at the top": red.T, "on the left": red, "at the bottom": red.T, "on the right": red}
        for place in places:
            shown = render([PLAIN._replace(place=place)], seed=3, size=64).astype(int)
            rows, columns = np.nonzero((shown[:, :, 0] > 150) & (shown[:, :, 1] < 110))
            middle = {"at the top": rows < 32, "at the bottom": rows >= 32, "on the left": columns < 32}
            assert middle.get(place, columns >= 32).all()
        grounds = [render([PLAIN._replace(ground=ground)], 3, 64)[40:].mean() for ground in ("black", "grey", "white")]
        assert grounds == sorted(grounds)
        assert grounds[0] < 50
        assert grounds[2] > 200

    def red(self, scene):
        picture = render([scene], seed=3, size=64).astype(int)
        return int(((picture[:, :, 0] > 150) & (picture[:, :, 1] < 110)).sum())

    def test_one_seed_gives_two_scenes_one_nuisance(self):
        first, second = (render([PLAIN._replace(number=number)], 5, 64).astype(int) for number in ("three", "four"))
        differs = np.abs(first - second).max(2) > 0
        assert 0 < differs.sum() < 0.1 * differs.size  # the fourth square, and nothing else
        other = render([PLAIN._replace(number="three")], 6, 64)
        assert (np.abs(first - other).max(2) > 0).mean() > 0.9


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    SyntheticEqBen(seed=4, image_size=16).write_eqben(folder, quads_per_subset=5)
    return folder


class TestEqBen:
    def read(self, folder, name, **options):
        paths = [folder / "annotation" / one for one in ([name] if isinstance(name, str) else name)]
        data = EqBenDataModule(folder / "images", paths, array, batch_size=64, num_workers=0, **options)
        data.setup("test")
        return data, next(iter(data.test_dataloader()))

    def test_every_annotation_says_the_same(self, written):
        whole, batch = self.read(written, "private_info_global.json")
        assert whole.subset_names == EQBEN_SUBSETS
        assert batch["subset"].bincount().tolist() == [5] * 7
        assert batch["sample"].tolist() == list(range(35))
        _, single = self.read(written, [f"{name}.json" for name in EQBEN_SUBSETS])
        _, flat = self.read(written, "ann_json_finegrained_random.json", format="quads")
        order = flat["sample"].argsort()
        for key in ("image0", "image1"):
            assert torch.equal(single[key], batch[key])
            assert torch.equal(flat[key][order], batch[key])
        for key in ("caption0", "caption1"):
            assert single[key] == batch[key] == [flat[key][place] for place in order]

    def test_labels_apart_are_those_in_the_file(self, written, tmp_path):
        published = json.loads((written / "annotation/ann_json_finegrained_random.json").read_text())
        assert [entry["private_info"]["sample_cnt"] for entry in published] != sorted(range(140), key=lambda x: x // 4)
        (tmp_path / "first.json").write_text(
            json.dumps([{key: entry[key] for key in ("image", "caption")} for entry in published])
        )
        labelled, _ = self.read(written, "ann_json_finegrained_random.json")
        paths = written / "images", tmp_path / "first.json"
        apart = EqBenDataModule(*paths, array, labels=written / "annotation", num_workers=0)
        assert apart.entries[0] == labelled.entries[0]

    def test_each_subset_changes_its_field_in_words_and_picture(self, written):
        def parsed(caption):
            return {field: [v for v in values if f" {v}" in f" {caption}"] for field, values in VALUES.items()}

        _, batch = self.read(written, "private_info_global.json")
        rows = zip(*(batch[key] for key in ("subset", "caption0", "caption1", "image0", "image1")), strict=True)
        for subset, caption0, caption1, image0, image1 in rows:
            first, second = parsed(caption0), parsed(caption1)
            assert all(len(value) == 1 for value in (*first.values(), *second.values()))
            assert [field for field in VALUES if first[field] != second[field]] == [list(CHANGES.values())[subset]]
            assert not torch.equal(image0, image1)

    def test_arrays_hold_blue_first(self, tmp_path):
        SyntheticEqBen(image_size=16).write_eqben(tmp_path, quads_per_subset=20)
        quads = json.loads((tmp_path / "annotation/private_info_global.json").read_text())
        found = []
        for quad in quads:
            if not quad["image0"].endswith(".npy"):
                continue
            blue, _, red = np.load(tmp_path / "images" / quad["image0"]).astype(float).mean((0, 1))
            words = quad["caption0"].split()
            found += [(red > blue) == ("red" in words)] if {"red", "blue"} & set(words) else []
        assert all(found)
        assert len(found) > 5
        assert sum(path.suffix == ".npy" for path in (tmp_path / "images").rglob("*.*")) == 40

    def test_numbers_decide_the_files(self, written, tmp_path):
        for seed, same in ((4, True), (5, False)):
            SyntheticEqBen(seed, image_size=16).write_eqben(tmp_path / str(seed), quads_per_subset=5)
            assert (files(tmp_path / str(seed)) == files(written)) is same


def test_winoground_swaps_the_colours_in_words_and_picture(tmp_path):
    SyntheticEqBen(image_size=16).write_winoground(tmp_path, examples=6)
    data = WinogroundDataModule(tmp_path / "images", tmp_path / "examples.jsonl", array, num_workers=0)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert data.subset_names == ("Both", "Object", "Relation")
    for first, second in zip(batch["caption0"], batch["caption1"], strict=True):
        assert first != second
        assert sorted(first.split()) == sorted(second.split())
    assert all(not torch.equal(one, two) for one, two in zip(batch["image0"], batch["image1"], strict=True))


def test_valse_changes_the_number(tmp_path):
    SyntheticEqBen(image_size=16).write_valse(tmp_path, items=8)
    data = ValseDataModule(tmp_path / "images", tmp_path / "counting.json", array, num_workers=0)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert len(batch["image"]) == 6
    for caption, foil in zip(batch["caption"], batch["foil"], strict=True):
        assert caption.split()[0] in VALUES["number"]
        assert foil.split()[0] in set(VALUES["number"]) - {caption.split()[0]}


@pytest.mark.parametrize("dataset", ["flickr30k", "coco"])
def test_retrieval_reads_back(tmp_path, dataset):
    SyntheticEqBen(image_size=16).write_retrieval(tmp_path, dataset, train=6, val=3, test=2)
    annotation = tmp_path / f"dataset_{dataset}.json"
    options = {"transform": array, "batch_size": 5, "num_workers": 0, "use_restval": dataset == "coco"}
    data = RetrievalDataModule(tmp_path, annotation, dataset, **options)
    data.setup("fit")
    data.setup("test")
    assert len(data.datasets["train"][0]) == 5 * (9 if dataset == "coco" else 6)
    assert [len(part) for part in data.datasets["val"]] == [3, 15]
    assert [len(part) for part in data.datasets["test"]] == [2, 10]


def test_training_captions_mention_a_share_of_the_fields(tmp_path):
    SyntheticEqBen(image_size=8).write_retrieval(tmp_path, train=100, val=20, test=20, detail=0.5)
    images = json.loads((tmp_path / "dataset_flickr30k.json").read_text())["images"]
    lengths = {
        split: [len(one["tokens"]) for image in images if image["split"] == split for one in image["sentences"]]
        for split in ("train", "val", "test")
    }
    whole = sum(lengths["test"]) / len(lengths["test"])
    assert sum(lengths["train"]) / len(lengths["train"]) == pytest.approx(whole / 2, rel=0.05)
    assert min(lengths["val"] + lengths["test"]) >= 10


class TestDataModule:
    def make(self, folder, **options):
        sizes = {"train_images": 8, "quads_per_subset": 2, "eval_images": 3, "image_size": 16, "batch_size": 10}
        return SyntheticEqBenDataModule(folder, **sizes | options)

    def test_batches(self, tmp_path):
        data = self.make(tmp_path)
        data.prepare_data()
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert [list(batch) for batch in batches] == [["image", "text", "image_id"]] * 4
        assert batches[0]["image"].shape == (10, 3, 16, 16)
        data.setup("test")
        for loaders in (data.val_dataloader(), data.test_dataloader()):
            quads, images, texts = ([*loader] for loader in loaders)
            assert torch.cat([batch["subset"] for batch in quads]).tolist() == [n for n in range(7) for _ in (0, 1)]
            assert sum(len(batch["image"]) for batch in images) == 3
            assert sum(len(batch["text"]) for batch in texts) == 15
        val, test = (next(iter(loader[0]))["caption0"] for loader in (data.val_dataloader(), data.test_dataloader()))
        assert val != test
        assert data.subset_names == EQBEN_SUBSETS

    def test_files_are_written_once_and_not_mixed(self, tmp_path):
        self.make(tmp_path).prepare_data()
        before = files(tmp_path)
        self.make(tmp_path).prepare_data()
        assert files(tmp_path) == before
        with pytest.raises(ValueError, match=r"'detail': 1\.0.* but .*'detail': 0\.5.* choose another root"):
            self.make(tmp_path, detail=0.5).prepare_data()
        self.make(tmp_path, seed=1).prepare_data()
        assert {path.name for path in tmp_path.iterdir()} == {"seed-0", "seed-1"}

    def test_a_stopped_writing_starts_again(self, tmp_path, monkeypatch):
        def stopping(self, root, quads):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SyntheticEqBen, "write_eqben", stopping)
            with pytest.raises(KeyboardInterrupt):
                self.make(tmp_path).prepare_data()
        data = self.make(tmp_path)
        data.prepare_data()
        data.setup("test")
        assert [path.name for path in tmp_path.iterdir()] == ["seed-0"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train_images": 0}, "train_images must be at least 1, got 0"),
            ({"quads_per_subset": 0}, "quads_per_subset must be at least 1, got 0"),
            ({"eval_images": 0}, "eval_images must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"image_size": 4}, "image_size must be at least 8, got 4"),
            ({"detail": 0.0}, "detail must be above 0 and at most 1, got 0.0"),
            ({"detail": 1.1}, "detail must be above 0 and at most 1, got 1.1"),
        ],
    )
    def test_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(tmp_path, **options)
