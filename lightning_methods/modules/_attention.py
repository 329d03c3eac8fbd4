"""What attention modules that take the place of others share: reading the old one, and living where it lived."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

#: Parts of timm's `Attention`, the last two in newer versions only, and what its `forward` takes.
_TIMM_PARTS = {"qkv", "q_norm", "k_norm", "proj", "attn_drop", "proj_drop", "norm", "gate"}
_TIMM_INPUTS = {"x", "attn_mask", "is_causal"}


def check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"`num_heads` must divide embed_dim {embed_dim}, got {num_heads}")


def check_multihead(mha: nn.Module) -> nn.MultiheadAttention:
    """A self-attention whose projections stand in `in_proj_weight`, without keys of its own."""
    if not isinstance(mha, nn.MultiheadAttention):
        raise TypeError(f"`mha` must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
    if not mha._qkv_same_embed_dim:
        raise ValueError(f"`mha` must be a self-attention, got one with kdim {mha.kdim} and vdim {mha.vdim}")
    if mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError("`mha` must attend to its input alone, got one with add_bias_kv or add_zero_attn")
    return mha


def check_timm(attention: nn.Module) -> Any:
    """Timm's `Attention`, by what it has: the class stands at different places in its versions.

    Its relatives with relative positions, rotations, biases of their own or differences have more, which would be lost.
    """
    needed = ("qkv", "q_norm", "k_norm", "proj", "attn_drop", "proj_drop", "num_heads")
    missing = [name for name in needed if not hasattr(attention, name)]
    if missing or not isinstance(attention.qkv, nn.Linear):
        found = f"{type(attention).__name__}" + (f" without {', '.join(missing)}" if missing else "")
        raise TypeError(f"`attention` must be timm's Attention, got {found}")
    own = {*attention._parameters, *attention._buffers, *attention._modules}
    more = sorted((own - _TIMM_PARTS) | (set(inspect.signature(attention.forward).parameters) - _TIMM_INPUTS))
    if more:
        raise TypeError(
            f"`attention` must be timm's plain Attention, got {type(attention).__name__} with {', '.join(more)}"
        )
    return attention


def copy_into(target: Tensor, source: Tensor | None) -> None:
    """Values; zeros where there is no source."""
    with torch.no_grad():
        if source is None:
            target.zero_()
        else:
            target.copy_(source)


def padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as (B, N, D) and the padding mask (B, N).

    torch's TransformerEncoder makes its input nested in evaluation, for kernels that know torch's attention only.
    """
    dense = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sample) for sample in nested.unbind()], device=dense.device)
    return dense, torch.arange(dense.shape[1], device=dense.device) >= lengths[:, None]


def nested_again(dense: Tensor, padding: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(
        [sample[: int(length)] for sample, length in zip(dense, (~padding).sum(1).tolist(), strict=True)]
    )
