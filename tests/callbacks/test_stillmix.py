"""`StillMix` and `VideoAugment`: what the module's step is given, when, and what a resumed run is given."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Batches, fit, same, trainer
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import StillMix, VideoAugment
from lightning_methods.functional import videomix
from lightning_methods.modules import (
    ActorCutMix,
    BackgroundErase,
    FrameBank,
    FrameBankSpec,
    FrameScores,
    VideoMix,
    VideoMixup,
)
from lightning_methods.testing._case import Batches as Resumable

CLASSES, ROWS = 3, 6
GENERATOR = torch.Generator().manual_seed(0)
VIDEOS = [torch.rand(ROWS, 2, 4, 3, 3, generator=GENERATOR) for _ in range(3)]  # B, C, T, H, W
TARGETS = torch.arange(ROWS) % CLASSES
BATCHES = [(videos, TARGETS) for videos in VIDEOS]


class Net(LightningModule):
    """Keeps what its training step is given."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(72, CLASSES)
        self.seen: list[Any] = []

    def forward(self, videos: Tensor) -> Tensor:
        return self.net(videos.flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch[0] is VIDEOS[batch_idx], "validation was given other clips"

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(method: Any, batches: Any = BATCHES, module: Any = None, **arguments: Any) -> Any:
    module = Net() if module is None else module
    fit(module, method, batches=batches, **arguments)
    return module


PIXELS = torch.rand(5, 2, 3, 3, generator=GENERATOR)


def bank(**arguments: Any) -> FrameBank:
    return FrameBank(PIXELS.clone(), **arguments)


def explained(mixed: Tensor, videos: Tensor, frames: Tensor = PIXELS) -> tuple[float, list[int | None]]:
    """The one λ of a batch, and each sample's frame, found by trying all; None: the clip as it was."""
    lams, chosen = set(), []
    for x, clip in zip(mixed, videos, strict=True):
        if torch.equal(x, clip):
            chosen.append(None)
            continue
        fits = {}
        for index, frame in enumerate(frames):
            still = frame[:, None].expand_as(clip)
            a = ((x - still) * (clip - still)).sum() / (clip - still).square().sum()
            if torch.allclose(x, a * clip + (1 - a) * still, atol=1e-5):
                fits[index] = a.item()
        assert len(fits) == 1, f"explained by {len(fits)} frames"
        chosen.append(next(iter(fits)))
        lams.add(round(fits[chosen[-1]], 4))
    assert len(lams) <= 1, "one λ for a batch"
    return lams.pop() if lams else 1.0, chosen


def test_clips_are_blended_with_still_frames_and_labels_stay() -> None:
    method = StillMix(bank(), alpha=20.0, beta=60.0, p=0.6, seed=0)
    module = train(method, max_epochs=20)
    lams, counts = [], torch.zeros(5)
    for step, (videos, targets) in enumerate(module.seen):
        lam, chosen = explained(videos, VIDEOS[step % 3])
        lams += [lam] * (lam < 1)
        for index in chosen:
            counts[index or 0] += index is not None
        assert targets is TARGETS
    assert torch.tensor(lams).mean().item() == pytest.approx(0.25, abs=0.03), "λ weighs the clip"
    assert len({*lams}) > 50, "a fresh draw in each step"
    assert counts.sum().item() / (60 * ROWS) == pytest.approx(0.6, abs=0.08)
    assert (counts / counts.sum()).tolist() == pytest.approx([0.2] * 5, abs=0.08)


@pytest.mark.parametrize("layout", ["btchw", "bncthw"])
def test_other_layouts(layout: str) -> None:
    if layout == "btchw":
        batches = [(videos.transpose(1, 2), TARGETS) for videos in VIDEOS]
    else:
        batches = [(torch.stack([videos, videos.flip(0)], 1)[..., :2, :, :], TARGETS) for videos in VIDEOS]
    module = train(StillMix(bank(), layout=layout, p=1.0), batches)
    for (videos, _), (given, _) in zip(module.seen, batches, strict=True):
        assert videos.shape == given.shape
        if layout == "btchw":
            explained(videos.transpose(1, 2), given.transpose(1, 2))
        else:
            _, chosen = zip(*(explained(videos[:, n], given[:, n]) for n in range(2)), strict=True)
            assert chosen[0] != chosen[1], "each clip has a frame of its own"


def test_frames_of_the_batch_itself() -> None:
    module = train(StillMix(source="batch", p=1.0, seed=1))
    for (mixed, _), videos in zip(module.seen, VIDEOS, strict=True):
        frames = videos.transpose(1, 2).flatten(0, 1)
        _, chosen = explained(mixed, videos, frames)
        assert all(index // 4 != sample for sample, index in enumerate(chosen))


class Everywhere(Net):
    """A batch that is a dictionary, with clips that the step calls something else."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["clip"]["rgb"], batch["label"]), batch_idx)


def test_in_place_writes_into_the_batch_and_trains_alike() -> None:
    trained = {}
    for inplace in (False, True):
        batches = [(videos.clone(), TARGETS) for videos in VIDEOS]
        module = train(StillMix(bank(), seed=3, inplace=inplace), batches)
        assert [seen[0] is given[0] for seen, given in zip(module.seen, batches, strict=True)] == [inplace] * 3
        assert all(given[0].equal(videos) for given, videos in zip(batches, VIDEOS, strict=True)) is not inplace
        trained[inplace] = module.net.weight.detach()
    torch.testing.assert_close(trained[True], trained[False])


def test_batches_of_any_form() -> None:
    batches = [{"clip": {"rgb": videos, "fps": 25}, "label": TARGETS} for videos in VIDEOS]
    by_address = train(StillMix(bank(), video="batch.clip.rgb", target="batch.label"), batches, Everywhere())
    pair = (lambda step: step.batch["clip"]["rgb"], lambda step, value: {**step.batch, "clip": {"rgb": value}})
    by_functions = train(StillMix(bank(), video=pair), batches, Everywhere())
    assert same(by_address, by_functions)
    assert same(by_address, train(StillMix(bank())))
    assert all(batch["clip"]["rgb"] is videos for batch, videos in zip(batches, VIDEOS, strict=True))


def test_validation_test_prediction_and_sanity_steps_are_left_alone() -> None:
    module, method = Net(), StillMix(bank(), p=1.0)
    run = fit(module, method, batches=BATCHES, val=BATCHES, num_sanity_val_steps=2)
    for loop in (run.validate, run.test, run.predict):
        loop(module, Batches(BATCHES))


def test_probability_0_is_not_attached_bit_for_bit() -> None:
    module = Net()
    with pytest.warns(UserWarning, match="did nothing in epoch 0"):
        train(StillMix(bank(), p=0.0), module=module)
    assert same(module, train(Callback()))
    assert all(videos is given for (videos, _), given in zip(module.seen, VIDEOS, strict=True))
    ASKED.clear()
    train(StillMix(recipe(), p=0.0, refresh_every_n_epochs=1), max_epochs=2)
    assert not ASKED, "frames that nobody needs are not read"


def test_blending_starts_with_its_epoch(recwarn: pytest.WarningsRecorder) -> None:
    module = train(StillMix(bank(), p=1.0, start_epoch=2), max_epochs=4)
    blended = [not torch.equal(videos, VIDEOS[step % 3]) for step, (videos, _) in enumerate(module.seen)]
    assert blended == [False] * 6 + [True] * 6
    assert not [warning for warning in recwarn if "did nothing" in str(warning.message)]


def test_the_modules_random_numbers_are_those_without_it() -> None:
    class Noisy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0], batch[1], torch.rand(3)), batch_idx)

    attached, plain = (train(method, module=Noisy()).seen for method in (StillMix(bank()), Callback()))
    assert all(torch.equal(one[2], other[2]) for one, other in zip(attached, plain, strict=True))


def test_seeds() -> None:
    method = StillMix(bank(), seed=3)
    first, again, other = train(method), train(method), train(StillMix(bank(), seed=4))
    assert same(first, again)
    assert not same(first, other)
    # `fit` seeds PyTorch with 1
    assert same(train(StillMix(bank(), seed=1)), train(StillMix(bank())))
    assert not same(first, train(StillMix(bank(), seed=3, name="other"))), "two on one module draw for themselves"


def test_every_micro_batch_has_a_draw_of_its_own() -> None:
    module = train(StillMix(bank(), p=1.0), [BATCHES[0]] * 3, accumulate_grad_batches=3)
    lams = {explained(videos, VIDEOS[0])[0] for videos, _ in module.seen}
    assert len(lams) == 3


def test_clips_keep_their_dtype_under_autocast() -> None:
    module = train(StillMix(bank(), p=1.0), precision="bf16-mixed")
    exact = train(StillMix(bank(), p=1.0))
    for (videos, _), (expected, _) in zip(module.seen, exact.seen, strict=True):
        assert torch.equal(videos, expected)


def test_mixed_labels() -> None:
    labels = torch.tensor([2, 1, 0, 2, 1])
    method = StillMix(bank(targets=labels), label_weight=0.75, num_classes=CLASSES)
    for (videos, targets), given in zip(train(method).seen, VIDEOS, strict=True):
        _, chosen = explained(videos, given)
        for sample, index in enumerate(chosen):
            expected = torch.eye(CLASSES)[sample % CLASSES]
            if index is not None:
                expected = 0.75 * expected + 0.25 * torch.eye(CLASSES)[labels[index]]
            torch.testing.assert_close(targets[sample], expected)


def test_labels_are_not_even_read_where_they_stay() -> None:
    train(StillMix(bank(), target="batch.no_such_label"))
    train(VideoAugment(BackgroundErase(), target="batch.no_such_label"))


def test_logs() -> None:
    module = Net()
    logged = fit(module, StillMix(bank(), p=1.0), batches=BATCHES).callback_metrics
    assert logged.keys() == {"stillmix/lam", "stillmix/mixed_fraction", "stillmix/bank_size"}
    assert logged["stillmix/mixed_fraction"] == 1
    assert logged["stillmix/bank_size"] == 5
    lam, _ = explained(module.seen[-1][0], VIDEOS[2])
    assert logged["stillmix/lam"].item() == pytest.approx(lam, abs=1e-3)
    silent = fit(Net(), StillMix(bank(), log=False), batches=BATCHES)
    assert not silent.callback_metrics


# --- the size of the frames -----------------------------------------------------------------------


def test_a_bank_of_another_size_is_resized_once() -> None:
    small = FrameBank(torch.rand(5, 2, 6, 2, generator=GENERATOR))
    method = StillMix(small, resize=True, p=1.0)
    module = train(method)
    frames = F.interpolate(small.frames, (3, 3), mode="bilinear")
    for (videos, _), given in zip(module.seen, VIDEOS, strict=True):
        explained(videos, given, frames)
    assert small.frames.shape[-2:] == (6, 2), "the user's bank stays"
    again = train(method, [(videos[..., :2], TARGETS) for videos in VIDEOS], Narrow())
    explained(again.seen[0][0], VIDEOS[0][..., :2], F.interpolate(small.frames, (3, 2), mode="bilinear"))
    ASKED.clear()
    of_recipe = StillMix(recipe(size=2), resize=True, p=1.0)
    for _ in range(2):
        train(of_recipe)
    assert len(ASKED) == 8, "what was resized is read again for another fit"
    with pytest.raises(ValueError, match="frames are 2 x 3 x 3 and the clips 2 x 3 x 2"):
        train(method, [BATCHES[0], (VIDEOS[0][..., :2], TARGETS)])


class Narrow(Net):
    def forward(self, videos: Tensor) -> Tensor:
        return super().forward(F.pad(videos, (0, 1)))


# --- recipes --------------------------------------------------------------------------------------

KEYS = [f"clip{number:02}/img.jpg" for number in range(20)]
FRAMES = dict(zip(KEYS, torch.rand(20, 2, 3, 3, generator=GENERATOR), strict=True))
ASKED: list[str] = []


def read(key: str) -> Tensor:
    ASKED.append(key)
    return FRAMES[key]


def recipe(keys: Any = KEYS, **arguments: Any) -> FrameBankSpec:
    probs = torch.tensor([0.5 + KEYS.index(key) / 100 for key in keys])
    return FrameBankSpec(FrameScores(keys, probs, probs), read, **{"size": 3, "bank_size": 4, **arguments})


class Watch(Callback):
    """Keeps the keys of the bank in each step."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, ...]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.keys.append(trainer.callbacks[0]._augment.bank.keys)


def watched(method: StillMix, **arguments: Any) -> tuple[Any, list[tuple[str, ...]]]:
    watch, module = Watch(), Net()
    fit(module, method, watch, batches=BATCHES, **arguments)
    return module, watch.keys


def test_the_bank_is_made_once_before_training() -> None:
    ASKED.clear()
    method = StillMix(recipe(), p=1.0)
    module, keys = watched(method, max_epochs=3)
    assert keys == [keys[0]] * 9
    assert sorted(keys[0]) == ASKED, "each frame read once"
    assert set(keys[0]) <= set(KEYS[10:]), "of the upper half"
    for step, (videos, _) in enumerate(module.seen):
        explained(videos, VIDEOS[step % 3], torch.stack([FRAMES[key] for key in keys[0]]))
    watched(method)
    assert len(ASKED) == 4, "the frames are still there in a second fit"


def test_refreshed_every_few_epochs() -> None:
    method = StillMix(recipe(low=0.0), refresh_every_n_epochs=2)
    _, keys = watched(method, max_epochs=5)
    epochs = [keys[3 * epoch : 3 * epoch + 3] for epoch in range(5)]
    assert all(len(set(epoch)) == 1 for epoch in epochs), "never within an epoch"
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3] != epochs[4]
    assert keys[0] == recipe(low=0.0).choose(0, 0).keys
    assert keys[-1] == recipe(low=0.0).choose(0, 4).keys


def test_what_is_logged_when_the_bank_was_filled() -> None:
    class Logs(Net):
        def log_dict(self, values: Any, **arguments: Any) -> None:
            seen.append(dict(values))

    seen: list[dict[str, Any]] = []
    spec = recipe(low=0.0)
    train(StillMix(spec, refresh_every_n_epochs=1), module=Logs(), max_epochs=2)
    assert len(seen) == 6
    for step, values in enumerate(seen):
        filled = {"stillmix/bank_size": 4, "stillmix/min_score": spec.choose(0, step // 3).min_score}
        assert values.items() >= filled.items() if step % 3 == 0 else not filled.keys() & values.keys()


def test_bad_scores_are_errors_before_training(tmp_path: Path) -> None:
    module = Net()
    for spec, message in (
        (FrameBankSpec(tmp_path / "none.npz", read, 3), "none.npz"),
        (recipe(strategy="threshold", low=0.9), "no frame of the 20"),
        (replace(recipe(), reader={}.__getitem__), "`reader` has no frame .*, which `scores` name"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(StillMix(spec), module=module)
        assert "training_step" not in vars(module)
        assert not module.seen


# --- resuming -------------------------------------------------------------------------------------


def interrupted(method: StillMix, folder: Path, epochs: int = 4) -> tuple[Net, list[tuple[str, ...]], dict[str, Path]]:
    """A fit with a checkpoint after every step; what it ends with, the bank of each step, the files."""
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    watch, module = Watch(), Net()
    torch.manual_seed(1)
    trainer(method, watch, checkpoint, max_epochs=epochs, enable_checkpointing=True).fit(module, Resumable(BATCHES))
    return module, watch.keys, {path.stem: path for path in folder.glob("*.ckpt")}


def resumed(method: StillMix, path: Path, epochs: int = 4, seed: int = 1) -> tuple[Net, list[tuple[str, ...]]]:
    watch, module = Watch(), Net()
    torch.manual_seed(seed)
    run = trainer(method, watch, max_epochs=epochs)
    run.fit(module, Resumable(BATCHES), ckpt_path=path)
    return module, watch.keys


def test_a_resumed_run_has_the_frames_and_the_draws_of_the_unbroken_one(tmp_path: Path) -> None:
    def method(**arguments: Any) -> StillMix:
        return StillMix(recipe(low=0.0), refresh_every_n_epochs=2, **arguments)

    whole, keys, files = interrupted(method(), tmp_path)
    assert len(files) == 12
    for step in range(1, 12):
        # Another seed of PyTorch's generator: what counts is that of the run that goes on.
        module, later = resumed(method(), files[f"step={step}"], seed=9)
        assert later == keys[step:], f"other frames after step {step}"
        assert same(module, whole), f"other weights after step {step}"


def test_the_frames_of_the_checkpoint_win_over_new_scores(tmp_path: Path) -> None:
    _, keys, files = interrupted(StillMix(recipe()), tmp_path, epochs=1)
    probs = torch.rand(20, generator=GENERATOR)
    rescored = FrameBankSpec(FrameScores(KEYS, probs, probs), read, 3, 4)
    assert rescored.choose(0, 0).keys != keys[0]
    assert resumed(StillMix(rescored), files["step=1"], epochs=1)[1] == keys[1:]


def test_frames_without_a_score_are_a_warning_and_a_fresh_draw(tmp_path: Path) -> None:
    _, keys, files = interrupted(StillMix(recipe()), tmp_path, epochs=1)
    left = [key for key in KEYS if key != keys[0][0]]
    with pytest.warns(UserWarning, match=rf"1 of the 4 frames .* '{keys[0][0]}' for one"):
        later = resumed(StillMix(recipe(left)), files["step=1"], epochs=1)[1]
    assert later == [recipe(left).choose(0, 0).keys] * 2


def test_a_checkpoint_holds_keys_and_never_pixels(tmp_path: Path) -> None:
    _, keys, files = interrupted(StillMix(recipe()), tmp_path, epochs=1)
    content = torch.load(files["step=2"], weights_only=True)
    (state,) = (state for name, state in content["callbacks"].items() if "StillMix" in name)
    assert state["keys"] == [list(keys[0])]
    assert state["draws"] == 2
    assert not any(isinstance(value, Tensor) for value in state.values())


# --- two processes --------------------------------------------------------------------------------


class Ranks(Callback):
    """Saves what each rank saw, and its state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        method = trainer.callbacks[0]
        found = {
            "keys": method._augment.bank.keys,
            "state": method.state_dict()["keys"],
            "videos": [videos for videos, _ in pl_module.seen],
            "weights": pl_module.net.weight.detach().clone(),
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def on_two(folder: Path, method: StillMix, *callbacks: Any, ckpt_path: Any = None, **arguments: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run = trainer(method, Ranks(folder), *callbacks, max_epochs=2, **ranks, **arguments)
    run.fit(Net(), Resumable(BATCHES), ckpt_path=ckpt_path)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_rank_has_frames_and_draws_of_its_own_and_resumes_with_them(tmp_path: Path) -> None:
    def method() -> StillMix:
        return StillMix(recipe(low=0.0), p=1.0, seed=0)

    checkpoint = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    first, second = on_two(tmp_path / "whole", method(), checkpoint, enable_checkpointing=True)
    assert first["keys"] != second["keys"]
    assert first["state"] == second["state"] == [list(first["keys"]), list(second["keys"])]
    # Both ranks are given the same clips, so that what differs was drawn.
    for step in range(6):
        lams = {explained(rank["videos"][step], VIDEOS[step % 3], stacked(rank))[0] for rank in (first, second)}
        assert len(lams) == 2
    again = on_two(tmp_path / "resumed", method(), ckpt_path=tmp_path / "step=2.ckpt")
    for rank, whole in zip(again, (first, second), strict=True):
        assert rank["keys"] == whole["keys"]
        assert torch.equal(rank["weights"], whole["weights"])
        assert all(torch.equal(a, b) for a, b in zip(rank["videos"], whole["videos"][2:], strict=True))


def stacked(rank: Any) -> Tensor:
    return torch.stack([FRAMES[key] for key in rank["keys"]])


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank": None}, "`bank` with source='bank' and only then"),
        ({"source": "batch"}, "`bank`"),
        ({"p": 1.5}, "`p`"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"layout": "thwc"}, "`layout`"),
        ({"refresh_every_n_epochs": 1}, "`refresh_every_n_epochs` .* a FrameBankSpec"),
        ({"bank": recipe(), "refresh_every_n_epochs": 0}, "`refresh_every_n_epochs` to be at least 1"),
        ({"start_epoch": -1}, "`start_epoch`"),
        ({"label_weight": 0.5}, "`num_classes` is missing"),
        ({"video": "batsch.0"}, "batsch"),
    ],
)
def test_errors_where_the_method_is_written_down(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StillMix(**{"bank": bank(), **arguments})


@pytest.mark.parametrize(
    ("method", "batch", "message"),
    [
        (lambda: StillMix(bank()), (VIDEOS[0].byte(), TARGETS), r"`video` at 'batch\.0': .*floating.*normalise"),
        (lambda: StillMix(bank()), (VIDEOS[0][:, :, 0], TARGETS), r"'batch\.0': .*\(B, C, T, H, W\)"),
        (lambda: StillMix(bank()), (VIDEOS[0][..., :2], TARGETS), "2 x 3 x 3 and the clips 2 x 3 x 2"),
        (lambda: StillMix(bank()), ([VIDEOS[0]], TARGETS), r"`video` at 'batch\.0' to be a batch of clips"),
        (lambda: StillMix(bank(), video="batch.clip"), BATCHES[0], r"'batch\.clip'"),
        (lambda: StillMix(source="batch"), (VIDEOS[0][:1], TARGETS[:1]), "has a single one"),
        (lambda: StillMix(bank(), label_weight=0.5, num_classes=3), BATCHES[0], "`bank` has no targets"),
        (
            lambda: StillMix(source="batch", label_weight=0.5, num_classes=2),
            BATCHES[0],
            r"`target` at 'batch\.1': .*class indices in \[0, 2\)",
        ),
        (lambda: VideoAugment(VideoMixup()), BATCHES[0], r"VideoAugment, .* `target` at 'batch\.1': `num_classes`"),
    ],
)
def test_errors_at_the_first_batch_leave_the_module_alone(method: Any, batch: Any, message: str) -> None:
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        train(method(), [batch], module)
    assert "training_step" not in vars(module)
    assert not module.seen
    assert same(module, before)


def test_a_single_sample_is_fine_for_the_bank() -> None:
    module = train(StillMix(bank(), p=1.0), [(VIDEOS[0][:1], TARGETS[:1])])
    explained(module.seen[0][0], VIDEOS[0][:1])


# --- the augmentations that it is compared with ---------------------------------------------------


def test_videomix_through_the_callback() -> None:
    method = VideoAugment(VideoMix(p=1.0, num_classes=CLASSES), seed=9)
    for (videos, targets), given in zip(train(method).seen, VIDEOS, strict=True):
        changed = (videos != given).any(2).any(1).any(0).nonzero()
        assert len(changed), "an empty box: choose another seed"
        (top, left), (bottom, right) = changed.amin(0).tolist(), (changed.amax(0) + 1).tolist()
        box = torch.tensor([left, top, right, bottom])
        orders = map(torch.tensor, permutations(range(ROWS)))
        mixed = (videomix(given, TARGETS, order, box, num_classes=CLASSES) for order in orders)
        fits = [one.targets for one in mixed if torch.equal(one.videos, videos)]
        assert len(fits) == 1
        torch.testing.assert_close(targets, fits[0])


def test_masks_come_from_the_batch() -> None:
    masks = torch.zeros(ROWS, 3, 3, dtype=torch.bool)
    masks[:, 0] = True
    module = train(
        VideoAugment(ActorCutMix(num_classes=CLASSES), masks="batch.2"), [(VIDEOS[0], TARGETS, masks)], Net()
    )
    videos, targets, given = module.seen[0]
    assert torch.equal(videos[..., 1:, :], VIDEOS[0].flip(0)[..., 1:, :])
    assert targets.shape == (ROWS, CLASSES)
    assert given is masks


def test_an_augmentation_in_eval_mode_still_augments_training() -> None:
    method = VideoAugment(BackgroundErase().eval())
    assert not torch.equal(train(method).seen[0][0], VIDEOS[0])


def test_augmentation_with_probability_0_is_not_attached() -> None:
    with pytest.warns(UserWarning, match="did nothing"):
        module = train(VideoAugment(VideoMixup(p=0.0)))
    assert same(module, train(Callback()))


def test_augmentation_logs() -> None:
    run = fit(Net(), VideoAugment(VideoMixup(p=1.0, num_classes=CLASSES)), batches=BATCHES)
    assert run.callback_metrics.keys() == {"video_augment/lam", "video_augment/mixed_fraction"}


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (nn.Identity(), {}, "`module` to be a VideoAugmentation, but got"),
        (ActorCutMix(), {}, "needs `masks`, but got None"),
        (VideoMixup(), {"masks": "batch.2"}, "takes no `masks`, but got 'batch.2'"),
    ],
)
def test_augmentation_errors(module: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoAugment(module, **arguments)
