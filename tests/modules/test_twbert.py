import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from timm.layers import Attention
from torch import nn

from lightning_methods.functional import trajectory_word_attention
from lightning_methods.modules import (
    HierarchicalFrameSelector,
    MomentumQueue,
    TimmTrajectoryWordAttention,
    TrajectoryWordAttention,
    TrajectoryWordEncoder,
    TrajectoryWordLayer,
    TrajectoryWordSelfAttention,
    VideoTextMatcher,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(width=8):
    return torch.randn(2, 5, width), torch.randn(2, 1 + 3 * 4, width)


def mapped(x, attention, name):
    index = ["q1", "k1", "v1", "q2", "k2", "v2", "out", "traj"].index(name)
    return F.linear(x, attention.proj_weight.chunk(8)[index], attention.proj_bias.chunk(8)[index])


class TestAttention:
    def test_is_the_function(self):
        attention = TrajectoryWordAttention(8, 2, dropout=0.0, eps=0.1)
        for parameter in (attention.norm.weight, attention.proj_bias):
            nn.init.normal_(parameter)
        text, video = inputs()
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        weights = attention.proj_weight, attention.proj_bias, attention.norm.weight, attention.norm.bias
        expected = trajectory_word_attention(text, video, *weights, num_heads=2, num_frames=3, text_mask=mask, eps=0.1)
        found = attention(text, video, num_frames=3, text_mask=mask)
        close(found.text, expected.text)
        close(found.video, expected.video)
        default = TrajectoryWordAttention(8, 2, dropout=0.0)
        default.load_state_dict(attention.state_dict())
        assert (default(text, video, num_frames=3, text_mask=mask).text - expected.text).abs().max() > 1e-4

    def test_dropout_in_training_only(self):
        attention, x = TrajectoryWordAttention(8, 2, dropout=0.5), inputs()
        call = functools.partial(attention, *x, num_frames=3)
        assert not torch.equal(call().text, call().text)
        attention.eval()
        assert torch.equal(call().text, call().text)

    def test_from_attention(self):
        q, k, v, out = (nn.Linear(8, 8, bias=name != "k") for name in "qkvo")
        norm = nn.LayerNorm(8, eps=1e-3)
        nn.init.normal_(norm.weight)
        attention = TrajectoryWordAttention.from_attention(q, k, v, out, norm, num_heads=2, dropout=0.0)
        x = torch.randn(3, 8)
        for name, linear in {"q1": q, "q2": q, "k1": k, "k2": k, "v1": v, "v2": v, "out": out, "traj": out}.items():
            close(mapped(x, attention, name), linear(x))
        close(attention.norm(x), norm(x))
        assert attention.norm.weight is not norm.weight
        assert attention.norm.eps == 1e-3

    @pytest.mark.parametrize("trainable", [True, False])
    def test_from_multihead_and_from_timm(self, trainable):
        mha = nn.MultiheadAttention(8, 2, dropout=0.3).double().requires_grad_(trainable)
        nn.init.normal_(mha.in_proj_bias)
        timm = Attention(8, num_heads=2, qkv_bias=True, attn_drop=0.3).double().requires_grad_(trainable)
        timm.qkv.load_state_dict({"weight": mha.in_proj_weight, "bias": mha.in_proj_bias})
        timm.proj.load_state_dict(mha.out_proj.state_dict())
        linears = []
        for weight, bias in zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True):
            linears.append(nn.Linear(8, 8).double())
            linears[-1].load_state_dict({"weight": weight, "bias": bias})
        expected = TrajectoryWordAttention.from_attention(*linears, mha.out_proj, num_heads=2)
        for found in (TrajectoryWordAttention.from_multihead(mha), TrajectoryWordAttention.from_timm(timm)):
            assert found.dropout == 0.3
            assert found.num_heads == 2
            for name, value in expected.state_dict().items():
                assert torch.equal(found.state_dict()[name], value)
            assert all(parameter.requires_grad == trainable for parameter in found.parameters())
            assert all(parameter.is_leaf for parameter in found.parameters())
        assert TrajectoryWordAttention.from_multihead(mha, dropout=0.1).dropout == 0.1

    def test_without_biases(self):
        mha = nn.MultiheadAttention(8, 2, bias=False)
        assert TrajectoryWordAttention.from_multihead(mha).proj_bias.eq(0).all()
        assert TrajectoryWordAttention.from_timm(Attention(8, num_heads=2, proj_bias=False)).proj_bias.eq(0).all()


