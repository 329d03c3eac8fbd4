import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import frame_bias_scores, sample_stillmix, select_biased_frames, stillmix

close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
SIZES = {"b": 3, "n": 2, "c": 3, "t": 4, "h": 5, "w": 6}
LAYOUTS = ("btchw", "bcthw", "bncthw")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(layout: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Tensor, Tensor]:
    """Videos of the layout and a frame for each clip."""
    size = {**SIZES, **sizes}
    videos = torch.randn([size[dim] for dim in layout], generator=seeded(seed), dtype=torch.float64)
    frames = torch.randn([size[dim] for dim in layout if dim != "t"], generator=seeded(seed + 1), dtype=torch.float64)
    return videos.to(dtype), frames.to(dtype)


def plain_stillmix(videos: Tensor, frames: Tensor, lam: float | Tensor, apply: Tensor | None, layout: str) -> Tensor:
    """One frame of one clip at a time."""
    out = videos.clone()
    lams = torch.as_tensor(lam).expand(len(videos)).tolist()
    for i in range(len(videos)):
        if apply is not None and not apply[i]:
            continue
        single = layout != "bncthw"
        for n in range(1 if single else videos.shape[1]):
            clip = out[i] if single else out[i, n]
            still = frames[i] if single or frames.ndim == 4 else frames[i, n]
            for t in range(clip.shape[0] if layout == "btchw" else clip.shape[1]):
                frame = clip[t] if layout == "btchw" else clip[:, t]
                frame.copy_(lams[i] * frame + (1 - lams[i]) * still)
    return out


class TestAgainstTheDefinition:
    @each_layout
    @pytest.mark.parametrize("batch", [1, 4, 5])
    @pytest.mark.parametrize("lam", [0.25, torch.tensor(0.7), torch.tensor([0.7])], ids=["number", "0-d", "1-d"])
    @pytest.mark.parametrize("apply", ["all", "none", "some", None])
    def test_frame_by_frame(self, layout, batch, lam, apply):
        videos, frames = clips(layout, b=batch)
        places = torch.arange(batch)
        apply = {"all": places >= 0, "none": places < 0, "some": places % 3 == 0, None: None}[apply]
        close(stillmix(videos, frames, lam, apply, layout=layout), plain_stillmix(videos, frames, lam, apply, layout))

    @each_layout
    def test_own_lam_for_each_sample(self, layout):
        videos, frames = clips(layout)
        lam, apply = torch.tensor([0.0, 0.3, 0.9]), torch.tensor([True, False, True])
        close(stillmix(videos, frames, lam, apply, layout=layout), plain_stillmix(videos, frames, lam, apply, layout))

    def test_a_frame_shared_by_the_clips_of_a_sample(self):
        videos, frames = clips("bncthw")
        close(
            stillmix(videos, frames[:, 1], 0.25, layout="bncthw"),
            plain_stillmix(videos, frames[:, 1], 0.25, None, "bncthw"),
        )

    def test_lam_weighs_the_clip(self):
        videos, frames = clips("bcthw")
        assert stillmix(videos, frames, 1.0).equal(videos)
        close(stillmix(videos, frames, 0.0), frames.unsqueeze(2).expand_as(videos))

    @each_layout
    @pytest.mark.parametrize("lam", [0.25, torch.tensor([0.0, 0.7, 1.0])])
    def test_in_place(self, layout, lam):
        videos, frames = clips(layout)
        apply = torch.tensor([True, True, False])
        given = videos.clone()
        expected = stillmix(given, frames, lam, apply, layout=layout)
        assert given.equal(videos), "without `inplace` the clips stay as they are"
        assert stillmix(given, frames, lam, apply, layout=layout, inplace=True) is given
        close(given, expected)
        assert given[2].equal(videos[2])

    def test_layouts_are_the_same_operation(self):
        videos, frames = clips("bcthw")
        lam, apply = torch.tensor(0.3), torch.tensor([True, False, True])
        expected = stillmix(videos, frames, lam, apply)
        swapped = stillmix(videos.transpose(1, 2), frames, lam, apply, layout="btchw")
        one_clip = stillmix(videos[:, None], frames[:, None], lam, apply, layout="bncthw")
        assert swapped.transpose(1, 2).equal(expected)
        assert one_clip[:, 0].equal(expected)


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("frames_dtype", [torch.float16, torch.float32])
    def test_keeps_the_dtype_of_the_videos(self, dtype, frames_dtype):
        videos, frames = clips("bcthw", dtype=dtype)
        frames, lam = frames.to(frames_dtype), torch.tensor(0.3)
        found = stillmix(videos, frames, lam)
        assert found.dtype == dtype
        expected = plain_stillmix(videos.double(), frames.double(), 0.3, None, "bcthw")
        tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps, torch.finfo(frames.dtype).eps)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)

    def test_never_in_place_and_strides_do_not_matter(self):
        videos, frames = clips("bcthw")
        strided = videos.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
        before = strided.clone()
        found = stillmix(strided, frames[..., ::2], 0.3, torch.tensor([False, True, False]))
        assert strided.equal(before)
        assert found.untyped_storage().data_ptr() != strided.untyped_storage().data_ptr()
        close(found[1], plain_stillmix(before, frames[..., ::2], 0.3, None, "bcthw")[1])

    @each_layout
    def test_gradient_is_the_weight_and_none_reaches_the_frames(self, layout):
        videos, frames = clips(layout)
        videos.requires_grad_()
        frames.requires_grad_()
        stillmix(videos, frames, 0.3, torch.tensor([True, False, True]), layout=layout).sum().backward()
        for i, weight in enumerate([0.3, 1.0, 0.3]):
            close(videos.grad[i], torch.full_like(videos[i], weight))
        assert frames.grad is None

    def test_gradcheck(self):
        videos, frames = clips("bcthw", dtype=torch.float64, t=2, h=2, w=2)
        lam = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
        apply = torch.tensor([True, True, False])
        assert torch.autograd.gradcheck(lambda v, w: stillmix(v, frames, w, apply), (videos.requires_grad_(), lam))

    @each_layout
    def test_never_waits_for_the_device(self, layout):
        videos, frames = clips(layout)
        draw = sample_stillmix(3, 10, generator=seeded())
        with NoSync():
            stillmix(videos, frames, draw.lam, draw.apply, layout=layout)
            stillmix(videos, frames, 0.3, draw.apply, layout=layout)
            sample_stillmix(3, 10, generator=seeded())

    @settings(max_examples=25, deadline=None)
    @given(
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        apply=st.lists(st.booleans(), min_size=1, max_size=4),
        lam=st.floats(0, 1),
        seed=st.integers(0, 99),
    )
    def test_untouched_samples_are_bit_identical_and_the_rest_lies_between(self, layout, dtype, apply, lam, seed):
        videos, frames = clips(layout, seed=seed, dtype=dtype, b=len(apply), t=2, h=2, w=2)
        found = stillmix(videos, frames, lam, torch.tensor(apply), layout=layout)
        assert found.shape == videos.shape
        still = frames.unsqueeze(layout.index("t"))
        low, high = torch.minimum(videos, still), torch.maximum(videos, still)
        slack = 8 * torch.finfo(dtype).eps
        for i, mixed in enumerate(apply):
            if mixed:
                assert (found[i] >= low[i] - slack).all()
                assert (found[i] <= high[i] + slack).all()
            else:
                assert found[i].equal(videos[i])

    @settings(max_examples=20, deadline=None)
    @given(lam=st.floats(0, 1), seed=st.integers(0, 99))
    def test_motion_is_scaled_by_lam(self, lam, seed):
        """The still frame has no motion: differences of frames shrink to lam of what they were."""
        videos, frames = clips("bcthw", seed=seed, dtype=torch.float64)
        close(stillmix(videos, frames, lam).diff(dim=2), lam * videos.diff(dim=2))


