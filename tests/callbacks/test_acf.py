"""AdaClustFormer: what it puts in place, what that computes, and what it says of wrong input."""

import copy
import gc
import weakref

import pytest
import torch
from conformance.cases_acf import PreNorm, Tagger
from plain import fit
from pytorch_lightning.loggers import CSVLogger
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_methods.attach import AddressError
from lightning_methods.callbacks import AdaClustFormer
from lightning_methods.functional import span_cluster_matrix

BATCH = torch.randn(8, 9, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def net(timm=False):
    torch.manual_seed(0)
    return Tagger(timm)


def by_hand(module, x):
    """The tagger with clusters, from the definition: softmax times C, and M grown from layer to layer."""
    grown = None
    for layer in module.layers:
        y = nn.functional.layer_norm(x, (8,))
        cluster, batch, length = layer.clusters.cluster, len(y), y.shape[1]
        matrix, grown = span_cluster_matrix(cluster.norm(y), cluster.linear.weight, cluster.linear.bias, grown)
        q, k, v = nn.functional.linear(y, layer.in_proj_weight, layer.in_proj_bias).chunk(3, 2)
        q, k, v = (part.view(batch, length, 2, 4).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) / 2).softmax(3) * matrix[:, None]
        x = x + layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return module.head(x.mean(1))


def test_it_computes_the_definition_with_clusters_that_grow():
    module = AdaClustFormer("module.layers.*", init_bias=None).apply(net())
    torch.testing.assert_close(module(BATCH[0]), by_hand(module, BATCH[0]))
    alone = AdaClustFormer("module.layers.*", init_bias=None, monotone=False).apply(net())
    alone.load_state_dict(module.state_dict())
    assert not torch.allclose(alone(BATCH[0]), module(BATCH[0]), atol=1e-4)


@pytest.mark.parametrize("timm", [False, True])
def test_a_pretrained_module_starts_near_itself(timm):
    before = net(timm)(BATCH[0])
    near = AdaClustFormer("module.layers.*").apply(net(timm))(BATCH[0])
    far = AdaClustFormer("module.layers.*", init_bias=0.0).apply(net(timm))(BATCH[0])
    assert (near - before).abs().max() < 0.02
    assert (far - before).abs().max() > 0.05


def test_the_projections_are_the_modules_own():
    module = net()
    own = [parameter for layer in module.layers for parameter in layer.parameters()]
    AdaClustFormer("module.layers.*").apply(module)
    kept = {id(parameter) for parameter in module.parameters()}
    assert all(id(parameter) in kept for parameter in own)
    added = [name for name, parameter in module.named_parameters() if "clusters" in name]
    assert len(added) == 2 * 4  # norm and linear map, each with weight and bias


def test_the_order_of_the_addresses_is_that_of_growth():
    module = AdaClustFormer(["module.layers.1", "module.layers.0"]).apply(net())
    assert [layer.clusters.layer for layer in module.layers] == [1, 0]
    assert module.layers[0].clusters.state is module.layers[1].clusters.state


def test_copies_grow_by_themselves():
    module = AdaClustFormer("module.layers.*", init_bias=None).apply(net())
    other = copy.deepcopy(module)
    expected = module(BATCH[0])
    assert other.layers[0].clusters.state is other.layers[1].clusters.state is not module.layers[0].clusters.state
    assert torch.equal(other(BATCH[0]), expected)


def test_recomputed_layers_find_what_they_found_before():
    class Checkpointed(Tagger):
        def forward(self, x):
            for layer in self.layers:
                y = nn.functional.layer_norm(x, (8,))
                x = x + checkpoint(lambda z, layer=layer: layer(z, z, z)[0], y, use_reentrant=False)
            return self.head(x.mean(1))

    gradients = []
    for kind in (Tagger, Checkpointed):
        torch.manual_seed(0)
        module = AdaClustFormer("module.layers.*", init_bias=0.0).apply(kind())
        module(BATCH[0]).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


