import math

import pytest
import torch

from lightning_methods.functional import (
    dkl_loss,
    gkl_loss,
    ikl_loss,
    ikl_terms,
    pairwise_wmse,
    soft_target_cross_entropy,
)

N, M = torch.zeros(2, 3), torch.zeros(2, 3)
P, Y = torch.full((3, 3), 1 / 3), torch.tensor([0, 2])

BAD_CALLS = {
    "shapes differ": (lambda: ikl_loss(N, torch.zeros(2, 4)), r"student_logits.*\(2, 3\).*teacher_logits.*\(2, 4\)"),
    "one dimension": (lambda: dkl_loss(N[0], M[0]), r"student_logits.*\(N, C\).*\(3,\)"),
    "no class": (lambda: dkl_loss(N[:, :0], M[:, :0]), "student_logits"),
    "integer logits": (lambda: soft_target_cross_entropy(N, M.long()), "teacher_logits.*int64"),
    "class_probs alone": (lambda: ikl_loss(N, M, P), "target.*missing"),
    "target alone": (lambda: gkl_loss(N, M, target=Y), "class_probs.*missing"),
    "class_probs not square": (lambda: ikl_loss(N, M, P[:2], Y), r"class_probs.*\(3, 3\).*\(2, 3\)"),
    "class_probs of integers": (lambda: ikl_loss(N, M, P.long(), Y), "class_probs.*int64"),
    "target shape": (lambda: ikl_loss(N, M, P, Y[:1]), r"target.*\(2,\).*\(1,\)"),
    "target column": (lambda: ikl_loss(N, M, P, Y[:, None]), r"target.*\(2,\).*\(2, 1\)"),
    "target floating": (lambda: ikl_loss(N, M, P, Y.float()), "target.*float32"),
    "target boolean": (lambda: ikl_loss(N, M, P, Y > 0), "target.*bool"),
    "target too large": (lambda: ikl_loss(N, M, P, Y + 1), r"target.*\[0, 3\).*from 1 to 3"),
    "target negative": (lambda: ikl_loss(N, M, P, Y - 1), r"target.*from -1 to 1"),
    "temperature": (lambda: ikl_loss(N, M, temperature=0.0), "`temperature`.*positive.*0.0"),
    "student_temperature": (lambda: soft_target_cross_entropy(N, M, student_temperature=-1.0), "student_temperature"),
    "weight_temperature": (lambda: ikl_loss(N, M, weight_temperature=math.nan), "weight_temperature.*nan"),
    "gamma": (lambda: gkl_loss(N, M, gamma=-0.1), "gamma.*-0.1"),
    "reduction": (lambda: dkl_loss(N, M, reduction="max"), "reduction.*none.*max"),
    "normalization": (lambda: ikl_terms(N, M, normalization="class"), "normalization.*batch.*class"),
    "weight too long": (lambda: pairwise_wmse(N, M, torch.ones(4)), r"weight.*\(2, 3\).*\(4,\)"),
    "weight too deep": (lambda: pairwise_wmse(N, M, torch.ones(1, 2, 3)), r"weight.*\(2, 3\).*\(1, 2, 3\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
