"""`lightning-methods eval-eqben` against the plainest evaluation, one image and one text at a time."""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch
from eqben_tree import QUADS, flat_list, objects, write_images
from PIL import Image
from torch.nn import functional as F

from lightning_methods.cli import main
from lightning_methods.commands import _progress, _score_parts, eval_eqben
from lightning_methods.datamodules import SyntheticEqBen
from lightning_methods.datamodules._text_image import read_image

SHARES = ("text", "image", "group")
#: A user's file. Its scores depend on the image and the text, and a little on how they are put together.
USER = """
    import torch

    calls = []
    stop_at = None

    def numbers(images, texts):
        calls.append(len(images))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        light = torch.tensor([float(sum(image.getpixel((0, 0)))) for image in images])
        length = torch.tensor([float(sum(map(ord, text))) for text in texts])
        return light, length

    def scores(images, texts):
        light, length = numbers(images, texts)
        return torch.sin(light * length)

    def embeddings(images, texts):
        light, length = numbers(images, texts)
        turns = torch.arange(1, 4)
        return torch.sin(light[:, None] * turns), torch.cos(length[:, None] * turns)

    def wrong(images, texts):
        return torch.zeros(len(images), 2)

    def wrong_embeddings(images, texts):
        return torch.zeros(len(images), 2), torch.zeros(len(images), 3)

    def broken(images, texts):
        raise ValueError("shapes do not fit")

    def undefined(images, texts):
        return [float("nan")] * len(images)

    number = 3
"""