def test_no_graph_outlives_its_step():
    values = []

    class Watches(Tagger):
        def on_train_batch_start(self, *_):
            gc.collect()
            values.append([value() is not None for value in self.alive])
            self.alive = []

        def forward(self, x):
            logits = super().forward(x)
            carried = self.layers[0].clusters.state.before(1)
            self.alive = [weakref.ref(carried[0])]
            return logits

    module = Watches()
    module.alive = []
    fit(module, AdaClustFormer("module.layers.*"), batches=[BATCH] * 3)
    assert values == [[], [False], [False]]


@pytest.mark.parametrize("monotone", [True, False])
def test_openness_and_width_of_clusters_are_logged_per_layer(tmp_path, monotone):
    logger = CSVLogger(tmp_path, name="", version="")
    module, callback = net(), AdaClustFormer("module.layers.*", monotone=monotone)
    fit(module, callback, batches=[BATCH] * 4, logger=logger, log_every_n_steps=2)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    places = [header.index(f"acf/layers.{layer}/{what}") for what in ("open", "width") for layer in range(2)]
    logged = [[float(row.split(",")[place]) for place in places] for row in rows[1:] if row.split(",")[places[0]]]
    assert len(logged) == 2
    first, second, narrow, wide = logged[0]
    assert first == pytest.approx(0.9975, abs=2e-3)
    assert (second > first) is monotone  # 1 - (1 - M)² of two layers
    assert 8.8 < narrow < 9
    assert (wide > narrow) is monotone
    assert (module.layers[0].clusters.state is module.layers[1].clusters.state) is monotone


def test_the_width_is_the_mean_row_sum_of_the_matrix():
    logged = {}

    class Watches(Tagger):
        def log_dict(self, values, **_):
            logged.update(values)

    torch.manual_seed(0)
    module, callback = Watches(timm=True), AdaClustFormer("module.layers.1", kind="grid", grid_size=[2, 4], init_bias=0)
    x = BATCH[0][:, :8]
    callback.apply(module).layers[1].clusters.cluster.linear.weight.data.normal_()
    found = []
    module.layers[1].clusters.cluster.register_forward_hook(lambda _, args, out: found.append(out))
    fit(module, callback, batches=[(x, BATCH[1])], log_every_n_steps=1)
    matrix, row, _ = found[0]
    assert logged["acf/layers.1/width"].item() == pytest.approx(matrix.sum(2).mean().item())
    # One row of two squares: columns have no pairs.
    assert logged["acf/layers.1/open"].item() == pytest.approx(1 - row[:, 0, 0, 1].exp().mean().item())


