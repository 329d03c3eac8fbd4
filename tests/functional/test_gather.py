from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from lightning_methods.functional import eqsim_all_pairs_loss, eqsim_close_far_loss
from lightning_methods.functional._gather import gather_batch

SIZES = (3, 2)  # an uneven last batch
CLOSE = (torch.tensor([[1, 4], [0, 3], [3, 4]]), torch.tensor([[2, 1], [4, 0]]))  # in each rank's own order


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and ids of the joined batch."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, sum(SIZES), 4, generator=generator, dtype=torch.float64)
    return image, text, torch.arange(10, 10 + sum(SIZES))


def parameters() -> list[Tensor]:
    """An encoder for images, one for texts, and a scale."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return [p.clone().requires_grad_() for p in (*weights, torch.tensor(1.5, dtype=torch.float64))]


def logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return scale * image @ text.T


def global_loss(scores: Tensor, rank: int) -> Tensor:
    """The same on every rank."""
    return eqsim_all_pairs_loss(scores, margin=0.0)


def local_loss(scores: Tensor, rank: int) -> Tensor:
    """Of each rank's own anchors, which come first."""
    return eqsim_close_far_loss(scores, CLOSE[rank], margin=0.0).total


LOSSES = {"global": global_loss, "local": local_loss}


def order(rank: int) -> Tensor:
    return torch.arange(5) if rank == 0 else torch.tensor([3, 4, 0, 1, 2])


def one_process(loss: str) -> tuple[Tensor, ...]:
    """Gradients of the mean of both ranks' losses on the joined batch."""
    image_weight, text_weight, scale = leaves = parameters()
    image, text, _ = inputs()
    losses = []
    for rank in range(2):
        rows = order(rank)
        losses.append(LOSSES[loss](logits(image[rows] @ image_weight.T, text[rows] @ text_weight.T, scale), rank))
    return torch.autograd.grad(sum(losses) / 2, leaves)


def results_on(rank: int) -> dict[Any, Any]:
    """Of one of two processes, each with its share of the batch and the gradients averaged as under DDP."""
    results = {}
    for gather_grad in (True, False):
        for name, loss in LOSSES.items():
            image_weight, text_weight, scale = leaves = parameters()
            image, text, ids = (part.split(SIZES)[rank] for part in inputs())
            gathered = gather_batch(image @ image_weight.T, text @ text_weight.T, ids, gather_grad=gather_grad)
            found = torch.autograd.grad(loss(logits(*gathered[:2], scale), rank), leaves)
            for gradient in found:
                dist.all_reduce(gradient)
            results[name, gather_grad] = [gradient / 2 for gradient in found]
    results["gathered"] = [part.detach() for part in gathered]
    results["empty"] = gather_batch(torch.ones(3 * rank, 2))[0]
    return results


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(results_on)


def test_own_rows_come_first(ranks):
    image, text, ids = inputs()
    image_weight, text_weight, _ = parameters()
    joined = (image @ image_weight.T, text @ text_weight.T, ids)
    for rank, results in enumerate(ranks):
        for found, expected in zip(results["gathered"], joined, strict=True):
            torch.testing.assert_close(found, expected[order(rank)].detach())


@pytest.mark.parametrize("loss", list(LOSSES))
def test_two_processes_have_the_gradient_of_one(ranks, loss):
    for results in ranks:
        torch.testing.assert_close(tuple(results[loss, True]), one_process(loss))
    assert all(gradient.abs().min() > 1e-6 for gradient in one_process(loss))


def test_without_gradient_the_encoders_get_half(ranks):
    *encoders, scale = one_process("global")
    for results in ranks:
        *found, found_scale = results["global", False]
        torch.testing.assert_close(found, [gradient / 2 for gradient in encoders])
        torch.testing.assert_close(found_scale, scale)


def test_a_rank_without_rows(ranks):
    for results in ranks:
        assert torch.equal(results["empty"], torch.ones(3, 2))


def test_without_a_process_group():
    image, text, ids = inputs()
    assert all(found is part for found, part in zip(gather_batch(image, text, ids), (image, text, ids), strict=True))


def test_lengths():
    with pytest.raises(ValueError, match=r"`local`.*\[3, 2\]"):
        gather_batch(torch.zeros(3), torch.zeros(2))