@pytest.fixture(scope="module")
def clip(world, tmp_path_factory):
    """A random CLIP of transformers with its processor, as `save_pretrained` leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    annotation = (world / "eqben/annotation/private_info_global.json").read_text()
    captions = " ".join(quad[f"caption{number}"] for quad in json.loads(annotation) for number in (0, 1))
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *sorted(set(captions.split()))])}
    words["[EOS]"] = len(words)  # CLIP looks for the highest number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, words[name]) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small["attention_dropout"] = 0.5  # shows whether the model is in evaluation mode
    ids = {"bos_token_id": words["[BOS]"], "eos_token_id": words["[EOS]"], "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(words), "max_position_embeddings": 32},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    processor = CLIPProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names),
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(clip):
    """The cosine of one image file and one text."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)

    def cosine(path, text):
        inputs = processor(text=[text], images=read_image(str(path)), return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model(**inputs)
        return float(F.cosine_similarity(output.image_embeds, output.text_embeds))

    return cosine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """EqBen, Winoground and VALSE in their layouts."""
    folder = tmp_path_factory.mktemp("world")
    writer = SyntheticEqBen(image_size=16)
    writer.write_eqben(folder / "eqben", quads_per_subset=3)
    writer.write_winoground(folder / "winoground", examples=7)
    writer.write_valse(folder / "valse", items=8)
    return folder


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The user's current folder; returns the module in it, freshly imported."""
    (tmp_path / "my_model.py").write_text(textwrap.dedent(USER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import my_model

    yield my_model
    del sys.modules["my_model"]


def run(model, root, annotation, out, *more):
    annotations = annotation if isinstance(annotation, list) else [annotation]
    options = ["--model", model, "--root", root, "--annotation", *annotations, "--out", out, "--num-workers", 0]
    return main(["eval-eqben", *map(str, options), *map(str, more)])


def result(out):
    return json.loads((out / "result.json").read_text())["scores"]


def plain_shares(quadruples):
    """Text, image and group of a list of (s00, s01, s10, s11), counted one by one."""
    text = [s00 > s01 and s11 > s10 for s00, s01, s10, s11 in quadruples]
    image = [s00 > s10 and s11 > s01 for s00, s01, s10, s11 in quadruples]
    group = [both == (True, True) for both in zip(text, image, strict=True)]
    return {key: sum(hits) / len(hits) for key, hits in (("text", text), ("image", image), ("group", group))}


def plain_eqben(world, score):
    """Table and scores of all quadruples."""
    quads = json.loads((world / "eqben/annotation/private_info_global.json").read_text())
    images = world / "eqben" / "images"
    fours = [[score(images / quad[f"image{i}"], quad[f"caption{c}"]) for i in (0, 1) for c in (0, 1)] for quad in quads]
    subsets = [quad["image0"].split("/")[0] for quad in quads]
    rows = {
        name: plain_shares([four for four, subset in zip(fours, subsets, strict=True) if subset == name])
        for name in dict.fromkeys(subsets)
    }
    mean = {key: sum(row[key] for row in rows.values()) / len(rows) for key in SHARES}
    return {**rows, "mean over subsets": mean}, np.array(fours)


def same(table, expected):
    assert list(table) == list(expected)
    for name, row in expected.items():
        assert {key: table[name][key] for key in row} == pytest.approx(row, abs=1e-6)


class TestEqBen:
    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, world, plain):
        return plain_eqben(world, plain)

    def test_quadruples(self, world, clip, expected, tmp_path, capsys):
        annotation = world / "eqben/annotation/private_info_global.json"
        assert run(clip, world / "eqben/images", annotation, tmp_path / "out", "--batch-size", 4) == 0
        table, scores = expected
        same(result(tmp_path / "out"), table)
        prediction = np.load(tmp_path / "out" / "prediction.npy")
        assert prediction.dtype == np.float32
        np.testing.assert_allclose(prediction, scores.flatten(), atol=1e-5)
        rows = {line.rsplit(maxsplit=4)[0].strip(): line.split()[-4:] for line in capsys.readouterr().out.splitlines()}
        for name, row in table.items():
            shown = [f"{100 * row[key]:.2f}" for key in ("text", "image", "group")]
            assert rows[name] == ["21" if name.startswith("mean") else "3", *shown]

    @pytest.mark.parametrize("labels", ["in the file", "apart"])
    def test_flat_list_gives_the_same_and_a_prediction_in_its_order(
        self, world, clip, expected, plain, tmp_path, labels
    ):
        annotation = world / "eqben/annotation/ann_json_finegrained_random.json"
        entries, more = json.loads(annotation.read_text()), []
        if labels == "apart":
            annotation, more = tmp_path / "first_release.json", ["--labels", annotation.parent]
            annotation.write_text(json.dumps([{key: entry[key] for key in ("image", "caption")} for entry in entries]))
        assert run(clip, world / "eqben/images", annotation, tmp_path / "out", *more) == 0
        same(result(tmp_path / "out"), expected[0])
        wanted = [plain(world / "eqben/images" / entry["image"], entry["caption"]) for entry in entries]
        np.testing.assert_allclose(np.load(tmp_path / "out" / "prediction.npy"), wanted, atol=1e-5)

    def test_without_labels_there_is_a_prediction_only(self, clip, plain, tmp_path, capsys):
        write_images(tmp_path)
        entries, _, _ = flat_list(labelled=False)
        (tmp_path / "ann.json").write_text(json.dumps(entries))
        assert run(clip, tmp_path / "image", tmp_path / "ann.json", tmp_path / "out") == 0
        assert "no labels" in capsys.readouterr().out
        assert result(tmp_path / "out") == {}
        wanted = [plain(tmp_path / "image" / entry["image"], entry["caption"]) for entry in entries]
        np.testing.assert_allclose(np.load(tmp_path / "out" / "prediction.npy"), wanted, atol=1e-5)

    def test_subsets_and_several_files(self, world, clip, expected, tmp_path):
        files = [world / f"eqben/annotation/{name}.json" for name in ("eqbensd", "eqbenag", "eqbengebc")]
        more = "--subsets", "eqbensd", "eqbenag"
        assert run(clip, world / "eqben/images", files, tmp_path / "out", *more) == 0
        table = result(tmp_path / "out")
        assert list(table) == ["eqbenag", "eqbensd", "mean over subsets"]
        assert table["eqbensd"]["text"] == expected[0]["eqbensd"]["text"]
        rows = [expected[0][name] for name in ("eqbenag", "eqbensd")]
        mean = {key: sum(row[key] for row in rows) / 2 for key in SHARES}
        assert {key: table["mean over subsets"][key] for key in SHARES} == pytest.approx(mean)
        assert max(mean.values()) > 0


class TestFunctions:
    def score(self, function, user):
        """The user's function, one image and one text at a time."""

        def one(path, text):
            given = function([read_image(str(path))], [text])
            return float(F.cosine_similarity(*given)) if isinstance(given, tuple) else float(given)

        return one

    @pytest.mark.parametrize(("name", "rounds"), [("scores", 2), ("embeddings", 1)])
    def test_scores_and_embeddings(self, world, user, tmp_path, name, rounds):
        annotation = world / "eqben/annotation/private_info_global.json"
        assert run(f"my_model:{name}", world / "eqben/images", annotation, tmp_path / "out", "--batch-size", 8) == 0
        assert user.calls == [size for batch in (8, 8, 5) for size in [2 * batch] * rounds]
        table, scores = plain_eqben(world, self.score(getattr(user, name), user))
        np.testing.assert_allclose(np.load(tmp_path / "out" / "prediction.npy"), scores.flatten(), atol=1e-5)
        same(result(tmp_path / "out"), table)

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("my_model:wrong", "my_model:wrong was given 42 images and 42 texts .* it returned shape (42, 2)"),
            ("my_model:wrong_embeddings", "it returned two of shapes (42, 2) and (42, 3)"),
            ("my_model:nothing", "module my_model has no function 'nothing'"),
            ("my_model:number", "module my_model has no function 'number'"),
            ("no_such_file:scores", "No module named 'no_such_file'"),
        ],
    )
    def test_what_cannot_be_used_is_one_sentence(self, world, user, tmp_path, capsys, model, says):
        annotation = world / "eqben/annotation/private_info_global.json"
        assert run(model, world / "eqben/images", annotation, tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert all(part in error for part in says.split(" .* "))
        assert len(error.splitlines()) == 1

    def test_an_error_of_the_users_function_is_shown_where_it_was(self, world, user, tmp_path):
        annotation = world / "eqben/annotation/eqbensd.json"
        with pytest.raises(RuntimeError, match="my_model:broken failed") as raised:
            run("my_model:broken", world / "eqben/images", annotation, tmp_path / "out")
        assert str(raised.value.__cause__) == "shapes do not fit"

    def test_undefined_scores_are_wrong_and_said_to_be(self, world, user, tmp_path, capsys):
        annotation = world / "eqben/annotation/eqbensd.json"
        assert run("my_model:undefined", world / "eqben/images", annotation, tmp_path / "out") == 0
        assert "12 of 12 scores are NaN and count as wrong" in capsys.readouterr().err
        assert result(tmp_path / "out")["eqbensd"] == {"samples": 3, "text": 0, "image": 0, "group": 0}


class TestOtherBenchmarks:
    def test_winoground(self, world, clip, plain, tmp_path):
        annotation = world / "winoground/examples.jsonl"
        more = "--benchmark", "winoground", "--batch-size", 3
        assert run(clip, world / "winoground/images", annotation, tmp_path / "out", *more) == 0
        examples = [json.loads(line) for line in annotation.read_text().splitlines()]
        fours = [
            [
                plain(world / "winoground/images" / f"{one[f'image_{i}']}.png", one[f"caption_{c}"])
                for i in (0, 1)
                for c in (0, 1)
            ]
            for one in examples
        ]
        tags = {
            tag: [four for four, one in zip(fours, examples, strict=True) if one["collapsed_tag"] == tag]
            for tag in ("Both", "Object", "Relation")
        }
        same(
            result(tmp_path / "out"),
            {tag: plain_shares(own) for tag, own in tags.items()} | {"all": plain_shares(fours)},
        )

    @pytest.mark.parametrize("name", ["scores", "embeddings"])
    def test_valse(self, world, user, tmp_path, name):
        images, annotation = world / "valse/images", world / "valse/counting.json"
        assert run(f"my_model:{name}", images, annotation, tmp_path / "out", "--benchmark", "valse") == 0
        assert user.calls == [6, 6]  # of eight items two are not good enough
        items = [item for item in json.loads(annotation.read_text()).values() if item["mturk"]["caption"] > 1]
        one = TestFunctions().score(getattr(user, name), user)
        pairs = [[one(images / item["image_file"], item[key]) for key in ("caption", "foil")] for item in items]
        np.testing.assert_allclose(np.load(tmp_path / "out" / "prediction.npy"), np.array(pairs).flatten(), atol=1e-5)
        pairwise = sum(caption > foil for caption, foil in pairs) / 6
        assert result(tmp_path / "out") == {key: {"samples": 6, "pairwise": pairwise} for key in ("counting", "all")}

    @pytest.mark.filterwarnings("ignore:scores outside")
    def test_valse_with_probabilities(self, world, user, tmp_path):
        images, annotation = world / "valse/images", world / "valse/counting.json"
        more = "--benchmark", "valse", "--probabilities"
        assert run("my_model:scores", images, annotation, tmp_path / "out", *more) == 0
        caption, foil = np.load(tmp_path / "out" / "prediction.npy").reshape(-1, 2).T
        right = (caption > 0.5).mean(), (foil < 0.5).mean()
        assert result(tmp_path / "out")["all"] == pytest.approx(
            {"samples": 6, "accuracy": sum(right) / 2, "min_precision": min(right), "pairwise": (caption > foil).mean()}
        )

    def test_options_of_eqben_alone(self, world, user, tmp_path, capsys):
        more = "--benchmark", "winoground", "--subsets", "eqbenag"
        files = world / "winoground/images", world / "winoground/examples.jsonl"
        assert run("my_model:scores", *files, tmp_path / "out", *more) == 1
        assert "are for EqBen, not for winoground" in capsys.readouterr().err


class TestStopping:
    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch):
        monkeypatch.setattr(_score_parts, "_BATCHES", 2)

    def start(self, world, out, *more, model="my_model:scores"):
        annotation = world / "eqben/annotation/ann_json_finegrained_random.json"
        return run(model, world / "eqben/images", annotation, out, "--batch-size", 2, *more)

    @pytest.mark.parametrize("stop_at", [1, 2, 5, 8, 12, 20])
    def test_a_stopped_run_goes_on_to_the_same_bits(self, world, user, tmp_path, capsys, stop_at):
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        assert self.start(world, whole) == 0
        assert len(user.calls) == 22  # eleven batches, twice each
        user.calls.clear()
        user.stop_at = stop_at
        assert self.start(world, broken) == 130
        assert "Stopped. What was scored is kept; to go on: lightning-methods eval-eqben" in capsys.readouterr().err
        assert not (broken / "prediction.npy").exists()
        user.calls.clear()
        user.stop_at = None
        assert self.start(world, broken, "--resume") == 0
        finished = 2 * ((stop_at - 1) // 4)  # whole parts of two batches
        assert len(user.calls) == 22 - 2 * finished
        for name in ("prediction.npy", "result.json"):
            assert (broken / name).read_bytes() == (whole / name).read_bytes()

    def test_a_finished_run_is_not_scored_again(self, world, user, tmp_path):
        assert self.start(world, tmp_path / "out") == 0
        user.calls.clear()
        before = (tmp_path / "out" / "result.json").read_bytes()
        assert self.start(world, tmp_path / "out", "--resume") == 0
        assert user.calls == []
        assert (tmp_path / "out" / "result.json").read_bytes() == before

    def test_a_part_that_was_being_written_does_not_count(self, world, user, tmp_path, monkeypatch):
        save, saved = np.save, []

        def failing(path, scores):
            saved.append(path)
            save(path, scores)
            if len(saved) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(np, "save", failing)
        assert self.start(world, tmp_path / "out") == 130
        assert sorted(path.name for path in (tmp_path / "out/parts").iterdir()) == ["000000000.npy", "000000004.npy"]

    def test_results_are_not_overwritten_or_mixed(self, world, user, tmp_path, capsys):
        assert self.start(world, tmp_path / "out") == 0
        assert self.start(world, tmp_path / "out") == 2
        assert "already holds results: continue them with --resume" in capsys.readouterr().err
        assert self.start(world, tmp_path / "out", "--resume", model="my_model:embeddings") == 2
        assert 'model is "my_model:scores" there and "my_model:embeddings" here' in capsys.readouterr().err
        annotation = world / "eqben/annotation/ann_json_finegrained_random.json"
        copy = tmp_path / "ann.json"
        copy.write_bytes(annotation.read_bytes())
        assert run("my_model:scores", world / "eqben/images", copy, tmp_path / "copy") == 0
        copy.write_text(copy.read_text() + "\n")
        assert run("my_model:scores", world / "eqben/images", copy, tmp_path / "copy", "--resume") == 2
        assert "annotation." in capsys.readouterr().err


def test_workers_give_the_same_bits(world, clip, tmp_path):
    annotation = world / "eqben/annotation/private_info_global.json"
    for workers in (0, 1):
        out = tmp_path / str(workers)
        assert run(clip, world / "eqben/images", annotation, out, "--num-workers", workers, "--batch-size", 8) == 0
    assert (tmp_path / "0/prediction.npy").read_bytes() == (tmp_path / "1/prediction.npy").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence(user, tmp_path, capsys, workers):
    write_images(tmp_path)
    (tmp_path / "image" / QUADS[0][0]).write_bytes(b"no image")
    (tmp_path / "ann.json").write_text(json.dumps(objects(QUADS)))
    more = "--num-workers", workers
    assert run("my_model:scores", tmp_path / "image", tmp_path / "ann.json", tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: image {tmp_path / 'image' / QUADS[0][0]} cannot be decoded")
    assert len(error.splitlines()) == 1


def test_no_more_workers_than_processors(monkeypatch):
    """PyTorch warns about more, twice a call."""
    given = ["--model", "m:f", "--root", ".", "--annotation", "a.json"]
    for processors, expected in ((1, 1), (64, 4), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda found=processors: found)
        assert eval_eqben._parser().parse_args(given).num_workers == expected


def test_a_device_that_is_not_there_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval-eqben", "--model", "m:f", "--root", ".", "--annotation", "a.json", "--device", "gpu"])
    assert "argument --device: 'gpu' is no device of this machine: Expected one of cpu" in capsys.readouterr().err


def test_missing_data_leaves_no_folder(user, tmp_path, capsys):
    assert run("my_model:scores", tmp_path, tmp_path / "no.json", tmp_path / "out") == 1
    assert "no.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_features(world, tmp_path, capsys):
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=5, **small)).save_pretrained(tmp_path / "bert")
    annotation = world / "eqben/annotation/eqbensd.json"
    assert run(tmp_path / "bert", world / "eqben/images", annotation, tmp_path / "out") == 1
    assert "BertModel has no get_image_features and get_text_features" in capsys.readouterr().err


