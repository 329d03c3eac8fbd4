"""The batch of all ranks on every rank, for losses over all pairs of a batch."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def gather_batch(*local: Tensor, gather_grad: bool = True) -> tuple[Tensor, ...]:
    """Each tensor with the rows of all ranks, this rank's own rows first and the other ranks' after them.

    A collective: every rank calls it with as many tensors, of the same trailing shapes and dtypes. The number of
    rows may differ between ranks, as it does for a last batch (every rank pads to the longest, gathers, and
    trims); the host reads these numbers, one synchronisation for all the tensors together. With one process, or
    without a process group, the tensors come back as they are.

    A loss of the gathered batch that is the same on every rank has, averaged over W ranks as
    DistributedDataParallel does, with `gather_grad` exactly the gradient that one process has on the joined
    batch, and without it 1/W of that.

    Args:
        local: Tensors of one length on this rank, (B, ...).
        gather_grad: Whether the gradients of a rank's rows come back to it from the losses of all ranks. False
            detaches the rows of the other ranks, as the code of most contrastive losses does.

    Raises:
        ValueError: If the tensors differ in length.
    """
    lengths = {len(tensor) for tensor in local}
    if len(lengths) != 1:
        raise ValueError(f"`local` must hold tensors of one length, got lengths {[len(tensor) for tensor in local]}")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    sizes = _sizes(lengths.pop(), local[0].device)
    return tuple(_gather(tensor, sizes, gather_grad) for tensor in local)


def _sizes(length: int, device: torch.device) -> list[int]:
    sizes = [torch.empty(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([length], device=device))
    found: list[int] = torch.cat(sizes).tolist()
    return found


def _gather(local: Tensor, sizes: list[int], gather_grad: bool) -> Tensor:
    rank = dist.get_rank()
    padding = local.new_zeros(max(sizes) - len(local), *local.shape[1:])
    padded = torch.cat([local, padding])
    gathered = _AllGather.apply(padded if gather_grad else padded.detach())
    blocks = [block[:size] for block, size in zip(gathered, sizes, strict=True)]
    own = blocks.pop(rank)
    return torch.cat([own if gather_grad else local, *blocks])


class _AllGather(torch.autograd.Function):
    """(M, ...) on each rank -> (W, M, ...) on all; backwards, the sum over the ranks of a rank's share."""

    @staticmethod
    def forward(_ctx: FunctionCtx, local: Tensor) -> Tensor:
        blocks = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, local)
        return torch.stack(blocks)

    @staticmethod
    @once_differentiable
    def backward(_ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # it may be another consumer's too
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
