"""The eqsim_clip demo: arms that differ in a callback only, and figures that `eval-eqben` finds too."""

import ast
import json
import runpy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_methods.cli import main as cli
from lightning_methods.datamodules import SyntheticEqBenDataModule
from lightning_methods.demos import eqsim_clip, eqsim_clip_models
from lightning_methods.demos._experiment import Stage
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.eqsim_clip_models import LitCLIP, word_tokenizer

SMALL = replace(
    eqsim_clip._FAST,
    pretraining={**eqsim_clip._FAST.pretraining, "train_images": 30},
    data={"train_images": 15, "quads_per_subset": 3, "eval_images": 4},
    epochs=2,
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(eqsim_clip, "_FAST", SMALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the runs share, trained for a moment, and its folder."""
    folder = tmp_path_factory.mktemp("shared")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SMALL.prepare(Stage("main", folder, lambda share: None)), folder


def data_in(folder):
    """The data of a run, with the tokenizer that the runs share."""
    return SyntheticEqBenDataModule(folder / "tuning", tokenizer=f"transformers:{folder / 'clip'}", **SMALL.data)


def found(best, ids, own):
    """Share of rows whose best match has their own number."""
    return np.mean([ids[place] == number for place, number in zip(best, own, strict=True)])


class TestArms:
    def test_the_module_knows_nothing_of_the_methods(self):
        tree = ast.parse(Path(eqsim_clip_models.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert {name for name in imported if name.startswith("lightning_methods")} == {"lightning_methods.metrics"}

    def test_arms_differ_in_callbacks_and_learning_rate_only(self):
        arms = eqsim_clip._ARMS
        assert {name: len(arm.callbacks()) for name, arm in arms.items()} == {
            "before": 0,
            "plain": 0,
            "soft": 0,
            "eqsim": 1,
        }
        changed = {name: dict(arm.model.items() - arms["plain"].model.items()) for name, arm in arms.items()}
        assert changed == {"before": {}, "plain": {}, "soft": {"lr": 1e-3, "scale": 5.0}, "eqsim": {"lr": 1e-3}}
        assert [name for name, arm in arms.items() if not arm.trains] == ["before"]

    def test_settings_hold_all_that_decides_the_figures(self):
        setup = eqsim_clip._TUNING
        assert setup.settings().keys() == {field.name for field in fields(setup)} - {"baselines"}
        for name in ("pretraining_epochs", "epochs"):
            assert replace(setup, **{name: 99}).settings() != setup.settings()
        for name in ("pretraining", "data"):
            assert replace(setup, **{name: {**getattr(setup, name), "train_images": 9}}).settings() != setup.settings()
        for change in ({"options": {"weight": 3.0}}, {"model": {"lr": 1.0}}, {"trains": False}):
            arms = {name: replace(arm, **change) for name, arm in setup.arms.items()}
            assert replace(setup, arms=arms).settings() != setup.settings()
        json.dumps(setup.settings())

    def test_the_search_gave_every_arm_the_same_number_of_settings(self):
        tried = [name.split(".")[0] for name in eqsim_clip.candidates()]
        assert {name: tried.count(name) for name in tried} == {"plain": 12, "soft": 12, "eqsim": 12}

    def test_the_settings_of_the_report_are_among_those_tried(self):
        tried = [arm.settings() for arm in eqsim_clip.candidates().values()]
        for name in ("plain", "soft", "eqsim"):
            assert eqsim_clip._ARMS[name].settings() in tried

    def test_the_search_looks_at_validation_and_at_other_seeds(self):
        search, report = eqsim_clip.experiment(tune=True), eqsim_clip.experiment()
        assert search.run.keywords == {"split": "val"}
        assert report.run.keywords == {"split": "test"}
        assert search.first_seed >= report.first_seed + 100
        assert report.seeds >= 3


class TestModule:
    def test_the_last_word_ends_a_text_and_is_where_clip_looks(self):
        tokenizer = word_tokenizer(["two red boxes", "a blue box"])
        encoded = tokenizer(["a red box", "a red hen"], padding="max_length", max_length=8, return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == [2, 3, 7, 5, len(tokenizer) - 1, 0, 0, 0]
        assert encoded["input_ids"][1, 3] == 1
        torch.manual_seed(0)
        model = LitCLIP(len(tokenizer)).eval()
        features = model._text({key: encoded[key] for key in ("input_ids", "attention_mask")})
        changed = encoded["input_ids"].clone()
        changed[:, 5:] = 3  # behind the end
        torch.testing.assert_close(
            model._text({"input_ids": changed, "attention_mask": encoded["attention_mask"]}), features
        )
        assert (features[0] - features[1]).abs().max() > 1e-3

    def test_the_loss_is_the_symmetric_contrastive_one(self):
        torch.manual_seed(0)
        model = LitCLIP(9)
        batch = {"image": torch.randn(4, 3, 32, 32), "text": {"input_ids": torch.tensor([[2, 3, 4, 8, 0]] * 4)}}
        batch["text"]["input_ids"][:, 1] = torch.tensor([3, 4, 5, 6])
        logits = model._image(batch["image"]) @ model._text(batch["text"]).T * model.clip.logit_scale.exp()
        own = torch.arange(4)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(model.training_step(batch), expected)

    def test_measures_are_those_counted_one_by_one(self, prepared):
        shared, folder = prepared
        weights, num_words, _ = shared.value
        model = LitCLIP(num_words)
        model.load_state_dict(weights)
        data = data_in(folder)
        logged = evaluate(model, data)
        model.eval()
        hits = {name: [[] for _ in range(7)] for name in ("text", "image", "group")}
        quads, images, texts = data.test_dataloader()
        for batch in quads:
            left = [model._image(batch[key]) for key in ("image0", "image1")]
            right = [model._text(batch[key]) for key in ("caption0", "caption1")]
            for row, subset in enumerate(batch["subset"]):
                s00, s01, s10, s11 = (float(image[row] @ text[row]) for image in left for text in right)
                sides = {"text": s00 > s01 and s11 > s10, "image": s00 > s10 and s11 > s01}
                for name, hit in {**sides, "group": all(sides.values())}.items():
                    hits[name][subset].append(hit)
        for name, of_subsets in hits.items():
            assert logged[name] == pytest.approx(np.mean([np.mean(own) for own in of_subsets]))
        (images,), (texts,) = list(images), list(texts)
        cosines = model._image(images["image"]) @ model._text(texts["text"]).T
        images, texts = images["image_id"], texts["image_id"]
        recall = found(cosines.argmax(1), texts, images), found(cosines.argmax(0), images, texts)
        assert logged["recall"] == pytest.approx(np.mean(recall))

    def test_a_given_scale_is_held(self, prepared):
        shared, folder = prepared
        weights, num_words, _ = shared.value
        learned, held = (LitCLIP(num_words, scale=scale) for scale in (None, 5.0))
        for model in (learned, held):
            model.load_state_dict(weights)
            fit(model, data_in(folder), epochs=2)
        assert held.clip.logit_scale.exp().item() == pytest.approx(5)
        assert learned.clip.logit_scale != weights["clip.logit_scale"]

    def test_eqsim_finds_what_it_needs_and_changes_the_training(self, prepared):
        shared, folder = prepared
        weights, num_words, _ = shared.value
        trained = []
        for callbacks in ([], eqsim_clip._ARMS["eqsim"].callbacks()):
            torch.manual_seed(0)
            model = LitCLIP(num_words)
            model.load_state_dict(weights)
            data = data_in(folder)
            fit(model, data, epochs=4, callbacks=callbacks)
            trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert (trained[0] - trained[1]).abs().max() > 1e-5


@pytest.mark.usefixtures("small")
class TestCommand:
    def test_runs_and_its_model_scores_the_same_with_eval_eqben(self, tmp_path, capsys):
        assert eqsim_clip.main(["--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        figures = {record["arm"]: record["metrics"] for record in result["records"]}
        assert figures.keys() == eqsim_clip._ARMS.keys()
        assert (tmp_path / "result.png").exists()
        assert "+ EqSim" in capsys.readouterr().out
        shared = tmp_path / "shared" / "main"
        test = shared / "tuning" / "seed-0" / "test"
        options = {
            "--model": shared / "clip",
            "--root": test / "images",
            "--annotation": test / "annotation" / "ann_json_finegrained_random.json",
            "--out": tmp_path / "eval",
            "--num-workers": 0,
        }
        assert cli(["eval-eqben", *(str(word) for option in options.items() for word in option)]) == 0
        found = json.loads((tmp_path / "eval" / "result.json").read_text())["scores"]["mean over subsets"]
        for name in ("text", "image", "group"):
            assert 100 * found[name] == pytest.approx(figures["before"][name], abs=1e-4)

    @pytest.mark.parametrize("step", [1, 5])
    def test_ctrl_c_then_resume_gives_the_same_bits(self, step, tmp_path, monkeypatch):
        def figures(folder):
            records = json.loads((folder / "result.json").read_text())["records"]
            return {(record["arm"], record["seed"]): record["metrics"] for record in records}

        options = ["--fast", "--seeds", "1", "--out"]
        assert eqsim_clip.main([*options, str(tmp_path / "unbroken")]) == 0
        training_step, calls = LitCLIP.training_step, []

        def stopping(self, batch):
            calls.append(1)
            if len(calls) == step:
                raise KeyboardInterrupt
            return training_step(self, batch)

        monkeypatch.setattr(LitCLIP, "training_step", stopping)
        assert eqsim_clip.main([*options, str(tmp_path / "stopped")]) == 130
        assert eqsim_clip.main([*options, str(tmp_path / "stopped"), "--resume"]) == 0
        assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["eqsim_clip", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(eqsim_clip.__file__, run_name="__main__")
        assert "--tune" in capsys.readouterr().out