def test_without_transformers(world, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    annotation = world / "eqben/annotation/eqbensd.json"
    assert run("some/clip", world / "eqben/images", annotation, tmp_path / "out") == 1
    assert 'pip install "lightning-methods[text]"' in capsys.readouterr().err


def test_without_rich(world, user, monkeypatch, tmp_path, capsys):
    """Or without a terminal, as in a job's log."""
    monkeypatch.setattr(_progress, "find_spec", lambda name: None)
    monkeypatch.setattr(_progress, "_EVERY", 0.0)
    annotation = world / "eqben/annotation/eqbensd.json"
    quads = len(json.loads(annotation.read_text()))
    assert run("my_model:scores", world / "eqben/images", annotation, tmp_path / "out", "--batch-size", 2) == 0
    expected = [f"scoring: {min(done, quads)} of {quads}" for done in range(2, quads + 2, 2)]
    assert capsys.readouterr().err.splitlines() == expected
    assert len(expected) > 1


def test_lines_come_once_a_minute(monkeypatch, capsys):
    clock = iter([0, 30, 61, 61, 90, 121, 121])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.progress("scoring", 1000, 9000) as show:
        for now in (1100, 1200, 1300, 1400):
            show(now)
    assert capsys.readouterr().err == "scoring: 1,200 of 9,000\nscoring: 1,400 of 9,000\n"


def test_features_without_a_wrapper(clip, world, tmp_path, monkeypatch):
    """Before version 5, transformers returned the features themselves."""
    from transformers import CLIPModel

    annotation = world / "eqben/annotation/eqbensd.json"
    assert run(clip, world / "eqben/images", annotation, tmp_path / "new") == 0
    for name in ("get_image_features", "get_text_features"):
        wrapped = getattr(CLIPModel, name)
        monkeypatch.setattr(CLIPModel, name, lambda *args, _f=wrapped, **kwargs: _f(*args, **kwargs).pooler_output)
    assert run(clip, world / "eqben/images", annotation, tmp_path / "old") == 0
    assert (tmp_path / "old/prediction.npy").read_bytes() == (tmp_path / "new/prediction.npy").read_bytes()


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["eval-eqben", "--help"])
    assert "package.module:function" in capsys.readouterr().out


def test_images_reach_the_function_whole(user, tmp_path, monkeypatch):
    write_images(tmp_path)
    (tmp_path / "ann.json").write_text(json.dumps(objects(QUADS)))
    seen = []
    monkeypatch.setattr(user, "scores", lambda images, texts: seen.extend(images) or [0.5] * len(images))
    assert run("my_model:scores", tmp_path / "image", tmp_path / "ann.json", tmp_path / "out") == 0
    assert all(isinstance(image, Image.Image) and image.size == (6, 4) and image.mode == "RGB" for image in seen)
    assert len(seen) == 16
