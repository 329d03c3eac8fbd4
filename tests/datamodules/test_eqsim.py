"""EqBen, read from files that these tests write by hand in the published layouts."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from eqben_tree import COLOURS, KEYS, QUADS, flat_list, module, objects, pixels, samples, save, write_images

from lightning_methods.datamodules import EqBenDataModule

WITH_UNDERSCORE = ("image_0", "image_1", "caption_0", "caption_1")
SUBSETS = [
    "eqbenag",
    "eqbenyoucook2",
    "eqbengebc",
    "eqbenkubric_loc",
    "eqbenkubric_attr",
    "eqbenkubric_cnt",
    "eqbensd",
]


@pytest.fixture
def eqben(tmp_path):
    return write_images(tmp_path)


def check_quads(data, numbers=(0, 1, 2, 3), first=0):
    rows = samples(data)
    assert [list(row) for row in rows] == [[*KEYS, "subset", "sample"]] * len(numbers)
    for row, number in zip(rows, numbers, strict=True):
        image0, image1, caption0, caption1 = QUADS[number]
        assert row["image0"].tolist() == list(COLOURS[image0])
        assert row["image1"].tolist() == list(COLOURS[image1])
        assert (row["caption0"], row["caption1"]) == (caption0, caption1)
        assert data.subset_names[row["subset"]] == image0.split("/")[0]
    assert [int(row["sample"]) for row in rows] == [first + number for number in range(len(numbers))]
    return rows


@pytest.mark.parametrize("keys", [KEYS, WITH_UNDERSCORE], ids=["image0", "image_0"])
def test_list_of_quadruples_in_both_spellings(eqben, keys):
    check_quads(module(eqben, objects(QUADS, keys)))


def test_files_of_single_subsets_in_their_nestings(eqben):
    ag, youcook2, kubric, dog = objects(QUADS)
    for entry in (ag, dog):
        entry["caption0"], entry["caption1"] = [entry["caption0"], "more"], [entry["caption1"]]
    files = {"ag": {"vid": {"person": [ag], "dog": [dog]}}, "youcook2": {"a": [youcook2]}, "kubric": [kubric]}
    for name, content in files.items():
        (eqben / f"{name}.json").write_text(json.dumps(content))
    options = {"transform": pixels, "num_workers": 0}
    data = EqBenDataModule(eqben / "image", [eqben / f"{name}.json" for name in files], **options)
    check_quads(data, numbers=(0, 3, 1, 2))
    alone = EqBenDataModule(eqben / "image", str(eqben / "youcook2.json"), **options)
    check_quads(alone, numbers=(1,))


def test_labelled_pairs_stay_pairs_in_the_order_of_the_file(eqben):
    shuffled, _, _ = flat_list()
    data = module(eqben, shuffled)
    rows = samples(data)
    assert [list(row) for row in rows] == [["image", "caption", "subset", "sample", "corner"]] * 16
    corners = {"c0i0": 0, "c1i0": 1, "c0i1": 2, "c1i1": 3}
    for row, entry in zip(rows, shuffled, strict=True):
        assert row["image"].tolist() == list(COLOURS[entry["image"]])
        assert row["caption"] == entry["caption"]
        info = entry["private_info"]
        assert data.subset_names[row["subset"]] == info["dataset"]
        assert (row["sample"], row["corner"]) == (info["sample_cnt"], corners[info["name"]])
    assert data.entries[1].tolist() == [[place] for place in range(16)]


def test_labelled_pairs_as_quadruples_know_their_places_in_the_file(eqben):
    shuffled, _, _ = flat_list()
    data = module(eqben, shuffled, format="quads")
    rows = {int(row["sample"]): row for row in samples(data)}
    places = dict(zip(rows, data.entries[1].tolist(), strict=True))
    for number, quad in enumerate(QUADS):
        row = rows[100 + number]
        assert (row["caption0"], row["caption1"]) == quad[2:]
        assert row["image1"].tolist() == list(COLOURS[quad[1]])
        four = [(shuffled[place]["image"], shuffled[place]["caption"]) for place in places[100 + number]]
        assert four == [(quad[image], quad[2 + caption]) for image in (0, 1) for caption in (0, 1)]


def test_quadruples_as_pairs(eqben):
    data = module(eqben, objects(QUADS), format="flat")
    rows = samples(data)
    expected = [
        (quad[image], quad[2 + caption], number, 2 * image + caption)
        for number, quad in enumerate(QUADS)
        for image in (0, 1)
        for caption in (0, 1)
    ]
    found = [(row["image"].tolist(), row["caption"], int(row["sample"]), int(row["corner"])) for row in rows]
    assert found == [(list(COLOURS[name]), *rest) for name, *rest in expected]
    assert module(eqben, objects(QUADS)).entries[1].tolist() == torch.arange(16).view(4, 4).tolist()


def test_the_pair_of_label_files_labels_the_first_release(eqben):
    shuffled, infos, order = flat_list(labelled=False)
    folder = eqben / "src_file"
    folder.mkdir()
    (folder / "private_info.json").write_text(json.dumps(infos))
    (folder / "private_random_idx.json").write_text(json.dumps(order))
    published, _, _ = flat_list()
    expected = module(eqben, published, "published.json").entries[0]
    assert module(eqben, shuffled, labels=folder).entries[0] == expected
    # What the authors' script does with predictions, numbered here by their place in the file.
    canonical = np.arange(16)[np.argsort(order)]
    assert [infos[place] for place in np.argsort(canonical)] == [entry["private_info"] for entry in published]


def test_without_labels_there_are_pairs_only(eqben):
    shuffled, _, _ = flat_list(labelled=False)
    rows = samples(module(eqben, shuffled))
    assert [list(row) for row in rows] == [["image", "caption", "subset"]] * 16
    with pytest.raises(ValueError, match=r"does not say which .* format must be 'flat', or labels"):
        module(eqben, shuffled, format="quads").setup("test")


def test_subsets_are_kept_in_the_official_order(eqben):
    data = module(eqben, objects(QUADS), subsets=["eqbenkubric_cnt", "eqbenag"])
    assert data.subset_names == ("eqbenag", "eqbenkubric_cnt")
    rows = samples(data)
    assert [row["caption0"] for row in rows] == ["sits", "one box", "barks"]
    assert [int(row["subset"]) for row in rows] == [0, 1, 0]
    assert data.entries[1].tolist() == torch.arange(12).view(3, 4).tolist()
    shuffled, _, _ = flat_list()
    some = [entry for entry in shuffled if not entry["image"].startswith("eqbenyoucook2")]
    flat = module(eqben, shuffled, subsets=["eqbenkubric_cnt", "eqbenag"], format="quads")
    for quad, places in zip(*flat.entries, strict=True):
        assert [some[place]["image"] for place in places] == [quad.image0, quad.image0, quad.image1, quad.image1]


def test_all_seven_subsets_have_their_number():
    data = EqBenDataModule("images", "ann.json", pixels)
    assert data.subset_names == tuple(SUBSETS)


@pytest.mark.parametrize(("annotated", "there"), [(".png", ".jpg"), (".jpg", ".png")])
def test_light_images_go_with_the_full_annotation(eqben, annotated, there):
    name = f"eqbensd/x.y/1{annotated}"
    save((eqben / "image" / name).with_suffix(there), (10, 20, 30))
    quad = (name, "eqbenkubric_cnt/2.png", "a", "b")
    (row,) = samples(module(eqben, objects([quad])))
    assert (row["image0"] - torch.tensor([10, 20, 30])).abs().max() <= 3  # JPEG
    save(eqben / "image" / name, (90, 90, 90))  # what is annotated comes first
    (row,) = samples(module(eqben, objects([quad])))
    assert (row["image0"] - 90).abs().max() <= 3


def test_the_reader_goes_by_suffix_and_every_mode_becomes_rgb(eqben):
    save(eqben / "image" / "eqbenyoucook2/1.png", (1, 2, 3))
    save(eqben / "image" / "eqbensd/1.npy", (4, 5, 6))
    save(eqben / "image" / "eqbensd/2.png", (7, 7, 7), mode="L")
    quads = [("eqbenyoucook2/1.png", "eqbensd/1.npy", "a", "b"), ("eqbensd/2.png", "eqbensd/2.png", "a", "b")]
    first, second = samples(module(eqben, objects(quads)))
    assert (first["image0"].tolist(), first["image1"].tolist()) == ([1, 2, 3], [4, 5, 6])
    assert second["image0"].tolist() == [7, 7, 7]


def test_missing_images_are_counted_and_the_first_is_named(eqben):
    (eqben / "image" / QUADS[1][1]).unlink()
    shutil.rmtree(eqben / "image" / "eqbenkubric_cnt")
    message = f"3 of 8 images of .*ann.json are not under {re.escape(str(eqben / 'image'))}; first: {QUADS[1][1]}"
    with pytest.raises(FileNotFoundError, match=message + ".*Expected layout: <root>/<subset>/.*github.com/Wangt-CN"):
        module(eqben, objects(QUADS)).setup("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"no image"), "cannot be (decoded|read)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be (decoded|read)"),
        (lambda path: path.write_bytes(b""), "cannot be (decoded|read)"),
    ],
    ids=["text", "truncated", "empty"],
)
@pytest.mark.parametrize("number", [0, 1], ids=["png", "npy"])
def test_corrupt_images_are_named(eqben, change, message, number):
    path = eqben / "image" / QUADS[number][0]
    change(path)
    data = module(eqben, objects(QUADS))
    data.setup("test")
    with pytest.raises(ValueError, match=f"image {re.escape(str(path))} {message}"):
        list(data.test_dataloader())


@pytest.mark.parametrize(
    "array", [np.zeros((4, 6, 3)), np.zeros((4, 6), np.uint8), np.zeros((3, 4, 6), np.uint8), np.array([None])]
)
def test_arrays_must_be_images(eqben, array):
    path = eqben / "image" / QUADS[1][0]
    np.save(path, array, allow_pickle=True)
    data = module(eqben, objects(QUADS))
    data.setup("test")
    with pytest.raises(ValueError, match=f"image {re.escape(str(path))} (must be uint8|cannot be read)"):
        list(data.test_dataloader())


def without(key, place=1):
    quads = objects(QUADS)
    del quads[place][key]
    return quads


def relabelled(**change):
    shuffled, _, _ = flat_list()
    shuffled[2]["private_info"] = shuffled[2]["private_info"] | change
    return shuffled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "ann.json is not JSON: .*line 1"),
        ([], "there are no entries"),
        ({"a": []}, "there are no entries"),
        (without("caption1"), "ann.json, entry 1: there is no 'caption1' or 'caption_1'; its keys: .*'image0'"),
        (without("image0"), "ann.json, entry 1/image1: expected an object with one of 'image', 'image0', 'image_0'"),
        ({"vid": {"person": without("image1", 0)}}, "ann.json, entry vid/person/0: there is no 'image1' or 'image_1'"),
        ({"vid": ["x"]}, "ann.json, entry vid/0: expected an object .*found 'x'"),
        (objects([(*QUADS[0][:3], 7)]), "ann.json, entry 0: 'caption1' must be text, found 7"),
        (objects([(*QUADS[0][:3], [])]), r"ann.json, entry 0: 'caption1' must be text, found \[\]"),
        (objects([("x/1.png", *QUADS[0][1:])]), f"entry 0: image 'x/1.png' must begin with a subset.*{SUBSETS[-1]}"),
        ([*objects(QUADS), {"image": QUADS[0][0], "caption": "a"}], "entry 4: quadruples and single pairs are mixed"),
        (relabelled(name="c2i0"), "entry 2/private_info: 'name' must be one of c0i0, .*found 'c2i0'"),
        (relabelled(dataset="eqbensd"), "entry 2/private_info: 'dataset' is 'eqbensd', but the image is one of 'eqben"),
        (relabelled(sample_cnt="7"), "entry 2/private_info: 'sample_cnt' must be an integer, found \"7\""),
    ],
)
def test_damaged_annotations_name_file_and_entry(eqben, content, message):
    with pytest.raises(ValueError, match=message):
        module(eqben, content).setup("test")


def test_some_labels_are_missing(eqben):
    shuffled, _, _ = flat_list()
    del shuffled[3]["private_info"]
    with pytest.raises(ValueError, match="1 of 16 entries have no 'private_info', the others do"):
        module(eqben, shuffled).setup("test")


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_incomplete_quadruples_are_counted(eqben, change):
    shuffled, _, _ = flat_list()
    shuffled = shuffled[1:] if change == "missing" else [*shuffled, shuffled[0]]
    first = flat_list()[0][0]["private_info"]
    message = f"1 of 4 quadruples .* four pairs once; first: {first['dataset']} {first['sample_cnt']}"
    with pytest.raises(ValueError, match=message):
        module(eqben, shuffled, format="quads").setup("test")
    module(eqben, shuffled).setup("test")  # as single pairs they are no less than they say


def test_pairs_of_one_quadruple_agree(eqben):
    shuffled, _, _ = flat_list()
    shuffled[0]["caption"] = "something else"
    with pytest.raises(ValueError, match="disagree in their images or captions"):
        module(eqben, shuffled, format="quads").setup("test")


@pytest.mark.parametrize(
    ("infos", "order", "message"),
    [
        (slice(0, 15), slice(0, 16), "must hold a label for each of the 16 entries"),
        (slice(0, 16), slice(0, 15), "must hold a label for each of the 16 entries"),
        (slice(0, 16), [0] * 16, "each of 0 … 15 once"),
        (slice(0, 16), list(range(16)), "'dataset' is .*but the image is one of"),
    ],
)
def test_labels_must_fit_the_pairs(eqben, infos, order, message):
    shuffled, all_infos, all_order = flat_list(labelled=False)
    (eqben / "private_info.json").write_text(json.dumps(all_infos[infos]))
    order = all_order[order] if isinstance(order, slice) else order
    (eqben / "private_random_idx.json").write_text(json.dumps(order))
    with pytest.raises(ValueError, match=message):
        module(eqben, shuffled, labels=eqben).setup("test")


def test_labels_are_for_pairs_without(eqben):
    with pytest.raises(ValueError, match="labels are for single pairs"):
        module(eqben, objects(QUADS), labels=eqben).setup("test")
    with pytest.raises(FileNotFoundError, match=r"annotation .*private_info.json is missing"):
        module(eqben, flat_list(labelled=False)[0], labels=eqben).setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": ["eqbenag", "kubric"]}, f"subsets must be among {', '.join(SUBSETS)}; got 'kubric'"),
        ({"subsets": []}, "got none"),
        ({"format": "pairs"}, "format must be one of auto, flat, quads, got 'pairs'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"transform": "resnet50"}, 'transform must be a function, an image size, "timm:NAME" or "transformers:NAME"'),
        ({"transform": True}, "transform must be .*, got True"),
        ({"transform": 0}, "transform must be .*, got 0"),
        ({"tokenizer": "timm:resnet50"}, 'tokenizer must be None, a function or "transformers:NAME", got'),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        EqBenDataModule("images", "ann.json", **{"transform": 8} | options)


def test_a_subset_that_is_not_there(eqben):
    with pytest.raises(ValueError, match="has no entries in the subsets eqbensd"):
        module(eqben, objects(QUADS), subsets=["eqbensd"]).setup("test")


def test_missing_annotation(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotation .*nowhere.json is missing. Expected layout"):
        EqBenDataModule(tmp_path, tmp_path / "nowhere.json", 8).setup("test")


def test_annotation_in_another_encoding(eqben):
    data = module(eqben, objects(QUADS))
    data.annotation[0].write_bytes(b'[{"caption": "caf\xe9"}]')
    with pytest.raises(ValueError, match=r"ann.json is not text in UTF-8"):
        data.setup("test")


def test_workers_decode(eqben):
    check_quads(module(eqben, objects(QUADS), num_workers=2))