def test_log_false_logs_nothing(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(net(), AdaClustFormer("module.layers.*", log=False), batches=[BATCH], logger=logger, log_every_n_steps=1)
    path = tmp_path / "metrics.csv"
    assert not path.exists() or "open" not in path.read_text()


def test_blocks_compute_the_same():
    whole = AdaClustFormer("module.layers.*", init_bias=None).apply(net())
    lean = AdaClustFormer("module.layers.*", init_bias=None, block_size=4).apply(net())
    lean.load_state_dict(whole.state_dict())

    def logits(module):
        x = BATCH[0]
        for layer in module.layers:
            y = nn.functional.layer_norm(x, (8,))
            x = x + layer(y, y, y, need_weights=False)[0]
        return module.head(x.mean(1))

    torch.testing.assert_close(logits(lean), logits(whole))


RESIDUAL = {"modules": "module.layers.*.self_attn", "clusters_from": "module.layers.*", "init_bias": None}


class TestResidualStream:
    """`clusters_from`: clusters of what another module receives."""

    def by_hand(self, module, x):
        grown = None
        for layer in module.layers:
            attention, y = layer.self_attn, layer.norm1(x)
            cluster = attention.clusters.cluster
            matrix, grown = span_cluster_matrix(cluster.norm(x), cluster.linear.weight, cluster.linear.bias, grown)
            q, k, v = nn.functional.linear(y, attention.in_proj_weight, attention.in_proj_bias).chunk(3, 2)
            q, k, v = (part.view(8, 9, 2, 4).transpose(1, 2) for part in (q, k, v))
            weights = (q @ k.transpose(2, 3) / 2).softmax(3) * matrix[:, None]
            x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
        return module.head(x.mean(1))

    def operated(self, module=None, **settings):
        torch.manual_seed(0)
        module = PreNorm() if module is None else module
        for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
            nn.init.normal_(norm.weight)  # else normalising once more would change next to nothing
        return AdaClustFormer(**{**RESIDUAL, **settings}).apply(module)

    @pytest.mark.parametrize("where", ["module.layers.*", "module.layers.*.norm1"])
    def test_it_computes_the_definition(self, where):
        module, x = self.operated(clusters_from=where), 3 * BATCH[0] + 1
        for _ in range(2):
            torch.testing.assert_close(module.train()(x), self.by_hand(module, x))
            torch.testing.assert_close(module.eval()(x), self.by_hand(module, x))
            x = x.flip(1)
        own = self.operated(clusters_from="input")
        own.load_state_dict(module.state_dict())
        assert not torch.allclose(own(x), module(x), atol=1e-3)

    def test_timms_blocks(self):
        def vit():
            torch.manual_seed(0)
            return VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=3)

        settings = {"kind": "grid", "grid_size": [4, 4], "prefix_tokens": 1, "modules": "module.blocks.*.attn"}
        module = self.operated(vit(), **settings, clusters_from="module.blocks.*.norm1")
        seen = []
        for block in module.blocks:
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:]))
            block.attn.clusters.cluster.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        module(torch.randn(2, 3, 8, 8))
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[2], seen[3])

    @pytest.mark.parametrize("part", ["block", "attention"])
    def test_recomputed_layers_find_it_again(self, part):
        class Checkpointed(PreNorm):
            def forward(self, x):
                for layer in self.layers:
                    if part == "block":
                        x = checkpoint(layer, x, use_reentrant=False)
                        continue
                    source = layer.self_attn.clusters.source
                    source(layer, (x,), {})
                    y = layer.norm1(x)
                    x = x + checkpoint(lambda y, a=layer.self_attn: a(y, y, y)[0], y, use_reentrant=False)
                    x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
                return self.head(x.mean(1))

        gradients = []
        for kind in (PreNorm, Checkpointed):
            torch.manual_seed(0)
            module = self.operated(kind())
            module(BATCH[0]).square().sum().backward()
            gradients.append([parameter.grad for parameter in module.parameters()])
        torch.testing.assert_close(*gradients)

    def test_copies_cluster_by_themselves_and_an_export_goes_on(self):
        module = self.operated()
        expected = module(BATCH[0])
        for copied in (copy.deepcopy(module), AdaClustFormer(**RESIDUAL).export(module)):
            sources = [layer.self_attn.clusters.source for layer in copied.layers]
            assert not {id(layer.self_attn.clusters.source) for layer in module.layers} & set(map(id, sources))
            with pytest.raises(RuntimeError, match="which was not called"):
                sources[0].value  # noqa: B018
            assert torch.equal(copied(BATCH[0]), expected)
            assert [source.value.shape for source in sources] == [(8, 9, 8)] * 2

    def test_undo_takes_the_hooks_off(self):
        callback = AdaClustFormer(**RESIDUAL)
        module = callback.apply(callback.apply(PreNorm()))
        module.layers[0].register_forward_pre_hook(lambda _, args: None)
        assert [len(layer._forward_pre_hooks) for layer in module.layers] == [2, 1]
        other = AdaClustFormer("module.layers.1.self_attn", clusters_from="module.layers.1", name="other").apply(
            PreNorm()
        )
        callback.undo(other)
        callback.undo(module)
        assert [len(layer._forward_pre_hooks) for layer in module.layers] == [1, 0]
        assert not module.layers[0]._forward_pre_hooks_with_kwargs
        assert len(other.layers[1]._forward_pre_hooks) == 1
        assert type(module.layers[0].self_attn) is nn.MultiheadAttention

    def test_no_graph_outlives_its_step(self):
        module = PreNorm()
        fit(module, AdaClustFormer(**RESIDUAL), batches=[BATCH])
        with pytest.raises(RuntimeError, match="'acf' clusters the input of another module, which was not called"):
            module.layers[0].self_attn(BATCH[0], BATCH[0], BATCH[0])

    @pytest.mark.parametrize("where", ["module.layers.0", ["module.layers.*", "module.head"]])
    def test_one_for_each_attention(self, where):
        module = PreNorm()
        with pytest.raises(ValueError, match=r"`clusters_from` to name one module for each of the 2 .* names [13]\."):
            fit(module, AdaClustFormer(**{**RESIDUAL, "clusters_from": where}))
        assert type(module.layers[0].self_attn) is nn.MultiheadAttention

    def test_another_shape(self):
        module = self.operated(clusters_from=["module.layers.0.norm1", "module.head"])
        with pytest.raises(RuntimeError, match="not called before"):
            module(BATCH[0])
        module.head(BATCH[0][:, 0])
        with pytest.raises(ValueError, match=r"cluster_input.*\(8, 9, 8\), got \(8, 8\)"):
            module(BATCH[0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "hexagons"}, "`kind`.*hexagons"),
        ({"kind": "grid"}, "`grid_size` goes with kind 'grid'"),
        ({"grid_size": [2, 2]}, "`grid_size` goes with kind 'grid'"),
        ({"kind": "grid", "grid_size": [4]}, r"`grid_size` to be rows and columns, but got \[4\]"),
        ({"kind": "grid", "grid_size": [3, 4]}, "`pool`"),
        ({"kind": "grid", "grid_size": [2, 4], "layout": "official"}, "official"),
        ({"kind": "grid", "grid_size": [4, 4], "layout": "tiled"}, "`layout`.*tiled"),
        ({"norm": "batch"}, "`norm`.*batch"),
        ({"prefix_tokens": -1}, "`prefix_tokens`"),
        ({"kind": "grid", "grid_size": [4, 4], "block_size": 8}, "`block_size` needs kind 'span'"),
        ({"block_size": 8, "prefix_tokens": 1}, "`block_size` needs kind 'span'"),
    ],
)
def test_bad_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        AdaClustFormer("module.layers.*", **settings)


