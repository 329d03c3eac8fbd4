import copy
import functools
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from timm.layers import Attention, DiffAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_methods.functional import cluster_attention, grid_cluster_matrix, span_cluster_matrix
from lightning_methods.modules import (
    AdaClusterAttention,
    AnnotatedLayerNorm,
    ClusterLayer,
    ClusterState,
    GridCluster,
    SpanCluster,
    TimmAdaClusterAttention,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestNorm:
    def test_is_the_formula(self):
        norm, x = AnnotatedLayerNorm(5, eps=0.1).double(), torch.randn(3, 4, 5, dtype=torch.float64)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        expected = norm.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1) + norm.bias
        close(norm(x), expected)
        assert AnnotatedLayerNorm(5).eps == 1e-6
        assert torch.autograd.gradcheck(norm, x[:1, :1].requires_grad_())

    def test_constant_rows_have_a_gradient(self):
        x = torch.ones(2, 5, requires_grad=True)
        AnnotatedLayerNorm(5)(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_half_precision(self):
        x = (100 + torch.randn(4, 8)).bfloat16()
        norm = AnnotatedLayerNorm(8)
        assert norm(x).dtype == torch.bfloat16
        torch.testing.assert_close(norm(x).float(), norm(x.float()), atol=0.02, rtol=0.02)


class TestClusters:
    def test_span(self):
        cluster, x = SpanCluster(4), torch.randn(2, 5, 4)
        weights = cluster.linear.weight, cluster.linear.bias
        first = cluster(x)
        close(first, span_cluster_matrix(cluster.norm(x), *weights))
        close(cluster(x, first.log_gap), span_cluster_matrix(cluster.norm(x), *weights, first.log_gap))
        assert isinstance(cluster.norm, AnnotatedLayerNorm)
        assert type(SpanCluster(4, norm="layer").norm) is nn.LayerNorm

    def test_grid(self):
        x = torch.randn(2, 16, 4)
        for layout in ("separable", "official"):
            cluster = GridCluster(4, (4, 4), layout=layout)
            weights = cluster.linear.weight, cluster.linear.bias
            first = cluster(x)
            options = {"grid_size": (4, 4), "layout": layout}
            close(first, grid_cluster_matrix(cluster.norm(x), *weights, **options))
            close(cluster(x, *first[1:]), grid_cluster_matrix(cluster.norm(x), *weights, *first[1:], **options))

    def test_start(self):
        near = SpanCluster(4, init_bias=6.0)
        assert near.linear.weight.eq(0).all()
        assert near.linear.bias.eq(6).all()
        own = SpanCluster(400)
        assert own.linear.weight.abs().max() <= (6 / 801) ** 0.5
        assert own.linear.weight.abs().max() > 0.9 * (6 / 801) ** 0.5

    @pytest.mark.parametrize("kind", ["span", "grid"])
    def test_prefix_tokens_are_outside(self, kind):
        layer = ClusterLayer(4, kind, grid_size=(2, 2) if kind == "grid" else None, prefix_tokens=3)
        x = torch.randn(2, 7, 4)
        matrix = layer(x)
        assert matrix[:, :3].eq(1).all()
        assert matrix[:, :, :3].eq(1).all()
        close(matrix[:, 3:, 3:], layer.cluster(x[:, 3:]).matrix)


def stack(layers=3, **options):
    """Attention layers that know their places and share a state."""
    modules = [AdaClusterAttention(8, 2, **options) for _ in range(layers)]
    state = ClusterState()
    for place, module in enumerate(modules):
        module.clusters.layer, module.clusters.state = place, state
    return modules, state


class TestState:
    def test_clusters_grow_through_the_layers(self):
        modules, _ = stack()
        x = torch.randn(2, 6, 8)
        gap, expected = None, []
        for module in modules:
            matrix, gap = module.clusters.cluster(x, gap)
            expected.append(matrix)
        for _ in range(2):  # a second forward pass starts anew
            found = [module.clusters(x) for module in modules]
            close(found, expected)
        assert (found[2] > found[0]).any()
        assert (found[2] >= found[0]).all()

    def test_explicit_state_and_none(self):
        modules, shared = stack()
        x = torch.randn(2, 6, 8)
        own = ClusterState()
        found = [module(x, x, x, state=own)[0] for module in modules]
        assert shared.before(1) is None
        close(found, [module(x, x, x)[0] for module in modules])
        for module in modules:
            module.clusters.state = None
        alone = [module(x, x, x)[0] for module in modules]
        close(alone[0], found[0])
        assert not torch.allclose(alone[1], found[1])

    def test_other_batch_sizes_may_follow(self):
        modules, _ = stack()
        for batch in (2, 3):
            x = torch.randn(batch, 6, 8)
            for module in modules:
                module(x, x, x)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_gradient_checkpointing(self, use_reentrant, block_size):
        modules, _ = stack(block_size=block_size)

        def run(call):
            x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = x
            for module in modules:
                y = call(lambda z, module=module: z + module(z, z, z, need_weights=False)[0], y)
            y.square().sum().backward()
            gradients = [x.grad, *(p.grad.clone() for m in modules for p in m.parameters())]
            for module in modules:
                module.zero_grad()
            return gradients

        plain = run(lambda function, y: function(y))
        again = run(functools.partial(checkpoint, use_reentrant=use_reentrant))
        if use_reentrant:
            # a reentrant recomputation cuts the graph of what is handed on beside the arguments
            assert all(gradient.isfinite().all() for gradient in again)
        else:
            close(again, plain)

    def test_copies_and_pickles_are_empty_and_shared(self):
        modules, state = stack()
        x = torch.randn(2, 6, 8)
        for module in modules:
            module(x, x, x)
        assert state.before(3) is not None
        for copied in (copy.deepcopy(nn.ModuleList(modules)), pickle.loads(pickle.dumps(nn.ModuleList(modules)))):
            assert copied[0].clusters.state is copied[2].clusters.state
            assert copied[0].clusters.state is not state
            assert copied[0].clusters.state.before(1) is None
            close([m(x, x, x)[0] for m in copied], [m(x, x, x)[0] for m in modules])
        assert state.matrix(2).shape == (2, 6, 6)
        assert not state.matrix(2).requires_grad
        state.clear()
        assert state.before(3) is state.matrix(2) is None


class TestAttention:
    def test_is_the_function(self):
        attention, x, pre = AdaClusterAttention(8, 2, normalize=True), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        nn.init.normal_(attention.in_proj_bias)
        out, weights = attention(x, x, x, cluster_input=pre)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
            for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        )
        cluster = attention.clusters(pre)
        expected = cluster_attention(q, k, v, cluster, normalize=True)
        close(out, attention.out_proj(expected.transpose(1, 2).flatten(2)))
        products = (q @ k.mT / 2).softmax(-1) * cluster[:, None]
        close(weights, (products / products.sum(-1, keepdim=True)).mean(1))
        per_head = attention(x, x, x, cluster_input=pre, average_attn_weights=False)[1]
        assert per_head.shape == (2, 2, 5, 5)
        close(per_head.mean(1), weights)
        assert attention(x, x, x, need_weights=False)[1] is None

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_with_clusters_of_one_it_is_torch_s(self, batch_first, bias):
        mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        if bias:
            nn.init.normal_(mha.in_proj_bias)
            nn.init.normal_(mha.out_proj.bias)
        attention = AdaClusterAttention.from_multihead(mha, init_bias=200.0)
        x = torch.randn(4, 4, 8)
        padding = torch.zeros(4, 4, dtype=torch.bool)
        padding[0, 0] = True
        masks = [
            {},
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "is_causal": True},
            {"attn_mask": torch.randn(4, 4)},
            {"attn_mask": torch.randn(8, 4, 4)},
        ]
        for options in masks:
            close(attention(x, x, x, **options), mha(x, x, x, **options))
        # behind its own rows, padding is what it is for torch: but the diagonal stays open
        opened = torch.zeros(4, 1, 4, 4).masked_fill(padding[:, None, None] & ~torch.eye(4, dtype=torch.bool), -1e9)
        opened = opened.expand(4, 2, 4, 4).flatten(0, 1)
        extra = torch.randn(4, 4)
        for mask in (padding, torch.zeros(4, 4).masked_fill(padding, float("-inf"))):
            close(attention(x, x, x, key_padding_mask=mask), mha(x, x, x, attn_mask=opened))
            close(attention(x, x, x, key_padding_mask=mask, attn_mask=extra), mha(x, x, x, attn_mask=opened + extra))
            causal = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)
            close(attention(x, x, x, key_padding_mask=mask, is_causal=True), mha(x, x, x, attn_mask=opened + causal))

    def test_weights_are_shared_with_the_original(self):
        mha = nn.MultiheadAttention(8, 2, dropout=0.25).double().eval()
        attention = AdaClusterAttention.from_multihead(mha, init_bias=6.0)
        assert attention.in_proj_weight is mha.in_proj_weight
        assert attention.out_proj is mha.out_proj
        assert attention.dropout == 0.25
        assert not attention.training
        loaded = AdaClusterAttention(8, 2).double()
        missing, unexpected = loaded.load_state_dict(mha.state_dict(), strict=False)
        assert not unexpected
        assert all(name.startswith("clusters.") for name in missing)

    @settings(max_examples=15, deadline=None)
    @given(length=st.integers(2, 7), data=st.data())
    def test_stays_causal(self, length, data):
        place = data.draw(st.integers(1, length - 1))
        modules, _ = stack(2)
        x = torch.randn(2, length, 8)
        changed = x.clone()
        changed[:, place:] += 4
        results = []
        for y in (x, changed):
            for module in modules:
                y = y + module(y, y, y, is_causal=True)[0]
            results.append(y)
        close(results[0][:, :place], results[1][:, :place])
        assert not torch.allclose(results[0][:, place:], results[1][:, place:])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side):
        """Padded on either side, real elements have the results that they have alone."""
        modules, _ = stack(2)
        x, pads = torch.randn(2, 4, 8), torch.full((2, 3, 8), 9.0)
        joined, real = (
            (torch.cat([pads, x], 1), slice(3, 7)) if side == "left" else (torch.cat([x, pads], 1), slice(0, 4))
        )
        padding = torch.ones(2, 7, dtype=torch.bool)
        padding[:, real] = False
        results = []
        for y, mask in ((x, None), (joined, padding)):
            for module in modules:
                y = module(y, y, y, key_padding_mask=mask)[0]
            results.append(y)
        close(results[1][:, real], results[0])

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_blocks_are_the_same(self, is_causal):
        modules, state = stack(3)
        x = torch.randn(2, 7, 8)
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[0, 5:] = True
        results = []
        for block_size in (None, 3):
            state.clear()
            y = x
            for module in modules:
                module.block_size = block_size
                y = y + module(y, y, y, key_padding_mask=padding, need_weights=False, is_causal=is_causal)[0]
            results.append(y)
        close(*results)

    def test_in_torch_s_encoder(self):
        """In evaluation torch would leave the module out, or make its input nested."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        state = ClusterState()
        for place, layer in enumerate(encoder.layers):
            layer.self_attn = AdaClusterAttention.from_multihead(layer.self_attn)
            layer.self_attn.clusters.layer, layer.self_attn.clusters.state = place, state
        x, padding = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        for block_size in (None, 2):
            for layer in encoder.layers:
                layer.self_attn.block_size = block_size
            encoder.train()
            trained = encoder(x, src_key_padding_mask=padding)
            encoder.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nested tensors are a prototype
                close(encoder(x, src_key_padding_mask=padding), trained)
                with torch.no_grad():
                    found = encoder(x, src_key_padding_mask=padding)
                    close(found[~padding], trained[~padding])

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_what_is_clustered_may_be_nested(self):
        attention = AdaClusterAttention(8, 2)
        x, other = ([torch.randn(length, 8) for length in (6, 4)] for _ in range(2))
        nested, source = (torch.nested.nested_tensor(rows) for rows in (x, other))
        found, _ = attention(nested, nested, nested, cluster_input=source)
        for row, alone, other_alone in zip(found.unbind(), x, other, strict=True):
            close(row, attention(*[alone[None]] * 3, cluster_input=other_alone[None])[0][0])

    def test_dropout_in_training_only(self):
        attention, x = AdaClusterAttention(8, 2, dropout=0.5), torch.randn(2, 5, 8)
        assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
        attention.eval()
        assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])

    @pytest.mark.parametrize("block_size", [None, 2])
    def test_every_parameter_takes_part_and_nothing_waits(self, block_size):
        modules, _ = stack(2, block_size=block_size)
        x = torch.randn(2, 5, 8)
        with NoSync():
            for module in modules:
                module(x, x, x, need_weights=False)[0].square().sum().backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in modules for p in m.parameters())

    def test_autocast(self):
        modules, _ = stack(2)
        x = torch.randn(2, 5, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for module in modules:
                out, weights = module(x, x, x)
                assert out.dtype == torch.bfloat16
                assert weights.dtype == torch.float32
                assert module.clusters(x).dtype == torch.float32
        half = AdaClusterAttention(8, 2).bfloat16()
        half(*[x.bfloat16()] * 3)[0].sum().backward()


class TestTimm:
    @pytest.mark.parametrize("extra", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True}])
    def test_with_clusters_of_one_it_is_timm_s(self, extra):
        timm = Attention(8, num_heads=2, qkv_bias=True, **extra)
        attention = TimmAdaClusterAttention.from_timm(
            timm, kind="grid", grid_size=(2, 4), prefix_tokens=1, init_bias=200.0
        )
        x = torch.randn(3, 9, 8)
        close(attention(x), timm(x))
        bias = torch.randn(1, 2, 9, 9)
        close(attention(x, attn_mask=bias), timm(x, attn_mask=bias))
        close(attention(x, is_causal=True), timm(x, is_causal=True))
        assert attention.qkv is timm.qkv
        attention.clusters.cluster.linear.bias.data.fill_(-1.0)
        assert (attention(x) - timm(x)).abs().max() > 1e-3

    def test_drops_and_modes(self):
        timm = Attention(8, num_heads=2, attn_drop=0.5, proj_drop=0.5).eval()
        attention = TimmAdaClusterAttention(timm, normalize=True)
        x = torch.randn(3, 5, 8)
        assert torch.equal(attention(x), attention(x))
        attention.train()
        assert not torch.equal(attention(x), attention(x))

    def test_clusters_from_elsewhere(self):
        attention, x, pre = (
            TimmAdaClusterAttention(Attention(8, num_heads=2)),
            torch.randn(3, 5, 8),
            torch.randn(3, 5, 8),
        )
        assert not torch.allclose(attention(x), attention(x, cluster_input=pre))
        state = ClusterState()
        attention(x, state=state)
        assert state.before(1) is not None

    def test_in_a_vision_transformer(self):
        timm = pytest.importorskip("timm")
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3
        )
        image = torch.randn(2, 3, 32, 32)
        expected = model(image)
        state = ClusterState()
        for place, block in enumerate(model.blocks):
            block.attn = TimmAdaClusterAttention(
                block.attn, kind="grid", grid_size=(4, 4), prefix_tokens=1, init_bias=200.0
            )
            block.attn.clusters.layer, block.attn.clusters.state = place, state
        close(model(image), expected)
        model(image).sum().backward()


X = torch.zeros(2, 5, 8)
attend = AdaClusterAttention(8, 2)
BAD_CALLS = {
    "norm": (ValueError, lambda: SpanCluster(4, norm="batch"), "norm.*annotated.*batch"),
    "layout": (ValueError, lambda: GridCluster(4, (2, 2), layout="other"), "layout.*other"),
    "odd grid": (ValueError, lambda: GridCluster(4, (3, 2)), "pool.*3 x 2"),
    "official": (ValueError, lambda: GridCluster(4, (2, 4), layout="official"), "official.*square"),
    "kind": (ValueError, lambda: ClusterLayer(4, "tree"), "kind.*span.*tree"),
    "no grid": (ValueError, lambda: ClusterLayer(4, "grid"), "grid_size.*None.*grid"),
    "grid of a span": (ValueError, lambda: ClusterLayer(4, grid_size=(2, 2)), "grid_size.*span"),
    "prefix": (ValueError, lambda: ClusterLayer(4, prefix_tokens=-1), "prefix_tokens.*-1"),
    "length of a grid": (
        ValueError,
        lambda: ClusterLayer(8, "grid", grid_size=(2, 2), prefix_tokens=2)(X),
        "2 prefix tokens and a grid of 2 x 2.*5 tokens",
    ),
    "only a prefix": (ValueError, lambda: ClusterLayer(8, prefix_tokens=5)(X), "longer.*5 prefix.*5"),
    "heads": (ValueError, lambda: AdaClusterAttention(8, 3), "num_heads.*3"),
    "dropout": (ValueError, lambda: AdaClusterAttention(8, 2, dropout=-0.1), "dropout.*-0.1"),
    "blocks": (ValueError, lambda: AdaClusterAttention(8, 2, block_size=0), "block_size.*0"),
    "blocks of a grid": (
        ValueError,
        lambda: AdaClusterAttention(8, 2, block_size=2, kind="grid", grid_size=(2, 2)),
        "block_size.*span.*grid",
    ),
    "blocks and weights": (
        ValueError,
        lambda: AdaClusterAttention(8, 2, block_size=2)(X, X, X),
        "block_size.*need_weights",
    ),
    "cross-attention": (TypeError, lambda: attend(X, X.clone(), X), "same tensor"),
    "other values": (TypeError, lambda: attend(X, X, X.clone()), "same tensor"),
    "query": (ValueError, lambda: attend(*[X[..., :4]] * 3), "query.*8"),
    "cluster_input": (ValueError, lambda: attend(X, X, X, cluster_input=X[:1]), "cluster_input"),
    "padding": (ValueError, lambda: attend(X, X, X, key_padding_mask=X[:, :3, 0] > 0), "key_padding_mask"),
    "attn_mask": (ValueError, lambda: attend(X, X, X, attn_mask=X[0]), r"attn_mask.*\(5, 5\).*\(5, 8\)"),
    "no multihead": (TypeError, lambda: AdaClusterAttention.from_multihead(nn.Linear(2, 2)), "mha.*Linear"),
    "no timm": (TypeError, lambda: TimmAdaClusterAttention(nn.Linear(2, 2)), "attention.*timm"),
    "timm with positions": (
        TypeError,
        lambda: TimmAdaClusterAttention(RelPosAttention(8, num_heads=2)),
        "plain Attention, got RelPosAttention with shared_rel_pos",
    ),
    "timm with differences": (
        TypeError,
        lambda: TimmAdaClusterAttention(DiffAttention(8, 2, norm_layer=nn.LayerNorm)),
        "DiffAttention with lambda_k1",
    ),
    "timm with rotations": (
        TypeError,
        lambda: TimmAdaClusterAttention(EvaAttention(8, 2, norm_layer=nn.LayerNorm)),
        "EvaAttention with .*rope",
    ),
    "timm x": (ValueError, lambda: TimmAdaClusterAttention(Attention(8, num_heads=2))(X[0]), "`x`"),
}


@pytest.mark.parametrize(("error", "bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(error, bad, message):
    with pytest.raises(error, match=message):
        bad()
