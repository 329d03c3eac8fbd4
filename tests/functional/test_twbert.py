import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import trajectory_pool, trajectory_word_attention

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def problem(batch=2, length=5, frames=3, patches=4, width=8, *, seed=0, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [
        randn(batch, length, width),
        randn(batch, 1 + frames * patches, width),
        randn(8 * width, width) / math.sqrt(width),
        0.3 * randn(8 * width),
        1 + 0.2 * randn(width),
        0.2 * randn(width),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain(text, video, weight, bias, norm_weight, norm_bias, *, num_heads, num_frames, text_mask=None):
    """The definition: sample by sample, head by head, word by word, frame by frame."""
    batch, length, width = text.shape
    patches, d = (video.shape[1] - 1) // num_frames, width // num_heads
    mask = torch.ones(batch, length) if text_mask is None else text_mask
    q1, k1, v1, q2, k2, v2, out, traj = (
        lambda x, i=i: x @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in range(8)
    )
    texts, videos = [], []
    for words, tokens, real in zip(text, video, mask, strict=True):
        cls, frames = tokens[:1], tokens[1:].reshape(num_frames, patches, width)

        def attend(query, keys, values, closed):
            """One query (D,), keys and values (M, D): heads beside each other."""
            heads = []
            for h in range(num_heads):
                part = slice(h * d, (h + 1) * d)
                logits = keys[:, part] @ query[part] / math.sqrt(d)
                logits = torch.where(closed, torch.full_like(logits, -1e9), logits)
                heads.append(logits.softmax(0) @ values[:, part])
            return torch.cat(heads)

        none = torch.zeros(patches, dtype=torch.bool)
        closed_words = real == 0
        rows = []
        for word in words:
            z = torch.stack([attend(q1(word), k1(frame), v1(frame), none) for frame in frames])
            own = F.layer_norm(traj(z), (width,), norm_weight, norm_bias, 1e-12)
            keys = torch.cat([words, own])
            closed = torch.cat([closed_words, torch.zeros(num_frames, dtype=torch.bool)])
            rows.append(out(attend(q2(word), k2(keys), v2(keys), closed)))
        texts.append(torch.stack(rows))

        closed = torch.cat([closed_words, none, torch.zeros(1, dtype=torch.bool)])
        of_cls, of_patches = [], []
        for frame in frames:
            keys = torch.cat([words, frame, cls])
            of_cls.append(attend(q1(cls[0]), k1(keys), v1(keys), closed))
            of_patches += [attend(q1(patch), k1(keys), v1(keys), closed) for patch in frame]
        videos.append(out(torch.stack([torch.stack(of_cls).mean(0), *of_patches])))
    return torch.stack(texts), torch.stack(videos)


def masks(batch, length) -> dict[str, Tensor | None]:
    some = torch.ones(batch, length, dtype=torch.long)
    some[-1, length // 2 :] = 0
    one = torch.zeros(batch, length, dtype=torch.bool)
    one[:, 0] = True
    return {"no mask": None, "integers": some, "one word": one, "no word": torch.zeros(batch, length)}


class TestAttention:
    @pytest.mark.parametrize("frames", [1, 3])
    @pytest.mark.parametrize("mask", list(masks(1, 1)))
    def test_is_the_definition(self, mask, frames):
        tensors = problem(frames=frames)
        text_mask = masks(2, 5)[mask]
        found = trajectory_word_attention(*tensors, num_heads=2, num_frames=frames, text_mask=text_mask)
        expected = plain(*tensors, num_heads=2, num_frames=frames, text_mask=text_mask)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        gradients = [
            torch.autograd.grad(sum((result * result.detach().cos()).sum() for result in results), tensors)
            for results in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            close(one, other)

    @settings(max_examples=15, deadline=None)
    @given(
        batch=st.integers(0, 2),
        length=st.integers(1, 4),
        frames=st.integers(1, 3),
        patches=st.integers(1, 3),
        heads=st.sampled_from([1, 2, 4]),
        seed=st.integers(0, 99),
    )
    def test_is_the_definition_for_any_sizes(self, batch, length, frames, patches, heads, seed):
        tensors = problem(max(batch, 1), length, frames, patches, 4, seed=seed)
        tensors[0], tensors[1] = tensors[0][:batch], tensors[1][:batch]
        found = trajectory_word_attention(*tensors, num_heads=heads, num_frames=frames)
        assert found.text.shape == tensors[0].shape
        assert found.video.shape == tensors[1].shape
        if batch:
            expected = plain(*tensors, num_heads=heads, num_frames=frames)
            close(found.text, expected[0])
            close(found.video, expected[1])

    def test_gradcheck(self):
        mask = masks(1, 2)["integers"]
        call = functools.partial(trajectory_word_attention, num_heads=2, num_frames=2, text_mask=mask, eps=1e-6)
        assert torch.autograd.gradcheck(lambda *args: tuple(call(*args)), problem(1, 2, 2, 2, 4))

    def test_order_of_patches_within_a_frame_does_not_matter_to_words(self):
        tensors = problem()
        order = torch.tensor([2, 0, 3, 1])
        frames = tensors[1][:, 1:].unflatten(1, (3, 4))
        shuffled = torch.cat([tensors[1][:, :1], frames[:, :, order].flatten(1, 2)], 1)
        found = trajectory_word_attention(tensors[0], shuffled, *tensors[2:], num_heads=2, num_frames=3)
        expected = trajectory_word_attention(*tensors, num_heads=2, num_frames=3)
        close(found.text, expected.text)
        close(found.video[:, 1:].unflatten(1, (3, 4)), expected.video[:, 1:].unflatten(1, (3, 4))[:, :, order])
        # and the frames of the patches do
        mixed = torch.cat([tensors[1][:, :1], frames.transpose(1, 2).flatten(1, 2)], 1)
        other = trajectory_word_attention(tensors[0], mixed, *tensors[2:], num_heads=2, num_frames=3)
        assert (other.text - expected.text).abs().max() > 1e-3

    def test_masked_words_change_nothing(self):
        tensors = problem()
        mask = masks(2, 5)["integers"]
        changed = torch.where(mask[..., None] != 0, tensors[0], 7.0)
        call = functools.partial(trajectory_word_attention, num_heads=2, num_frames=3, text_mask=mask)
        one, other = call(*tensors), call(changed, *tensors[1:])
        close(one.video, other.video)
        close(one.text[mask != 0], other.text[mask != 0])

    def test_non_contiguous_inputs(self):
        tensors = problem()
        strided = [tensor.detach().mT.contiguous().mT if tensor.ndim > 1 else tensor.detach() for tensor in tensors]
        found = trajectory_word_attention(*strided, num_heads=2, num_frames=3)
        close(found.video, trajectory_word_attention(*tensors, num_heads=2, num_frames=3).video)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        tensors = problem(dtype=dtype)
        found = trajectory_word_attention(*tensors, num_heads=2, num_frames=3, text_mask=masks(2, 5)["no word"])
        exact = [tensor.detach().double() for tensor in tensors]
        expected = trajectory_word_attention(*exact, num_heads=2, num_frames=3, text_mask=masks(2, 5)["no word"])
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).abs().max() < 0.1

    def test_autocast(self):
        tensors = problem(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = trajectory_word_attention(*tensors, num_heads=2, num_frames=3, text_mask=masks(2, 5)["integers"])
        found.text.float().sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in tensors)

    def test_dropout(self):
        tensors = [tensor.detach() for tensor in problem(dtype=torch.float32)]
        call = functools.partial(trajectory_word_attention, *tensors, num_heads=2, num_frames=3)
        torch.manual_seed(0)
        draws = [call(dropout_p=0.3) for _ in range(2)]
        assert not torch.equal(draws[0].text, draws[1].text)
        assert not torch.equal(draws[0].video, draws[1].video)
        everything = call(dropout_p=1.0)  # nothing but the bias of `out` is left
        torch.testing.assert_close(everything.text, tensors[3][6 * 8 : 7 * 8].expand(2, 5, 8))
        torch.testing.assert_close(everything.video, tensors[3][6 * 8 : 7 * 8].expand(2, 13, 8))

    def test_never_waits_for_the_device(self):
        tensors = problem()
        with NoSync():
            found = trajectory_word_attention(*tensors, num_heads=2, num_frames=3, text_mask=masks(2, 5)["integers"])
            (found.text.sum() + found.video.sum()).backward()


class TestPool:
    def test_is_a_softmax_per_frame(self):
        query, key, value = (
            torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            for shape in [(2, 3, 4, 5), (2, 3, 6, 7, 5), (2, 3, 6, 7, 5)]
        )
        found = trajectory_pool(query, key, value)
        for b, h, i, t in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 3)]:
            weights = (key[b, h, t] @ query[b, h, i] / math.sqrt(5)).softmax(0)
            close(found.weights[b, h, i, t], weights)
            close(found.trajectory[b, h, i, t], weights @ value[b, h, t])
        assert found.weights.shape == (2, 3, 4, 6, 7)

    def test_gradcheck(self):
        shapes = [(1, 2, 2, 3), (1, 2, 2, 3, 3), (1, 2, 2, 3, 3)]
        inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(lambda *args: tuple(trajectory_pool(*args)), inputs)


T, V, W, B, G, H = (tensor.detach() for tensor in problem())
call = functools.partial(trajectory_word_attention, num_heads=2, num_frames=3)
BAD_CALLS = {
    "text of two dimensions": (lambda: call(T[0], V, W, B, G, H), r"text.*\(B, L, D\).*\(5, 8\)"),
    "integer text": (lambda: call(T.long(), V, W, B, G, H), "text.*int64"),
    "width of video": (lambda: call(T, V[..., :4], W, B, G, H), r"video.*8.*\(2, 13, 4\)"),
    "batch of video": (lambda: call(T, V[:1], W, B, G, H), r"video.*\(1, 13, 8\)"),
    "heads": (lambda: call(T, V, W, B, G, H, num_heads=3), "num_heads.*8.*3"),
    "no head": (lambda: call(T, V, W, B, G, H, num_heads=0), "num_heads.*0"),
    "frames": (lambda: call(T, V, W, B, G, H, num_frames=5), r"num_frames.*5 frames for 1 \+ 12 tokens"),
    "no frame": (lambda: call(T, V, W, B, G, H, num_frames=0), "num_frames"),
    "no patch": (lambda: call(T, V[:, :1], W, B, G, H), "num_frames.*1 \\+ 0"),
    "mask": (lambda: call(T, V, W, B, G, H, text_mask=torch.ones(2, 4)), r"text_mask.*\(2, 5\).*\(2, 4\)"),
    "proj_weight": (lambda: call(T, V, W[:-1], B, G, H), r"proj_weight.*\(64, 8\).*\(63, 8\)"),
    "proj_bias": (lambda: call(T, V, W, B[:-1], G, H), r"proj_bias.*64.*63"),
    "norm": (lambda: call(T, V, W, B, G[:1], H), "norm_weight"),
    "pool": (lambda: trajectory_pool(T[None], V, V), r"key.*\(B, H, T, S, d\)"),
    "pool value": (
        lambda: trajectory_pool(T[None], torch.zeros(1, 2, 1, 1, 8), torch.zeros(1, 2, 1, 2, 8)),
        r"value.*\(1, 2, 1, 2, 8\)",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
