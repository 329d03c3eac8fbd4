"""Winoground and VALSE, read from files that these tests write by hand in the published layouts."""

import json

import pytest
from eqben_tree import KEYS, pixels, samples, save

from lightning_methods.datamodules import ValseDataModule, WinogroundDataModule


def winoground(folder, lines):
    path = folder / "examples.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return WinogroundDataModule(folder / "images", path, pixels, num_workers=0)


def example(number, tag, **change):
    return {
        "id": number,
        "image_0": f"ex_{number}_img_0",
        "image_1": f"ex_{number}_img_1",
        "caption_0": "an old person kisses a young person",
        "caption_1": "a young person kisses an old person",
        "tag": "Adjective-Age",
        "secondary_tag": "",
        "num_main_preds": 1,
        "collapsed_tag": tag,
    } | change


def test_winoground(tmp_path):
    for number in (7, 9):
        for place in (0, 1):
            save(tmp_path / "images" / f"ex_{number}_img_{place}.png", (number, place, 0))
    data = winoground(tmp_path, [json.dumps(example(9, "Relation")), json.dumps(example(7, "Object"))])
    first, second = samples(data)
    assert list(first) == [*KEYS, "subset", "sample"]
    assert first["image0"].tolist() == [9, 0, 0]
    assert first["image1"].tolist() == [9, 1, 0]
    assert (first["caption0"], first["caption1"]) == (example(9, "")["caption_0"], example(9, "")["caption_1"])
    assert data.subset_names == ("Object", "Relation")
    assert [int(row["subset"]) for row in (first, second)] == [1, 0]
    assert [int(row["sample"]) for row in (first, second)] == [9, 7]


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ([], ValueError, "there are no examples"),
        ([json.dumps(example(1, "Object")), "{"], ValueError, "examples.jsonl, entry in line 2: it is not JSON"),
        (["[]"], ValueError, r"entry in line 1: expected an object, found \[\]"),
        ([json.dumps(example("1", "Object"))], ValueError, "entry in line 1: 'id' must be an integer, found \"1\""),
        (
            [json.dumps(example(1, "Object"))],
            FileNotFoundError,
            "2 of 2 images .* first: ex_1_img_0.png.*winoground",
        ),
    ],
)
def test_winoground_errors(tmp_path, lines, error, message):
    with pytest.raises(error, match=message):
        winoground(tmp_path, lines).setup("test")


def item(image, votes, phenomenon="counting", **change):
    return {
        "dataset": "visual7w",
        "image_file": image,
        "caption": "There are exactly 2 zebras.",
        "foil": "There are exactly 4 zebras.",
        "linguistic_phenomena": phenomenon,
        "mturk": {"foil": 3 - votes, "caption": votes, "other": 0},
    } | change


def valse(folder, content):
    path = folder / "piece.json"
    path.write_text(json.dumps(content))
    return ValseDataModule(folder / "images", path, pixels, num_workers=0)


def test_valse_keeps_what_two_annotators_chose(tmp_path):
    for number in range(5):
        save(tmp_path / "images" / f"v7w_{number}.png", (number, 0, 0))
    content = {f"c_{number}": item(f"v7w_{number}.png", votes=number) for number in range(4)}
    content["unasked"] = item("v7w_4.jpg", 0, "existence", mturk=None)
    data = valse(tmp_path, content)
    rows = samples(data)
    assert [list(row) for row in rows] == [["image", "caption", "foil", "subset", "sample"]] * 3
    assert [row["image"][0].item() for row in rows] == [2, 3, 4]
    assert rows[0]["caption"] == "There are exactly 2 zebras."
    assert rows[0]["foil"] == "There are exactly 4 zebras."
    assert data.subset_names == ("counting", "existence")
    assert [int(row["subset"]) for row in rows] == [0, 0, 1]
    assert [int(row["sample"]) for row in rows] == [0, 1, 2]


def test_valse_as_eqben_converted_it(tmp_path):
    save(tmp_path / "images" / "a.png", (5, 0, 0))
    entry = {"image_0": "a.png", "image_1": "a.png", "caption_0": "right", "caption_1": "wrong"}
    (row,) = samples(valse(tmp_path, [entry]))
    assert (row["image"][0], row["caption"], row["foil"]) == (5, "right", "wrong")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "there are no items"),
        ({"a": item("x.png", 1)}, "there are no items"),
        ({"a": 3}, "entry a: expected an object"),
        ({"a": {"mturk": {"foil": 0}}}, "entry a/mturk: there is no 'caption'"),
        ({"a": item("x.png", 3, caption=None)}, "entry a: 'caption' must be text, found null"),
        ([3], "entry 0: expected an object, found 3"),
        (3, "expected a list, found 3"),
    ],
)
def test_valse_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        valse(tmp_path, content).setup("test")
