"""The stillmix demo: arms that differ in a callback only, and the effect on backgrounds that training has not seen."""

import ast
import json
import runpy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from lightning_methods.callbacks import StillMix, VideoAugment
from lightning_methods.demos import stillmix, stillmix_models
from lightning_methods.demos._experiment import Run, Stage
from lightning_methods.demos.stillmix import Setup
from lightning_methods.demos.stillmix_models import ClipClassifier, FrameClassifier
from lightning_methods.modules import FrameBank

TINY = Setup(train_size=40, test_size=8, epochs=1, reference_epochs=1, bank_size=16, selector_seeds=1)


def run_of(arm, seed=0):
    return Run("main", arm, seed, None, lambda share: None)


@pytest.fixture(autouse=True)
def _no_world_is_left():
    yield
    stillmix._world.cache_clear()


class TestEffect:
    """At the size of `--fast`, in world 1, the harder one of its two; what was measured there (in world 0) by each."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def measured(cls):
        ours, erm = (stillmix.FAST.run(run_of(arm, seed=1)) for arm in ("stillmix", "erm"))
        cls.gain = {metric: ours[metric] - erm[metric] for metric in ours}
        stillmix._world.cache_clear()

    def test_stillmix_sees_the_motion_before_stripes(self):  # +34 (+40)
        assert self.gain["stripes"] >= 20

    def test_and_nothing_but_the_motion(self):  # +41 and +32 (+53 and +37)
        assert self.gain["contrasted"] >= 20
        assert self.gain["conflicting"] >= 15

    def test_and_loses_nothing_where_nothing_changed(self):  # +3 (-1)
        assert self.gain["iid"] >= -2


def test_confident_frames_are_those_of_biased_clips():  # 84 %, half of the clips being biased
    facts = replace(stillmix.FAST, train_size=400).prepare(Stage("main", Path(), lambda share: None)).facts
    assert next(iter(facts.values())) >= 70


class TestArms:
    def test_modules_know_nothing_of_the_methods(self):
        tree = ast.parse(Path(stillmix_models.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        ours = {name for name in imported if name.startswith("lightning_methods")}
        assert ours == {"lightning_methods.functional", "lightning_methods.metrics"}  # what it tests with

    def test_arms_are_a_list_of_callbacks(self):
        bank = FrameBank(torch.zeros(4, 3, 24, 24))
        made = {name: arm.callbacks(lambda: bank) for name, arm in stillmix._ARMS.items()}
        assert [name for name, callbacks in made.items() if not callbacks] == ["erm"]
        kinds = {name: type(callbacks[0]) for name, callbacks in made.items() if callbacks}
        assert kinds == {
            "mixup": VideoAugment,
            "videomix": VideoAugment,
            "be": VideoAugment,
            "batch": StillMix,
            "stillmix": StillMix,
        }
        assert made["stillmix"][0].bank is bank
        assert made["batch"][0].source == "batch"
        assert (made["stillmix"][0].alpha, made["stillmix"][0].beta) == (200, 200)

    def test_settings_hold_all_that_decides_the_figures(self):
        assert set(TINY.settings()) == {field.name for field in fields(Setup)}
        for field in fields(Setup):
            if field.name != "arms":
                changed = replace(TINY, **{field.name: getattr(TINY, field.name) / 2})
                assert changed.settings() != TINY.settings()
        arms = {name: replace(arm, options={**arm.options, "x": 1}) for name, arm in TINY.arms.items()}
        assert replace(TINY, arms=arms).settings() != TINY.settings()
        json.dumps(TINY.settings())

    def test_the_full_size_is_that_of_the_docs(self):
        setup = Setup()
        assert (setup.train_size, setup.test_size, setup.epochs, setup.reference_epochs) == (1200, 300, 12, 10)
        assert (setup.bank_size, setup.low) == (512, 0.5)
        assert stillmix.experiment().seeds == 5

    def test_the_search_gave_every_arm_the_same_number_of_settings(self):
        tried = [name.split(".")[0] for name in stillmix.candidates()]
        assert {name: tried.count(name) for name in tried} == {name: 4 for name in stillmix._ARMS if name != "erm"}

    def test_the_settings_of_the_report_are_among_those_tried(self):
        tried = [arm.settings() for arm in stillmix.candidates().values()]
        assert all(arm.settings() in tried for name, arm in stillmix._ARMS.items() if name != "erm")

    def test_the_search_looks_at_other_worlds(self):
        search, report = stillmix.experiment(tune=True), stillmix.experiment()
        assert search.first_seed >= report.first_seed + 100

    def test_the_seed_makes_the_world(self):
        assert TINY.data(7).world_seed == 7
        assert TINY.data(7).seed == 7
        assert TINY.data(7, neutral=0.5).neutral == 0.5


class TestRuns:
    def test_a_run_does_not_depend_on_those_before(self):
        alone = TINY.run(run_of("stillmix"))
        stillmix._world.cache_clear()
        TINY.run(run_of("mixup"))
        assert TINY.run(run_of("stillmix")) == alone

    def test_the_bank_holds_training_frames_on_which_the_network_is_confident(self):
        data = TINY.data(0)
        scores = TINY._scores(data, 0)
        bank = TINY._bank(data, 0)
        videos = data.splits["train"][0]
        assert len(scores.keys) == 40 * 8
        assert len(bank) == 16
        confidence = dict(zip(scores.keys, scores.top_prob.tolist(), strict=True))
        for key, frame in zip(bank.keys, bank.frames, strict=True):
            clip, number = map(int, key.split("//"))
            assert torch.equal(frame, videos[clip, :, number])
            assert confidence[key] >= scores.top_prob.median()

    def test_frames_are_scored_with_their_own_labels(self):
        data = TINY.data(0)
        videos, labels, _ = data.splits["train"]
        batches = list(stillmix._all_frames(data))
        keys = [key for batch in batches for key in batch[2]]
        frames, targets = (torch.cat([batch[part] for batch in batches]) for part in range(2))
        for place, key in enumerate(keys):
            clip, number = map(int, key.split("//"))
            assert torch.equal(frames[place], videos[clip, :, number])
            assert targets[place] == labels[clip]


class TestModels:
    def test_sizes(self):
        clips = torch.rand(2, 3, 8, 24, 24)
        network, reference = ClipClassifier(["iid"], ["stripes"]), FrameClassifier()
        assert network(clips).shape == reference(clips[:, :, 0]).shape == (2, 4)
        assert network.net[:9](clips).shape == (2, 64, 4, 3, 3)
        assert reference.net[:9](clips[:, :, 0]).shape == (2, 64, 3, 3)

    def test_the_reference_sees_a_random_frame_of_each_clip(self):
        clips = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(400, 3, 8, 2, 2)
        frames = FrameClassifier().inputs(clips)
        assert frames.shape == (400, 3, 2, 2)
        assert frames[:, 0, 0, 0].long().bincount(minlength=8).min() > 20


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(stillmix, "FAST", TINY)

    def test_runs_and_leaves_its_results(self, tmp_path, capsys):
        assert stillmix.main(["--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {record["arm"] for record in result["records"]} == set(stillmix._ARMS)
        assert set(result["records"][0]["metrics"]) == set(stillmix._METRICS)
        assert (tmp_path / "result.png").exists()
        shown = capsys.readouterr().out
        assert "choosing frames cannot beat random ones here" in " ".join(shown.split())
        assert "…" not in shown

    def test_the_search_runs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stillmix, "_TRIED", (1.0,))
        assert stillmix.main(["--tune", "--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        records = json.loads((tmp_path / "result.json").read_text())["records"]
        assert {record["arm"] for record in records} == {f"{name}.p=1" for name in stillmix._ARMS if name != "erm"}
        assert {record["seed"] for record in records} == {1000}

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["stillmix", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(stillmix.__file__, run_name="__main__")
        assert "--resume" in capsys.readouterr().out