class TestDraw:
    def test_shapes(self):
        draw = sample_stillmix(5, 7)
        assert (draw.lam.shape, draw.indices.shape, draw.apply.shape) == ((), (5,), (5,))
        draw = sample_stillmix(5, 7, clips=3, per_sample_lam=True)
        assert (draw.lam.shape, draw.indices.shape, draw.apply.shape) == ((5,), (5, 3), (5,))
        assert (draw.indices.dtype, draw.apply.dtype) == (torch.long, torch.bool)

    @pytest.mark.parametrize(("alpha", "beta"), [(200, 200), (20, 60), (2, 2), (0.2, 0.2)])
    def test_lam_has_the_moments_of_beta(self, alpha, beta):
        lam = sample_stillmix(20_000, 1, alpha=alpha, beta=beta, per_sample_lam=True, generator=seeded()).lam
        mean, variance = alpha / (alpha + beta), alpha * beta / (alpha + beta) ** 2 / (alpha + beta + 1)
        assert lam.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 20_000))
        assert lam.std().item() == pytest.approx(math.sqrt(variance), rel=0.05)

    @pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
    def test_share_of_blended_samples(self, p):
        apply = sample_stillmix(10_000, 1, p=p, generator=seeded()).apply
        assert apply.float().mean().item() == pytest.approx(p, abs=0.02 if 0 < p < 1 else 0)

    def test_indices_are_uniform_with_replacement(self):
        indices = sample_stillmix(2000, 10, clips=2, generator=seeded()).indices
        assert (indices.flatten().bincount(minlength=10) - 400).abs().max() < 100
        assert not indices[:, 0].equal(indices[:, 1])

    @pytest.mark.parametrize("options", [{}, {"clips": 2, "per_sample_lam": True}])
    def test_a_generator_repeats_the_draw_and_seeds_differ(self, options):
        first, again, other = (sample_stillmix(50, 99, generator=seeded(s), **options) for s in (1, 1, 2))
        for one, two, three in zip(first, again, other, strict=True):
            assert one.equal(two)
            assert not one.equal(three)

    def test_the_global_generator_serves_where_none_is_given(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first = sample_stillmix(50, 99)
            torch.manual_seed(3)
            second = sample_stillmix(50, 99)
        assert all(one.equal(two) for one, two in zip(first, second, strict=True))

    def test_a_draw_can_be_replayed(self):
        bank = torch.randn(9, 3, 5, 6, generator=seeded())
        videos, _ = clips("bcthw")
        draw = sample_stillmix(3, len(bank), generator=seeded())
        first = stillmix(videos, bank[draw.indices], draw.lam, draw.apply)
        assert first.equal(stillmix(videos, bank[draw.indices], draw.lam, draw.apply))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self):
        videos, frames = (x.cuda() for x in clips("bcthw"))
        sample_stillmix(3, 10, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw = sample_stillmix(3, 10, generator=seeded(), device="cuda")
            own = sample_stillmix(3, 10, device="cuda")
            stillmix(videos, frames, draw.lam, own.apply)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = sample_stillmix(3, 10, generator=seeded())
        assert all(x.is_cuda and x.cpu().equal(y) for x, y in zip(draw, expected, strict=True))


class TestScores:
    def test_against_one_frame_at_a_time(self):
        logits, targets = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 3, 2, 1, 1, 0])
        found = frame_bias_scores(logits, targets, temperature=0.5)
        for i, row in enumerate((logits / 0.5).exp()):
            p = (row / row.sum()).tolist()
            assert found.target_prob[i].item() == pytest.approx(p[targets[i]], rel=1e-5)
            assert found.top_prob[i].item() == pytest.approx(max(p), rel=1e-5)
            assert found.top_class[i].item() == p.index(max(p))

    def test_half_precision_is_upcast_and_no_gradient_flows(self):
        logits = torch.tensor([[12.0, 0.0], [11.0, 0.0]], dtype=torch.float16, requires_grad=True)
        found = frame_bias_scores(logits, torch.tensor([0, 0]))
        assert found.top_prob.dtype == torch.float32
        assert found.top_prob[0] > found.top_prob[1]
        assert not found.target_prob.requires_grad