@pytest.mark.parametrize("where", ["module.head", "module.layers"])
def test_what_is_no_attention_is_named_with_what_would_do(where):
    module = net()
    kind = type(module.get_submodule(where.removeprefix("module."))).__name__
    with pytest.raises(TypeError, match=rf"'{where}' is a {kind}.*torch\.nn\.MultiheadAttention and timm's Attention"):
        fit(module, AdaClustFormer(["module.layers.0", where]))
    assert type(module.layers[0]) is nn.MultiheadAttention


def test_attention_with_keys_of_another_width():
    module = net()
    module.layers[1] = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
    with pytest.raises(ValueError, match=r"'module\.layers\.1', a MultiheadAttention, cannot be replaced: .*kdim 4"):
        fit(module, AdaClustFormer("module.layers.*"))


def test_an_address_that_matches_nothing():
    with pytest.raises(AddressError, match=r"'module\.layer\.\*' matches no submodule .*'module\.layers"):
        fit(net(), AdaClustFormer("module.layer.*"))


def test_cross_attention_is_found_out_in_the_first_step():
    class Crosses(Tagger):
        def forward(self, x):
            return self.head(self.layers[0](x, x + 1, x + 1)[0].mean(1))

    with pytest.raises(TypeError, match="must be the same tensor"):
        fit(Crosses(), AdaClustFormer("module.layers.0"), batches=[BATCH])


def test_a_sequence_that_is_not_the_grid():
    callback = AdaClustFormer("module.layers.*", kind="grid", grid_size=[2, 2])
    with pytest.raises(ValueError, match=r"a grid of 2 x 2, got 9 tokens"):
        fit(net(), callback, batches=[BATCH])


def test_timm_and_torch_agree():
    torch_layer = nn.MultiheadAttention(8, 2, batch_first=True)
    timm_layer = Attention(8, num_heads=2, qkv_bias=True)
    timm_layer.qkv.weight.data, timm_layer.qkv.bias.data = (
        torch_layer.in_proj_weight.data,
        torch_layer.in_proj_bias.data,
    )
    timm_layer.proj.load_state_dict(torch_layer.out_proj.state_dict())
    holder = nn.ModuleDict({"a": torch_layer, "b": timm_layer})
    first = AdaClustFormer("module.a", init_bias=0.0, name="first").apply(holder)["a"]
    second = AdaClustFormer("module.b", init_bias=0.0, name="second").apply(holder)["b"]
    torch.testing.assert_close(first(BATCH[0], BATCH[0], BATCH[0])[0], second(BATCH[0]))