class TestLayer:
    def test_is_pre_norm(self):
        layer, (text, video) = TrajectoryWordLayer(8, 2, dropout=0.0), inputs()
        nn.init.normal_(layer.norm1.weight)
        found = layer(text, video, num_frames=3)
        for tokens, normed, result in (
            (text, layer.attention(layer.norm1(text), layer.norm1(video), num_frames=3).text, found.text),
            (video, layer.attention(layer.norm1(text), layer.norm1(video), num_frames=3).video, found.video),
        ):
            x = tokens + normed
            hidden = F.gelu(F.linear(layer.norm2(x), layer.ffn[0].weight, layer.ffn[0].bias))
            close(result, x + F.linear(hidden, layer.ffn[3].weight, layer.ffn[3].bias))
        assert layer.ffn[0].out_features == 32

    def test_masked_words_change_no_video(self):
        encoder, (text, video) = TrajectoryWordEncoder(8, 2, 2).eval(), inputs()
        mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(2, 5)
        changed = text.clone()
        changed[:, 3:] += 5
        one, other = (encoder(x, video, num_frames=3, text_mask=mask) for x in (text, changed))
        close(one.video, other.video)
        close(one.text[:, :3], other.text[:, :3])

    def test_every_parameter_takes_part(self):
        encoder = TrajectoryWordEncoder(8, 2, 2)
        result = encoder(*inputs(), num_frames=3)
        (result.text.square().sum() + result.video.square().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


class TestFromBert:
    @pytest.mark.parametrize("prefix", ["", "bert."])
    def test_weights(self, prefix):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=12
        )
        bert = transformers.BertModel(config)
        for parameter in bert.parameters():
            nn.init.normal_(parameter)
        state = {prefix + name: tensor for name, tensor in bert.state_dict().items()}
        encoder = TrajectoryWordEncoder.from_bert(state, first_layer=2, num_heads=2, dropout=0.0)
        assert len(encoder.layers) == 2
        x = torch.randn(3, 8)
        for layer, source in zip(encoder.layers, bert.encoder.layer[2:], strict=True):
            own = source.attention.self
            dense = source.attention.output
            for name, linear in {
                "q1": own.query,
                "q2": own.query,
                "k1": own.key,
                "k2": own.key,
                "v1": own.value,
                "v2": own.value,
                "out": dense.dense,
                "traj": dense.dense,
            }.items():
                close(mapped(x, layer.attention, name), linear(x))
            close(layer.attention.norm(x), dense.LayerNorm(x))
            close(layer.norm1(x), source.output.LayerNorm(x))
            close(layer.norm2(x), dense.LayerNorm(x))
            close(layer.ffn[:3](x), source.intermediate(x))
            close(layer.ffn[3](torch.ones(1, 12)), source.output.dense(torch.ones(1, 12)))
        close(encoder.norm(x), bert.encoder.layer[-1].output.LayerNorm(x))


def fused(text, video):
    return torch.cat([text, video], 1)


