import math

import pytest
import torch

from lightning_methods.functional import (
    cross_modal_consistency_loss,
    embedding_recall,
    eqben_subset_scores,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_quad_loss,
    eqsim_sample_close,
    foil_scores,
    in_modal_consistency_loss,
    pair_group_scores,
    retrieval_recall,
)

L, J, Q, P = torch.zeros(3, 3), torch.tensor([[1, 2], [0, 2]]), torch.zeros(4, 5), torch.arange(4)
E, IDS = torch.zeros(3, 3, dtype=torch.bool), torch.arange(3)

BAD_CALLS = {
    "no side": (
        lambda: eqsim_all_pairs_loss(L, text_side=False, image_side=False),
        "text_side.*image_side.*group_side",
    ),
    "margin": (lambda: eqsim_all_pairs_loss(L, margin=-0.1), "`margin`.*-0.1"),
    "margin nan": (lambda: eqsim_quad_loss(*Q, margin=math.nan), "`margin`.*nan"),
    "eps": (lambda: eqsim_quad_loss(*Q, eps=-1.0), "`eps`.*-1.0"),
    "hinge": (lambda: eqsim_itm_loss(*Q, hinge="max"), "`hinge`.*mean.*max"),
    "reduction": (lambda: eqsim_quad_loss(*Q, hinge="pair", reduction="max"), "`reduction`.*none.*max"),
    "reduction of the hinge": (lambda: eqsim_quad_loss(*Q, reduction="none"), "`reduction`.*hinge.*none"),
    "quad shapes": (lambda: eqsim_quad_loss(Q[0], Q[1], Q[2, :4], Q[3]), r"s01.*\(5,\).*s10.*\(4,\)"),
    "quad s00": (lambda: eqsim_quad_loss(Q[0, :4], Q[1], Q[2], Q[3]), r"s00.*\(5,\).*\(4,\)"),
    "quad s00 too deep": (lambda: eqsim_quad_loss(Q[:1], Q[1], Q[2], Q[3]), r"s00.*\(5,\).*\(1, 5\)"),
    "quad integers": (lambda: eqsim_quad_loss(Q[0].long(), *Q[1:]), "s00.*int64"),
    "quad integers s10": (lambda: eqsim_quad_loss(Q[0], Q[1], Q[2].long(), Q[3]), "s10.*int64"),
    "all pairs shape": (lambda: eqsim_all_pairs_loss(L[0]), r"logits.*\(3,\)"),
    "all pairs columns": (lambda: eqsim_all_pairs_loss(L[:, :2]), "logits.*columns.*3 x 2"),
    "all pairs dtype": (lambda: eqsim_all_pairs_loss(L.long()), "logits.*int64"),
    "all pairs activation": (lambda: eqsim_all_pairs_loss(L, activation="linear"), "activation.*softmax.*linear"),
    "all pairs exclude": (lambda: eqsim_all_pairs_loss(L, exclude=E[:2]), r"exclude.*\(3, 3\).*\(2, 3\)"),
    "close far square": (lambda: eqsim_close_far_loss(L[:2], J), "logits.*square.*2 x 3"),
    "close far activation": (lambda: eqsim_close_far_loss(L, J, activation="sigmoid"), "activation.*softmax.*sigmoid"),
    "close far margin": (lambda: eqsim_close_far_loss(L, J, far_margin=-1.0), "far_margin.*-1.0"),
    "close far scale": (lambda: eqsim_close_far_loss(L, J, far_scale=0.0), "far_scale.*positive.*0.0"),
    "close far exclude": (lambda: eqsim_close_far_loss(L, J, exclude=E.long()), "exclude.*boolean.*int64"),
    "index floating": (lambda: eqsim_close_far_loss(L, J.float()), "close_index.*float32"),
    "index boolean": (lambda: eqsim_close_far_loss(L, J > 0), "close_index.*bool"),
    "index flat": (lambda: eqsim_close_far_loss(L, J[0]), r"close_index.*\(B, K\).*\(2,\)"),
    "index too long": (lambda: eqsim_close_far_loss(L, J.repeat(2, 1)), r"close_index.*B <= 3.*\(4, 2\)"),
    "index too large": (lambda: eqsim_close_far_loss(L, J + 1), r"close_index.*\[0, 3\), got 3"),
    "index negative": (lambda: eqsim_close_far_loss(L, J - 1), r"close_index.*\[0, 3\), got -1"),
    "sample square": (lambda: eqsim_sample_close(L[:2]), "logits.*square.*2 x 3"),
    "sample number": (lambda: eqsim_sample_close(L, num_samples=0), "num_samples.*at least 1.*got 0"),
    "sample batch": (lambda: eqsim_sample_close(L, num_samples=3), "num_samples.*less than the batch of 3, got 3"),
    "sample anchors": (lambda: eqsim_sample_close(L, num_samples=1, num_anchors=4), r"num_anchors.*\[0, 3\].*4"),
    "sample exclude": (lambda: eqsim_sample_close(L, num_samples=1, exclude=E[:, :2]), r"exclude.*\(3, 3\).*\(3, 2\)"),
    "itm activation": (lambda: eqsim_itm_loss(*Q, activation="tanh"), "activation.*linear.*tanh"),
    "itm shapes": (lambda: eqsim_itm_loss(Q[0], Q[1, :, None], Q[2], Q[3]), r"s01.*\(5, 1\).*s10.*\(5,\)"),
    "itm s00": (lambda: eqsim_itm_loss(Q[0, :4], *Q[1:]), r"s00.*\(4,\).*s01.*\(5,\)"),
    "itm s00 with negatives": (lambda: eqsim_itm_loss(L, L, L, L), r"s00.*\(N,\).*\(3, 3\)"),
    "itm no anchor axis": (lambda: eqsim_itm_loss(*Q[:, 0]), r"s00.*\(N,\).*\(\)"),
    "cross square": (lambda: cross_modal_consistency_loss(L[:2], logit_scale=1.0), "logits.*square.*2 x 3"),
    "cross scale": (lambda: cross_modal_consistency_loss(L, logit_scale=0.0), "logit_scale.*positive.*0.0"),
    "in-modal square": (lambda: in_modal_consistency_loss(L, L[:2], logit_scale=1.0), "text_logits.*square"),
    "in-modal shapes": (
        lambda: in_modal_consistency_loss(L, L[:2, :2], logit_scale=1.0),
        r"text_logits.*\(3, 3\).*\(2, 2\)",
    ),
    "group shapes": (lambda: pair_group_scores(Q[0], Q[1], Q[2], Q[3, :1]), r"s00.*\(5,\).*s11.*\(1,\)"),
    "group integers": (lambda: pair_group_scores(Q[0], Q[1].long(), Q[2], Q[3]), "s01.*int64"),
    "subset shapes": (lambda: eqben_subset_scores(Q[:, 0], P[:3], P, P, num_subsets=4), r"corner.*\(3,\)"),
    "subset matrix": (lambda: eqben_subset_scores(Q, Q.long(), Q.long(), Q.long(), num_subsets=4), r"\(P,\).*\(4, 5\)"),
    "subset scores": (lambda: eqben_subset_scores(P, P, P, P, num_subsets=4), "scores.*int64"),
    "subset floating": (lambda: eqben_subset_scores(Q[:, 0], P, P / 1, P, num_subsets=4), "sample.*float32"),
    "corner": (lambda: eqben_subset_scores(Q[:, 0], P + 1, P * 0, P, num_subsets=4), r"corner.*\[0, 4\), got 4"),
    "subset": (lambda: eqben_subset_scores(Q[:, 0], P, P * 0, P, num_subsets=3), r"subset.*\[0, 3\), got 3"),
    "incomplete": (
        lambda: eqben_subset_scores(Q[:, 0], P, torch.tensor([0, 0, 0, 1]), 0 * P, num_subsets=1),
        "all four pairs.*2 of 2",
    ),
    "foil shapes": (lambda: foil_scores(Q[0], Q[1, :1]), r"caption.*\(5,\).*foil.*\(1,\)"),
    "foil integers": (lambda: foil_scores(Q[0], Q[1].long()), "foil.*int64"),
    "recall flat": (lambda: retrieval_recall(L[0], IDS, IDS), r"similarity.*\(3,\)"),
    "recall image_ids": (lambda: retrieval_recall(L[:2], IDS, IDS), r"image_ids.*\(2,\).*\(3,\)"),
    "recall text_ids": (lambda: retrieval_recall(L, IDS, IDS[:2]), r"text_ids.*\(3,\).*\(2,\)"),
    "recall ids floating": (lambda: retrieval_recall(L, IDS.float(), IDS), "image_ids.*float32"),
    "recall no text": (lambda: retrieval_recall(L[:, :0], IDS, IDS[:0]), "text_ids.*at least one"),
    "recall k": (lambda: retrieval_recall(L, IDS, IDS, k=(0, 1)), r"`k`.*\(0, 1\)"),
    "recall no k": (lambda: retrieval_recall(L, IDS, IDS, k=()), r"`k`.*\(\)"),
    "recall chunk": (lambda: retrieval_recall(L, IDS, IDS, chunk=0), "chunk.*0"),
    "features columns": (lambda: embedding_recall(L, L[:, :2], IDS, IDS), "text_features.*3.*2"),
    "features flat": (lambda: embedding_recall(L[0], L, IDS, IDS), r"image_features.*\(3,\)"),
    "features ids": (lambda: embedding_recall(L, L, IDS, IDS[:2]), r"text_ids.*\(3,\).*\(2,\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