few_values = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.500001, 0.75, 1.0]), min_size=1, max_size=20)


class TestSelection:
    @settings(max_examples=60, deadline=None)
    @given(values=few_values, low=st.floats(0, 0.9), width=st.floats(0.05, 1))
    def test_quantile_is_a_window_of_the_sorted_pairs(self, values, low, width):
        high = min(1.0, low + width)
        pairs = sorted(zip(values, range(len(values)), strict=True))
        expected = [key for _, key in pairs[int(low * len(values)) : int(high * len(values))]]
        if not expected:
            with pytest.raises(ValueError, match="no frame"):
                select_biased_frames(torch.tensor(values), low=low, high=high)
        else:
            assert select_biased_frames(torch.tensor(values), low=low, high=high).tolist() == expected

    @settings(max_examples=40, deadline=None)
    @given(values=few_values, count=st.integers(1, 25))
    def test_top_is_the_head_of_the_reversed_sorted_pairs(self, values, count):
        expected = [key for _, key in sorted(zip(values, range(len(values)), strict=True))[::-1][:count]]
        assert select_biased_frames(torch.tensor(values), strategy="top", count=count).tolist() == expected

    def test_threshold_includes_both_bounds(self):
        scores = torch.tensor([0.75, 0.25, 0.1, 0.5, 0.8])
        assert select_biased_frames(scores, strategy="threshold", low=0.25, high=0.75).tolist() == [0, 1, 3]

    def test_truncation_of_the_window(self):
        """int(0.15 · 37) = 5 and int(0.29 · 100) = 28."""
        assert select_biased_frames(torch.arange(37.0), low=0.15)[0] == 5
        assert select_biased_frames(torch.arange(100.0), low=0.29)[0] == 28

    def test_bernoulli_takes_frames_with_their_score_as_probability(self):
        scores = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64).repeat_interleave(4000)
        chosen = select_biased_frames(scores, strategy="bernoulli", generator=seeded())
        assert chosen.equal(chosen.sort().values)
        shares = (chosen // 4000).bincount(minlength=4) / 4000
        assert shares.tolist() == pytest.approx([0, 0.2, 0.9, 1], abs=0.03)
        assert chosen.equal(select_biased_frames(scores, strategy="bernoulli", generator=seeded()))
        assert not chosen.equal(select_biased_frames(scores, strategy="bernoulli", generator=seeded(1)))

    def test_float64_ties_apart(self):
        scores = torch.tensor([0.5 + 1e-12, 0.5], dtype=torch.float64)
        assert select_biased_frames(scores).tolist() == [0]
        assert select_biased_frames(scores.float()).tolist() == [1]
