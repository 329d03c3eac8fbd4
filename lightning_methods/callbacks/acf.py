"""Ada-ClustFormer: self-attention whose window is learned, from small clusters to large ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_methods.attach import Method, Parts
from lightning_methods.attach._lightning import LightningModule, Trainer, should_log
from lightning_methods.attach.surgery import is_operated, replaced_by
from lightning_methods.callbacks._attention import replaced_attention
from lightning_methods.functional.acf_grid import GridLayout
from lightning_methods.modules import AdaClusterAttention, ClusterSource, ClusterState, TimmAdaClusterAttention
from lightning_methods.modules.acf import ClusterKind, ClusterLayer, ClusterNorm

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class AdaClustFormer(Method):
    r"""Replaces self-attention modules by ones whose weights are multiplied by learned clusters of neighbours.

    Every replaced module keeps its own projections (the very Parameters) and gains a linear map 2D → 1 and a norm,
    which say where clusters end. Clusters grow from one module to the next, in the order of the addresses. The maths is
    in `functional.span_cluster_matrix`, `functional.grid_cluster_matrix` and `functional.cluster_attention`.

    The trained model needs the new modules: attach the callback again, or call `apply`, before loading a checkpoint;
    `export` gives a model that needs neither. On steps that are logged, `acf/PATH/open` is the mean probability that an
    element continues a cluster, and `acf/PATH/width` the mean row sum of C, how many elements one attends to at most.

    Args:
        modules: Addresses of self-attention modules, torch's `MultiheadAttention` or timm's `Attention`, such as
            `"module.encoder.layers.*.self_attn"`.
        kind: "span" for sequences, "grid" for images.
        grid_size: Rows and columns of the grid, with kind "grid".
        prefix_tokens: Leading tokens ([CLS], registers) outside all clusters.
        pool: Side of the squares of cells that are clustered, with kind "grid".
        layout: "separable", our reading of the intention, or "official", as the released code computes it.
        norm: Before the linear map: "annotated" as the authors have it, or "layer".
        monotone: Let clusters grow from module to module; else each begins with none.
        init_bias: At 6 attention begins nearly unchanged, for a pretrained model; None begins as the authors do, for
            one that is trained from scratch.
        normalize: Divide the products by their sums. Ours; the authors do not.
        clusters_from: What clusters are made of. "input": the attention's own input, in a pre-norm block the normalised
            one. Or addresses of modules whose input it is, one for each of `modules` in the same order: those of the
            pre-norm blocks, such as `"module.encoder.layers.*"`, give the residual stream, as the authors have it.
        block_size: Rows of the attention that stand in memory at a time, for long sequences; None: all. Only where the
            module is called with `need_weights=False`.
        log: Whether to log.
        name: Prefix in logs and key in checkpoints.

    Raises:
        AddressError: If an address matches nothing.
        TypeError: If it matches something else, and in the first step if that attends to another sequence.
        ValueError: If an argument is out of its range, `clusters_from` matches more modules or fewer, or a sequence is
            not the prefix and the grid.

    Source:
        Wang et al., "Adaptively Clustering Neighbor Elements for Image-Text Generation" (arXiv 2301.01955).
        `clusters_from="input"`, `init_bias` and `normalize` are ours.

    Example:
        >>> AdaClustFormer("module.encoder.layers.*.self_attn", init_bias=None)
        AdaClustFormer(modules='module.encoder.layers.*.self_attn', init_bias=None)
    """

    changes_inference = True

    def __init__(
        self,
        modules: list[str] | str,
        *,
        kind: ClusterKind = "span",
        grid_size: list[int] | None = None,
        prefix_tokens: int = 0,
        pool: int = 2,
        layout: GridLayout = "separable",
        norm: ClusterNorm = "annotated",
        monotone: bool = True,
        init_bias: float | None = 6.0,
        normalize: bool = False,
        clusters_from: list[str] | str = "input",
        block_size: int | None = None,
        log: bool = True,
        name: str = "acf",
    ) -> None:
        super().__init__(name=name, log=log)
        if grid_size is not None and len(grid_size) != 2:
            raise ValueError(f"Expected `grid_size` to be rows and columns, but got {grid_size!r}.")
        if block_size is not None and (kind != "span" or prefix_tokens):
            raise ValueError(
                f"`block_size` needs kind 'span' without prefix tokens, but got {kind!r} and {prefix_tokens}."
            )
        self.modules = Parts(modules)
        self.kind, self.grid_size, self.prefix_tokens = kind, grid_size, prefix_tokens
        self.pool, self.layout, self.norm = pool, layout, norm
        self.monotone, self.init_bias, self.normalize, self.block_size = monotone, init_bias, normalize, block_size
        self.clusters_from: Literal["input"] | Parts = "input" if clusters_from == "input" else Parts(clusters_from)
        ClusterLayer(4, **self._cluster_options())  # its own checks, where the callback is made

    def replacements(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """An attention with clusters for each module at the addresses."""
        options = {**self._cluster_options(), "normalize": self.normalize}
        multihead = partial(AdaClusterAttention.from_multihead, **options, block_size=self.block_size)
        timm = partial(TimmAdaClusterAttention, **options)
        found = {
            path: replaced_attention(path, part, multihead, timm) for path, part in self.modules.find(module).items()
        }
        state = ClusterState()
        for place, part in enumerate(found.values()):
            layer = _clusters(part)
            layer.state, layer.layer = (state, place) if self.monotone else (ClusterState(), 0)
        return found

    def apply(self, module: AnyModule) -> AnyModule:
        """As every method's, and lets the new modules know what to cluster."""
        if is_operated(module, self.name):
            return module
        pairs = self._sources(module)
        super().apply(module)
        for path, where in pairs.items():
            source = module.get_submodule(path).clusters.source = ClusterSource(self.name)  # type: ignore[union-attr]
            module.get_submodule(where).register_forward_pre_hook(source, with_kwargs=True)
        return module

    def undo(self, module: AnyModule) -> AnyModule:
        """As every method's, and takes its hooks off."""
        for part in module.modules():
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, ClusterSource) and hook.method == self.name:
                    del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
        return super().undo(module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each step: logs how open and wide clusters are, and lets go of the step's graph."""
        layers = {path: _clusters(part) for path, part in pl_module.named_modules() if replaced_by(part) == self.name}
        if self.log_terms and not trainer.barebones and should_log(trainer):
            values = {
                f"{self.name}/{path}/{key}": value for path, layer in layers.items() for key, value in _extent(layer)
            }
            if values:
                pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        for layer in layers.values():
            for kept in (layer.state, layer.source):
                if kept is not None:
                    kept.clear()

    def _sources(self, module: nn.Module) -> dict[str, str]:
        """By the path of each attention, that of the module whose input it clusters."""
        if self.clusters_from == "input":
            return {}
        attentions, sources = list(self.modules.find(module)), list(self.clusters_from.find(module))
        if len(attentions) != len(sources):
            raise ValueError(
                f"Expected `clusters_from` to name one module for each of the {len(attentions)} that {self.modules!r} "
                f"names, but {self.clusters_from!r} names {len(sources)}."
            )
        return dict(zip(attentions, sources, strict=True))

    def _cluster_options(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "grid_size": None if self.grid_size is None else (self.grid_size[0], self.grid_size[1]),
            "prefix_tokens": self.prefix_tokens,
            "pool": self.pool,
            "layout": self.layout,
            "norm": self.norm,
            "init_bias": self.init_bias,
        }


def _clusters(part: Any) -> ClusterLayer:
    layer = part.clusters
    assert isinstance(layer, ClusterLayer)  # noqa: S101
    return layer


@torch.no_grad()
def _extent(layer: ClusterLayer) -> Iterator[tuple[str, Tensor]]:
    """How open clusters are and how wide, where the layer has just made the whole matrix."""
    matrix = None if layer.state is None else layer.state.matrix(layer.layer)
    if layer.state is None or matrix is None:
        return
    gaps = layer.state.before(layer.layer + 1)  # log(1 - M) above the diagonal; below it there is nothing
    pairs = [gap.numel() // gap.shape[-1] * (gap.shape[-1] - 1) / 2 for gap in gaps]
    yield "open", torch.stack([-torch.expm1(gap).triu(1).sum() for gap in gaps]).sum() / max(1, sum(pairs))
    yield "width", matrix.sum(-1).mean()