class TestDropIn:
    def module(self, **options):
        return TrajectoryWordSelfAttention(8, 2, num_frames=3, patches_per_frame=4, dropout=0.0, **options)

    def test_is_the_attention_on_the_fused_sequence(self):
        attention, (text, video) = self.module(), inputs()
        padding = torch.zeros(2, 18, dtype=torch.bool)
        padding[1, 3:5] = True
        x = fused(text, video)
        expected = attention.attention(text, video, num_frames=3, text_mask=~padding[:, :5])
        for mask in (padding, torch.zeros(2, 18).masked_fill(padding, float("-inf"))):
            out, weights = attention(x, x, x, key_padding_mask=mask)
            assert weights is None
            close(out, fused(*expected))
        close(attention(x, x, x)[0], fused(*attention.attention(text, video, num_frames=3)))

    def test_sequence_first(self):
        attention = self.module(batch_first=False)
        x = fused(*inputs())
        y = x.transpose(0, 1)
        out = attention(y, y, y)[0].transpose(0, 1)
        attention.batch_first = True
        close(out, attention(x, x, x)[0])

    def test_in_torch_s_encoder(self):
        """In evaluation torch would leave the module out, or make its input nested."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        for layer in encoder.layers:
            layer.self_attn = TrajectoryWordSelfAttention.from_multihead(
                layer.self_attn, num_frames=3, patches_per_frame=4
            )
        x, padding = fused(*inputs()), torch.zeros(2, 18, dtype=torch.bool)
        trained = encoder(x, src_key_padding_mask=padding)
        encoder.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            close(encoder(x, src_key_padding_mask=padding), trained)
            with torch.no_grad():
                close(encoder(x), trained)
                close(encoder(x, src_key_padding_mask=padding), trained)
                encoder.requires_grad_(False)
                close(encoder(x, src_key_padding_mask=padding), trained)

    def test_from_multihead(self):
        mha = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=False).double().eval()
        new = TrajectoryWordSelfAttention.from_multihead(mha, num_frames=3, patches_per_frame=4, dropout=0.1)
        assert not new.training
        assert not new.batch_first
        assert new.attention.dropout == 0.1
        assert new.attention.proj_weight.dtype == torch.float64
        assert torch.equal(new.attention.proj_weight[:24], mha.in_proj_weight)
        copy.deepcopy(new)

    def test_timm(self):
        timm = Attention(8, num_heads=2, attn_drop=0.0, proj_drop=0.4)
        new = TimmTrajectoryWordAttention.from_timm(timm, num_frames=3, patches_per_frame=4)
        assert new.proj_drop.p == 0.4
        new.eval()
        x, mask = fused(*inputs()), torch.ones(2, 18, dtype=torch.bool)
        mask[:, 4] = False
        same = TrajectoryWordAttention.from_timm(timm).eval()
        close(new(x), fused(*same(x[:, :5], x[:, 5:], num_frames=3)))
        close(new(x, attn_mask=mask), fused(*same(x[:, :5], x[:, 5:], num_frames=3, text_mask=mask[:, :5])))


class TestSelector:
    def test_number_of_frames(self):
        for length, kept in ((8, 5), (5, 3), (20, 14), (14, 10), (32, 23), (23, 16), (1, 1)):
            frames, text = torch.randn(1, length, 2, 4), torch.randn(1, 4)
            assert HierarchicalFrameSelector(4)(frames, text).frames.shape[1] == kept
        assert HierarchicalFrameSelector(4, k=2)(torch.randn(1, 8, 2, 4), torch.randn(1, 4)).frames.shape[1] == 2
        assert HierarchicalFrameSelector(4, ratio=0.5)(torch.randn(1, 8, 2, 4), torch.randn(1, 4)).frames.shape[1] == 4

    def test_draws_in_training_only(self):
        frames, text = torch.randn(2, 6, 3, 4), torch.randn(2, 4)
        selector = HierarchicalFrameSelector(4, k=2, sigma=1.0, num_samples=20)
        assert not torch.equal(selector(frames, text).indicators, selector(frames, text).indicators)
        selector(frames, text).frames.sum().backward()
        assert all(p.grad is not None for p in selector.parameters())
        selector.eval()
        assert torch.equal(selector(frames, text).indicators, selector(frames, text).indicators)
        assert selector(frames, text).indicators.sum(-1).eq(1).all()
        selector.eval_mode = "perturbed"
        assert not torch.equal(selector(frames, text).indicators, selector(frames, text).indicators)


class TestQueue:
    @settings(max_examples=25, deadline=None)
    @given(size=st.integers(1, 6), data=st.data())
    def test_is_a_ring(self, size, data):
        queue, ring = MomentumQueue(3, size), []
        start = [queue.video.clone(), queue.text.clone()]
        for _ in range(4):
            rows = data.draw(st.integers(1, size))
            video, text = torch.randn(rows, 3), torch.randn(rows, 3)
            queue.enqueue(video, text)
            ring += list(zip(video, text, strict=True))
        for place in range(size):
            written = ring[place::size]
            expected = written[-1] if written else (start[0][place], start[1][place])
            assert torch.equal(queue.video[place], expected[0])
            assert torch.equal(queue.text[place], expected[1])
        assert queue.pointer == len(ring) % size

    def test_starts_with_unit_rows_and_is_saved(self):
        queue = MomentumQueue(3, 50)
        close(queue.video.norm(dim=1), torch.ones(50))
        close(queue.text.norm(dim=1), torch.ones(50))
        assert not torch.equal(queue.video, queue.text)
        queue.enqueue(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3))
        assert not queue.video.requires_grad
        other = MomentumQueue(3, 50)
        other.load_state_dict(queue.state_dict())
        assert torch.equal(other.video, queue.video)
        assert other.pointer == 2

    def test_empty(self):
        queue = MomentumQueue(3, 0)
        queue.enqueue(torch.ones(2, 3), torch.ones(2, 3))
        assert queue.video.shape == (0, 3)

    def test_never_waits_for_the_device(self):
        queue = MomentumQueue(3, 5)
        with NoSync():
            queue.enqueue(torch.ones(2, 3), torch.ones(2, 3))


class TestMatcher:
    def test_is_a_linear_map_of_both_cls(self):
        encoder, (text, video) = TrajectoryWordEncoder(8, 1, 2).eval(), inputs()
        matcher = VideoTextMatcher(encoder, 8, num_frames=3)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        for kept in (None, mask):
            fused = encoder(text, video, num_frames=3, text_mask=kept)
            close(matcher(text, video, kept), matcher.head(torch.cat([fused.text[:, 0], fused.video[:, 0]], 1)))
        assert (matcher(text, video, mask) - matcher(text, video)).abs()[1].max() > 1e-4


X = torch.zeros(2, 18, 8)
drop_in = TrajectoryWordSelfAttention(8, 2, num_frames=3, patches_per_frame=4)
timm_like = TimmTrajectoryWordAttention(8, 2, num_frames=3, patches_per_frame=4)
convert = functools.partial(TrajectoryWordAttention.from_timm)
BAD_CALLS = {
    "heads": (ValueError, lambda: TrajectoryWordAttention(8, 3), "num_heads.*8.*3"),
    "dropout": (ValueError, lambda: TrajectoryWordAttention(8, 2, dropout=1.5), "dropout.*1.5"),
    "linear": (
        ValueError,
        lambda: TrajectoryWordAttention.from_attention(*[nn.Linear(8, 4)] * 4, num_heads=2),
        r"q.weight.*\(8, 8\).*\(4, 8\)",
    ),
    "norm": (
        ValueError,
        lambda: TrajectoryWordAttention.from_attention(*[nn.Linear(8, 8)] * 4, nn.LayerNorm(4), num_heads=2),
        "norm.weight",
    ),
    "no attention": (TypeError, lambda: TrajectoryWordAttention.from_multihead(nn.Linear(2, 2)), "mha.*Linear"),
    "cross-attention": (
        ValueError,
        lambda: TrajectoryWordAttention.from_multihead(nn.MultiheadAttention(8, 2, kdim=4)),
        "mha.*kdim 4",
    ),
    "bias_kv": (
        ValueError,
        lambda: TrajectoryWordAttention.from_multihead(nn.MultiheadAttention(8, 2, add_bias_kv=True)),
        "add_bias_kv",
    ),
    "no timm": (TypeError, lambda: convert(nn.Linear(2, 2)), "attention.*timm.*Linear without qkv"),
    "timm norm": (
        ValueError,
        lambda: convert(Attention(8, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm)),
        "q_norm, k_norm",
    ),
    "layers": (ValueError, lambda: TrajectoryWordEncoder(8, 0, 2), "num_layers.*0"),
    "no bert": (ValueError, lambda: TrajectoryWordEncoder.from_bert({}), r"state_dict.*encoder.layer.6.*\[\]"),
    "half a bert": (
        ValueError,
        lambda: TrajectoryWordEncoder.from_bert({"encoder.layer.6.intermediate.dense.weight": torch.zeros(4, 2)}),
        "state_dict.*attention.self.query.weight",
    ),
    "k and ratio": (ValueError, lambda: HierarchicalFrameSelector(4, 2, 0.5), "`k` and `ratio`.*2 and 0.5"),
    "ratio": (ValueError, lambda: HierarchicalFrameSelector(4, ratio=1.5), "ratio.*1.5"),
    "selector k": (ValueError, lambda: HierarchicalFrameSelector(4, k=0), "`k`.*0"),
    "eval mode": (ValueError, lambda: HierarchicalFrameSelector(4, eval_mode="soft"), "eval_mode.*soft"),
    "selector gradient": (ValueError, lambda: HierarchicalFrameSelector(4, gradient="no"), "gradient.*no"),
    "matcher width": (ValueError, lambda: VideoTextMatcher(torch.nn.Identity(), 0, 3), "embed_dim.*0"),
    "matcher frames": (ValueError, lambda: VideoTextMatcher(torch.nn.Identity(), 8, 0), "num_frames.*0"),
    "queue size": (ValueError, lambda: MomentumQueue(3, -1), "size.*-1"),
    "queue width": (ValueError, lambda: MomentumQueue(3, 4).enqueue(X[0, :2], X[0, :2]), "video.*3"),
    "queue rows": (ValueError, lambda: MomentumQueue(8, 4).enqueue(X[0, :2], X[0, :1]), "text"),
    "queue overrun": (ValueError, lambda: MomentumQueue(8, 4).enqueue(X[0, :5], X[0, :5]), "video.*4.*5"),
    "not one tensor": (ValueError, lambda: drop_in(X, X.clone(), X), "query.*same tensor"),
    "attn_mask": (ValueError, lambda: drop_in(X, X, X, attn_mask=X[0]), "attn_mask"),
    "causal": (ValueError, lambda: drop_in(X, X, X, is_causal=True), "is_causal"),
    "too short": (ValueError, lambda: drop_in(*[X[:, :13]] * 3), "T = 3.*S = 4.*N = 13"),
    "width": (ValueError, lambda: drop_in(*[X[..., :4]] * 3), "query.*8"),
    "padding": (ValueError, lambda: drop_in(X, X, X, key_padding_mask=X[:, :4, 0]), "key_padding_mask"),
    "frames": (
        ValueError,
        lambda: TrajectoryWordSelfAttention(8, 2, num_frames=0, patches_per_frame=4),
        "num_frames.*0",
    ),
    "timm mask": (ValueError, lambda: timm_like(X, attn_mask=torch.zeros(18, 18)), "attn_mask"),
    "timm causal": (ValueError, lambda: timm_like(X, is_causal=True), "is_causal"),
}


@pytest.mark.parametrize(("error", "bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(error, bad, message):
    with pytest.raises(error, match=message):
        bad()
