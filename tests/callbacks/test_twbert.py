"""AlignBeforeFuse against its objective written out, and what it says of wrong input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conformance.cases_twbert import FRAMES, PATCHES, WORDS, Fusion, Matched, TwoTowers, two_towers
from plain import fit
from ranks import on_ranks
from torch import nn

from lightning_methods.attach import AddressError
from lightning_methods.callbacks import AlignBeforeFuse, TrajectoryWordAlignment
from lightning_methods.callbacks._twbert_parts import Queue
from lightning_methods.functional import fine_grained_contrastive_loss, trajectory_word_attention

INPUTS = ["batch.video", "batch.text"]


def batches(count=3, size=4):
    generator = torch.Generator().manual_seed(0)
    return [
        {"video": torch.randn(size, 6, 5, generator=generator), "text": torch.randn(size, 4, 3, generator=generator)}
        for _ in range(count)
    ]


def method(**settings):
    return AlignBeforeFuse("module.video", "module.text", **{"inputs": INPUTS, "queue_size": 6, **settings})


def features(module, batch):
    video, text = module.patch(batch["video"]), module.word(batch["text"])
    return module.video(video.tanh().mean(1)), module.text(text.tanh().mean(1)), video, text


def distilled(student, slow, columns, tau, alpha):
    """One direction, from the definition."""
    soft = (slow @ columns.T / tau.detach()).softmax(1)
    target = alpha * soft + (1 - alpha) * F.one_hot(torch.arange(len(student)), len(columns))
    return -(target * (student @ columns.T / tau).log_softmax(1)).sum(1).mean()


class Written(TwoTowers):
    """The same objective, in the training step by hand."""

    def __init__(self, momentum, alpha, weight, start, fine=0.0):
        super().__init__()
        two = two_towers()[0]
        self.load_state_dict(two.state_dict())
        self.slow = [copy.deepcopy(two).requires_grad_(False)]  # in a list: not a part of the module
        self.tau = nn.Parameter(torch.tensor(0.07))
        self.settings = momentum, alpha, weight, fine
        self.queue, self.tokens = [start], []
        self.seen = 0

    def training_step(self, batch, batch_idx):
        momentum, alpha, weight, fine = self.settings
        slow = self.slow[0]
        for name, mine in slow.named_parameters():
            mine.mul_(momentum).add_((1 - momentum) * self.get_parameter(name).detach())
        self.tau.data.clamp_(0.001, 0.5)
        video, text, patches, words = features(self, batch)
        slow_video, slow_text, slow_patches, slow_words = features(slow, batch)
        video, text, slow_video, slow_text = (F.normalize(x, dim=1) for x in (video, text, slow_video, slow_text))
        old_video, old_text = (torch.cat(part)[-6:] for part in zip(*self.queue, strict=True))
        alpha *= min(1, self.seen / 3)
        of_video = distilled(video, slow_video, torch.cat([slow_text, old_text]), self.tau, alpha)
        of_text = distilled(text, slow_text, torch.cat([slow_video, old_video]), self.tau, alpha)
        loss = super().training_step(batch, batch_idx) + weight * (of_video + of_text) / 2
        if fine:
            old = [torch.cat(part)[-5:] for part in zip(*self.tokens, strict=True)] if self.tokens else []
            columns = [torch.cat([new, *old[i : i + 1]]) for i, new in enumerate((slow_patches, slow_words))]
            ones = torch.ones(len(columns[0]), 4)
            loss = loss + fine * fine_grained_contrastive_loss(
                patches, words, ones[: len(words)], *columns, ones, num_frames=FRAMES, temperature=self.tau
            )
        self.queue.append((slow_video, slow_text))
        self.tokens.append((slow_patches, slow_words))
        self.seen += 1
        return loss


@pytest.mark.parametrize("fine", [0.0, 0.7])
def test_it_trains_as_the_objective_written_out(fine):
    tokens = {
        "video_tokens": "module.patch",
        "text_tokens": "module.word",
        "num_frames": FRAMES,
        "fine_weight": fine,
        "fine_queue_size": 5,
    }
    align = method(momentum=0.6, vtc_weight=0.3, **(tokens if fine else {}))
    attached, written = two_towers()[0], Written(0.6, 0.4, 0.3, align._random_rows(torch.zeros(1, 8)), fine)
    fit(attached, align, batches=batches(), max_epochs=2)
    fit(written, batches=batches(), max_epochs=2)
    for name, weight in attached.named_parameters():
        torch.testing.assert_close(weight, written.get_parameter(name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(align.helpers()["trained"].temperature, written.tau, rtol=1e-4, atol=1e-5)
    assert written.tau.item() != pytest.approx(0.07, abs=1e-6)


class TestMatching:
    """`vtm`: a batch of two has only one choice of negatives; in a larger one they are like what they replace."""

    settings = {  # noqa: RUF012
        "video_tokens": "module.patch#-1",
        "text_tokens": "module.word#-1",
        "matcher": "module.matcher",
    }

    def test_it_trains_as_the_objective_written_out(self):
        class WithMatching(Matched):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                video, text = self.patch(batch["video"]), self.word(batch["text"])
                logits = torch.cat([self.matcher(text, part) for part in (video, video.flip(0))])
                logits = torch.cat([logits, self.matcher(text.flip(0), video)])
                return loss + 0.4 * F.cross_entropy(logits, torch.tensor([1, 1, 0, 0, 0, 0]))

        attached, written = two_towers(Matched)[0], two_towers(WithMatching)[0]
        fit(attached, method(vtc_weight=0.0, vtm_weight=0.4, **self.settings), batches=batches(3, 2), max_epochs=2)
        fit(written, batches=batches(3, 2), max_epochs=2)
        for name, weight in attached.named_parameters():
            torch.testing.assert_close(weight, written.get_parameter(name), rtol=1e-4, atol=1e-6)

    def test_negatives_are_like_the_pair(self):
        seen = []

        class Watched(Matched):
            def on_train_start(self):
                self.matcher.register_forward_hook(lambda _, inputs, output: seen.append(inputs))

        align = method(temperature=0.001, momentum=0.0, vtc_weight=0.0, **self.settings)
        module, (batch,) = two_towers(Watched)[0], batches(1, 5)
        video, text, patches, words = (part.detach() for part in features(module, batch))
        fit(module, align, batches=[batch], max_epochs=1)
        similarity = (F.normalize(text, dim=1) @ F.normalize(video, dim=1).T).fill_diagonal_(-9)
        own = torch.arange(5)
        texts, videos = seen[1]  # the first are the module's own
        torch.testing.assert_close(texts, words[torch.cat([own, own, similarity.argmax(0)])])
        torch.testing.assert_close(videos, patches[torch.cat([own, similarity.argmax(1), own])])
        assert not torch.equal(similarity.argmax(0), similarity.argmax(1))

    def test_draws_leave_the_generator_and_differ_from_step_to_step(self):
        seen = []

        class Watched(Matched):
            def on_train_start(self):
                self.matcher.register_forward_hook(lambda _, inputs, output: seen.append(inputs[1]))

        (batch,) = batches(1, 6)
        align = method(temperature=0.5, vtc_weight=0.0, vtm_weight=1e-9, **self.settings)
        fit(two_towers(Watched)[0], align, batches=[batch], max_epochs=6)
        # Which video stands in the place of each: rows 0 to 5 are the videos themselves.
        chosen = {tuple(torch.cdist(v[6:12].flatten(1), v[:6].flatten(1)).argmin(1).tolist()) for v in seen[1::2]}
        assert len(chosen) > 1
        before = torch.get_rng_state()
        align._generator(torch.device("cpu"), 1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_one_pair_has_no_negative(self):
        align, plain = method(**self.settings, vtc_weight=0.0), two_towers(Matched)[0]
        module = two_towers(Matched)[0]
        with pytest.warns(UserWarning, match="a batch of one pair has no negative") as caught:
            fit(module, align, batches=batches(3, 1))
        assert sum("no negative" in str(warning.message) for warning in caught) == 1
        fit(plain, batches=batches(3, 1))
        for name, weight in module.named_parameters():
            assert torch.equal(weight, plain.get_parameter(name))

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"matcher": "module.macher"}, AddressError, r"'module\.macher' matches no .* Did you mean"),
            ({"matcher": "module.*"}, AddressError, r"`matcher` to be one submodule, but 'module\.\*' names 6"),
            ({"matcher": "module.texts"}, ValueError, r"`matcher\(\.\.\.\)` must have shape \(3B, 2\) = \(12, 2\)"),
            ({"video_tokens": "module.video"}, ValueError, r"features at 'module\.video' to be \(B, N, D\)"),
        ],
    )
    def test_what_does_not_fit(self, settings, error, match):
        class Texts(nn.Module):
            def forward(self, text, video):
                return text

        class Other(Matched):
            def __init__(self):
                super().__init__()
                self.texts = Texts()

        with pytest.raises(error, match=match):
            fit(two_towers(Other)[0], method(**{**self.settings, **settings}), batches=batches(1))

    def test_without_tokens(self):
        with pytest.raises(ValueError, match=r"`matcher` 'module\.matcher' needs `video_tokens` and"):
            method(matcher="module.matcher", video_tokens="module.patch")


@pytest.mark.parametrize(("every", "updates"), [("batch", 6), ("optimizer_step", 3)])
def test_how_often_the_teacher_follows(every, updates):
    """The module stands still, so the teacher comes nearer by `momentum` in each update."""

    class Still(TwoTowers):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_start(self):
            with torch.no_grad():
                self.video.weight.zero_()

    module, align = two_towers(Still)[0], method(momentum=0.5, ema_every=every, widths=[8, 8])
    start = module.video.weight.detach().clone()
    fit(module, align, batches=batches(6), max_epochs=1, limit_train_batches=6, accumulate_grad_batches=2)
    torch.testing.assert_close(align.teacher.network.video.weight, start / 2**updates)


def test_the_temperature_stays_in_its_range():
    align = method(temperature=0.5)
    module = two_towers()[0]
    with torch.no_grad():
        align.helpers()["trained"].temperature.fill_(3.0)
    fit(module, align, batches=batches(1), max_epochs=1, limit_train_batches=1)
    assert align.helpers()["trained"].temperature < 0.7


def test_projections_are_trained_and_in_no_checkpoint_of_the_module():
    module, align = two_towers()[0], method(widths=[8, 8], embed_dim=4)
    before = copy.deepcopy(align.helpers()["trained"].state_dict())
    fit(module, align, batches=batches())
    after = align.helpers()["trained"].state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(before)
    assert list(module.state_dict()) == list(two_towers()[0].state_dict())


class TestQueue:
    def test_it_holds_the_latest(self):
        queue, pushed = Queue(5), []
        for size in (2, 2, 3, 0, 5, 1):
            rows = torch.arange(len(pushed), len(pushed) + size)
            pushed += rows.tolist()
            queue.push(rows, rows.float()[:, None])
            first, second = queue.rows(rows, rows.float()[:, None])
            assert sorted(first.tolist()) == pushed[-5:]
            assert torch.equal(second[:, 0].long(), first)

    def test_of_size_0(self):
        queue = Queue(0)
        queue.push(torch.ones(2, 3))
        assert queue.rows(torch.ones(2, 3))[0].shape == (0, 3)

    def test_state(self):
        queue, other = Queue(3), Queue(3)
        queue.push(torch.arange(2))
        queue.push(torch.arange(2, 4))
        other.load_state_dict(queue.state_dict())
        queue.push(torch.arange(4, 6))
        assert other.rows(torch.zeros(0))[0].tolist() == [3, 1, 2]

    def test_it_is_no_shorter_than_the_batch(self):
        with pytest.raises(ValueError, match="at least as long as the batch of all ranks, 4, or 0, but it is 3"):
            fit(two_towers()[0], method(queue_size=3), batches=batches())

    def test_rows_of_another_length(self):
        queue = Queue(3)
        queue.push(torch.zeros(2, 4, 3))
        with pytest.raises(ValueError, match=r"rows of shape \[4, 3\].* got \[5, 3\]; pad all batches"):
            queue.rows(torch.zeros(2, 5, 3))


def start_on(rank):
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    rows = method(queue_size=50)._random_rows(torch.zeros(1, 8))
    assert torch.equal(torch.get_rng_state(), before)
    return rows


def test_the_queue_begins_with_unit_rows_the_same_on_all_ranks():
    (video, text), other = on_ranks(start_on)
    assert torch.equal(video, other[0])
    assert torch.equal(text, other[1])
    for rows in (video, text):
        assert rows.shape == (50, 8)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
        assert rows.mean().abs() < 0.1
    assert (video * text).sum(1).abs().mean() < 0.5
    align = method(queue_size=50)
    fit(two_towers()[0], align, batches=batches(2), max_epochs=1)
    for now, start in zip(align._pairs.rows(video, text), (video, text), strict=True):
        assert torch.equal(now[8:], start[8:])
        assert not (now[:8] == start[:8]).any()


def queue_on(rank):
    module = two_towers()[0]
    align = method(queue_size=20)
    shared = [{name: part.chunk(2)[rank] for name, part in batch.items()} for batch in batches(2)]
    from lightning_methods.functional._gather import gather_batch

    for batch in shared:
        video, text, *_ = features(module, batch)
        align._pairs.push(*gather_batch(video, text, gather_grad=False))
    return [ring.detach() for ring in align._pairs.rows(video, text)]


def test_the_queues_of_two_ranks_hold_the_same_pairs():
    module = two_towers()[0]
    expected = torch.cat([features(module, batch)[0] for batch in batches(2)]).detach()
    for video, _ in on_ranks(queue_on):
        torch.testing.assert_close(*(rows[rows[:, 0].argsort()] for rows in (video, expected)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 0.6}, "`temperature`.*0.6"),
        ({"alpha": 1.5}, "`alpha`.*1.5"),
        ({"queue_size": -1}, "`queue_size`.*-1"),
        ({"fine_queue_size": -1}, "`fine_queue_size`.*-1"),
        ({"ema_every": "epoch"}, "`ema_every`.*'epoch'"),
        ({"widths": [8]}, r"`widths`.*\[8\]"),
        ({"momentum": 2.0}, "`momentum`.*2.0"),
        ({"fine_weight": 1.0, "video_tokens": "module.patch"}, "`fine_weight` 1.0 needs `video_tokens`"),
    ],
)
def test_bad_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        method(**settings)


@pytest.mark.parametrize("where", ["batch.video", "output.video", lambda step: step.batch])
def test_features_are_addresses_in_the_module(where):
    with pytest.raises(AddressError, match="`video` to be the address of a value in the module"):
        AlignBeforeFuse(where, "module.text")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"video": "module.patch"}, r"'module\.patch' to be \(B, E\).*\[4, 6, 6\]"),
        ({"video": "module.wide"}, r"10 wide .* 8: give `widths=\[10, 8\]`"),
        ({"text": "module.part"}, r"one text for each video.*\[4, 8\].*\[2, 8\]"),
        (
            {"fine_weight": 1.0, "video_tokens": "module.patch", "text_tokens": "module.word", "num_frames": FRAMES}
            | {"text_mask": "batch.video"},
            r"`text_mask` at 'batch\.video' to be \[4, 4\]",
        ),
    ],
)
def test_shapes_are_checked_at_the_first_step(settings, match):
    class Other(TwoTowers):
        def __init__(self):
            super().__init__()
            self.wide, self.part = nn.Linear(5, 10), nn.Identity()

        def forward(self, video, text):
            self.wide(video.mean(1))
            self.part(self.text(self.word(text).mean(1))[::2])
            return super().forward(video, text)

    where = {"video": "module.video", "text": "module.text", **settings}
    with pytest.raises(ValueError, match=match):
        fit(Other(), AlignBeforeFuse(**where, inputs=INPUTS), batches=batches(1))


def test_the_log(tmp_path):
    align = method()
    from pytorch_lightning.loggers import CSVLogger

    fit(two_towers()[0], align, batches=batches(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"twbert/vtc", "twbert/loss", "twbert/temperature", "twbert/alpha"} <= set(header)


# --- TrajectoryWordAlignment -------------------------------------------------------------------------


def fused():
    torch.manual_seed(0)
    return Fusion(), (torch.randn(8, WORDS + 1 + FRAMES * PATCHES, 8), torch.arange(8) % 3)


def swap(where="module.attention", **settings):
    return TrajectoryWordAlignment(where, **{"num_frames": FRAMES, "patches_per_frame": PATCHES, **settings})


def test_words_follow_trajectories_with_the_projections_of_the_old_attention():
    module, (x, _) = fused()
    old = module.attention
    swap(norm="module.norm").apply(module)
    q, k, v = old.in_proj_weight.chunk(3)
    qb, kb, vb = old.in_proj_bias.chunk(3)
    out, out_bias = old.out_proj.weight, old.out_proj.bias
    expected = trajectory_word_attention(
        x[:, :WORDS],
        x[:, WORDS:],
        torch.cat([q, k, v, q, k, v, out, out]),
        torch.cat([qb, kb, vb, qb, kb, vb, out_bias, out_bias]),
        module.norm.weight,
        module.norm.bias,
        num_heads=2,
        num_frames=FRAMES,
        eps=module.norm.eps,
    )
    torch.testing.assert_close(module.attention(x, x, x)[0], torch.cat(expected, dim=1))


def test_the_old_attention_comes_back_as_it_was():
    module, batch = fused()
    before = copy.deepcopy(module.attention.state_dict())
    align = swap()
    fit(module, align, batches=[batch])
    align.undo(module)
    assert type(module.attention) is nn.MultiheadAttention
    assert all(torch.equal(value, before[name]) for name, value in module.attention.state_dict().items())


@pytest.mark.parametrize("name", ["num_frames", "patches_per_frame"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=rf"`{name}`.*0"):
        swap(**{name: 0})


def test_a_sequence_of_another_length_is_named_with_its_parts():
    module, batch = fused()
    with pytest.raises(ValueError, match=r"T = 5 frames of S = 3 patches.*N = 11"):
        fit(module, swap(num_frames=5), batches=[batch])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"where": "module.head"}, r"'module\.head' is a Linear, which cannot be replaced"),
        ({"norm": "module.head"}, r"`norm` to be the address of one LayerNorm.*'module\.head', a Linear"),
        ({"norm": ["module.norm", "module.head"]}, r"one LayerNorm.*and 1 more"),
    ],
)
def test_parts_of_another_kind(settings, match):
    module, batch = fused()
    with pytest.raises(TypeError, match=match):
        fit(module, swap(**settings), batches=[batch])
    assert type(module.attention) is nn.MultiheadAttention


def test_both_callbacks_together():
    class Both(TwoTowers):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, video, text):
            patches, words = self.patch(video), self.word(text)
            x = torch.cat([words, patches.mean(1, keepdim=True), patches], 1)
            fused = self.attention(x, x, x)[0]
            return self.video(fused[:, 5:].mean(1)) @ self.text(fused[:, :4].mean(1)).T

    module, align = Both(), method()
    fit(module, swap(), align, batches=batches())
    assert type(align.teacher.network.attention) is type(module.attention) is not nn.MultiheadAttention
