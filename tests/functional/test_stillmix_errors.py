import math

import pytest
import torch

from lightning_methods.functional import (
    actor_cutmix,
    background_erase,
    fame,
    fame_foreground_mask,
    frame_bias_scores,
    mixup_videos,
    sample_stillmix,
    select_biased_frames,
    sinusoidal_stripes,
    stillmix,
    videomix,
    videomix_box,
)

X, Z = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 5, 6)
XN = torch.zeros(2, 7, 3, 4, 5, 6)
Y, PERM, BOX = torch.eye(2), torch.tensor([1, 0]), torch.tensor([0, 0, 2, 2])
M = torch.zeros(2, 5, 6, dtype=torch.bool)
S = torch.tensor([0.1, 0.5, 0.9])


def stripes(**changes):
    plain = {"color": (0.1, 0.2, 0.3), "linewidth": 5.0, "spacing": 20.0, "frequency": 0.1, "phase": 0.0}
    return sinusoidal_stripes(**{**plain, "amplitude": 5.0, "angle": 0.0, "size": 16, **changes})


BAD_CALLS = {
    "layout": (lambda: stillmix(X, Z, 0.5, layout="bhwct"), "`layout`.*btchw.*'bhwct'"),
    "dims": (lambda: stillmix(X[0], Z, 0.5), r"`videos`.*\(B, C, T, H, W\).*\(3, 4, 5, 6\)"),
    "dims of clips": (lambda: stillmix(X, Z, 0.5, layout="bncthw"), r"`videos`.*\(B, N, C, T, H, W\)"),
    "uint8 videos": (lambda: stillmix(X.byte(), Z, 0.5), "`videos`.*uint8.*normalise"),
    "uint8 frames": (lambda: stillmix(X, Z.byte(), 0.5), "`frames`.*uint8.*normalise"),
    "frames of another size": (lambda: stillmix(X, Z[..., :5], 0.5), r"`frames`.*\(2, 3, 5, 6\).*\(2, 3, 5, 5\)"),
    "frames of another batch": (lambda: stillmix(X, Z[:1], 0.5), r"`frames`.*\(2, 3, 5, 6\).*\(1, 3, 5, 6\)"),
    "frames of other colours": (lambda: stillmix(X, Z[:, :1], 0.5), r"`frames`.*\(2, 1, 5, 6\)"),
    "frames of other clips": (
        lambda: stillmix(XN, torch.zeros(2, 1, 3, 5, 6), 0.5, layout="bncthw"),
        r"`frames`.*\(2, 7, 3, 5, 6\) or \(2, 3, 5, 6\).*\(2, 1, 3, 5, 6\)",
    ),
    "lam above": (lambda: stillmix(X, Z, 1.1), r"`lam`.*\[0, 1\].*1.1"),
    "lam below": (lambda: stillmix(X, Z, -0.1), "`lam`.*-0.1"),
    "lam nan": (lambda: stillmix(X, Z, math.nan), "`lam`.*nan"),
    "lam shape": (lambda: stillmix(X, Z, torch.ones(3)), r"`lam`.*\(2,\).*\(3,\)"),
    "lam integers": (lambda: stillmix(X, Z, torch.tensor(1)), "`lam`.*int64"),
    "apply numbers": (lambda: stillmix(X, Z, 0.5, torch.ones(2)), "`apply`.*boolean.*float32"),
    "apply shape": (lambda: stillmix(X, Z, 0.5, torch.ones(3, dtype=torch.bool)), r"`apply`.*\(2,\).*\(3,\)"),
    "alpha": (lambda: sample_stillmix(2, 9, alpha=0), "`alpha`.*positive.*0"),
    "beta": (lambda: sample_stillmix(2, 9, beta=-1.0), "`beta`.*positive.*-1"),
    "p": (lambda: sample_stillmix(2, 9, p=1.5), r"`p`.*\[0, 1\].*1.5"),
    "empty bank": (lambda: sample_stillmix(2, 0), "`num_frames`.*positive.*0"),
    "no clip": (lambda: sample_stillmix(2, 9, clips=0), "`clips`.*positive.*0"),
    "score logits": (lambda: frame_bias_scores(X, PERM), r"`logits`.*\(n, K\).*\(2, 3, 4, 5, 6\)"),
    "score targets": (lambda: frame_bias_scores(Y, PERM[:1]), r"`targets`.*\(n,\).*\(1,\)"),
    "score target values": (lambda: frame_bias_scores(Y, PERM + 1), r"`targets`.*\[0, 2\).*2"),
    "score target dtype": (lambda: frame_bias_scores(Y, PERM.float()), "`targets`.*integers.*float32"),
    "temperature": (lambda: frame_bias_scores(Y, PERM, temperature=0.0), "`temperature`.*positive"),
    "strategy": (lambda: select_biased_frames(S, strategy="best"), "`strategy`.*quantile.*'best'"),
    "scores shape": (lambda: select_biased_frames(S[None]), r"`scores`.*\(n,\).*\(1, 3\)"),
    "scores integers": (lambda: select_biased_frames(PERM), "`scores`.*int64"),
    "scores nan": (lambda: select_biased_frames(S * math.nan), "`scores`.*NaN in 3 of 3"),
    "low is high": (lambda: select_biased_frames(S, low=0.5, high=0.5), "`low`.*smaller than `high`.*0.5"),
    "low bound": (lambda: select_biased_frames(S, low=-0.1), r"`low`.*\[0, 1\].*-0.1"),
    "high bound": (lambda: select_biased_frames(S, high=1.1), r"`high`.*\[0, 1\].*1.1"),
    "empty quantile": (lambda: select_biased_frames(S, low=0.4, high=0.5), "no frame of the 3.*quantile"),
    "empty threshold": (lambda: select_biased_frames(S, strategy="threshold", low=0.6, high=0.7), "no frame.*0.6.*0.7"),
    "empty bernoulli": (lambda: select_biased_frames(0 * S, strategy="bernoulli"), "no frame.*bernoulli"),
    "no scores": (lambda: select_biased_frames(S[:0], strategy="top", count=1), "no frame of the 0"),
    "count missing": (lambda: select_biased_frames(S, strategy="top"), "`count`.*'top'.*None"),
    "count elsewhere": (lambda: select_biased_frames(S, count=2), "`count`.*'top'.*2.*quantile"),
    "count zero": (lambda: select_biased_frames(S, strategy="top", count=0), "`count`.*positive.*0"),
    "perm shape": (lambda: mixup_videos(X, Y, PERM[:1], 0.5), r"`perm`.*\(2,\).*\(1,\)"),
    "perm numbers": (lambda: mixup_videos(X, Y, PERM.float(), 0.5), "`perm`.*integers.*float32"),
    "perm values": (lambda: mixup_videos(X, Y, PERM + 1, 0.5), r"`perm`.*\[0, 2\).*from 1 to 2"),
    "mixup dims": (lambda: mixup_videos(X[0], Y, PERM, 0.5), r"`videos`.*5 or 6.*\(3, 4, 5, 6\)"),
    "mixup lam": (lambda: mixup_videos(X, Y, PERM, 2.0), r"`lam`.*\[0, 1\].*2"),
    "soft targets": (lambda: mixup_videos(X, Y[:1], PERM, 0.5), r"`targets`.*\(2, 2\).*\(1, 2\)"),
    "soft targets of other classes": (lambda: mixup_videos(X, Y, PERM, 0.5, num_classes=3), r"`targets`.*\(2, 3\)"),
    "targets of one dimension": (lambda: mixup_videos(X, Y[0], PERM, 0.5), r"`targets`.*\(B, K\).*\(2,\)"),
    "num_classes missing": (lambda: mixup_videos(X, PERM, PERM, 0.5), "`num_classes` is missing.*`targets`"),
    "hard targets": (lambda: mixup_videos(X, PERM[:, None], PERM, 0.5, num_classes=2), r"`targets`.*\(2,\).*\(2, 1\)"),
    "target values": (lambda: mixup_videos(X, PERM, PERM, 0.5, num_classes=1), r"`targets`.*\[0, 1\).*from 0 to 1"),
    "boolean targets": (lambda: mixup_videos(X, PERM > 0, PERM, 0.5, num_classes=2), "`targets`.*bool"),
    "box shape": (lambda: videomix(X, Y, PERM, BOX[:3]), r"`box`.*\(4,\).*\(3,\)"),
    "box numbers": (lambda: videomix(X, Y, PERM, BOX.float()), "`box`.*integers.*float32"),
    "box lam": (lambda: videomix_box(lam=1.5, cx=0, cy=0, height=4, width=4), r"`lam`.*\[0, 1\].*1.5"),
    "box height": (lambda: videomix_box(lam=0.5, cx=0, cy=0, height=0, width=4), "`height`.*positive.*0"),
    "frame index": (lambda: background_erase(X, 4, 0.5), r"`frame_index`.*\[0, 4\).*4"),
    "frame index below": (lambda: background_erase(X, -1, 0.5), r"`frame_index`.*\[0, 4\).*-1"),
    "frame indices": (lambda: background_erase(X, PERM + 3, 0.5), r"`frame_index`.*\[0, 4\).*from 3 to 4"),
    "frame index shape": (lambda: background_erase(X, BOX, 0.5), r"`frame_index`.*\(2,\).*\(4,\)"),
    "frame index numbers": (lambda: background_erase(X, S[:2], 0.5), "`frame_index`.*integers.*float32"),
    "frame index of clips": (
        lambda: background_erase(XN, PERM[:, None], 0.5, layout="bncthw"),
        r"`frame_index`.*\(2, 7\).*\(2, 1\)",
    ),
    "erase lam": (lambda: background_erase(X, 0, 1.5), r"`lam`.*\[0, 1\].*1.5"),
    "mask numbers": (lambda: fame(X, M.float(), PERM), "`masks`.*boolean.*float32"),
    "mask shape": (lambda: fame(X, M[..., :5], PERM), r"`masks`.*\(2, 5, 6\) or \(2, 4, 5, 6\).*\(2, 5, 5\)"),
    "mask of clips": (lambda: fame(XN, M, PERM, layout="bncthw"), r"`masks`.*\(2, 7, 5, 6\).*\(2, 5, 6\)"),
    "fame layout": (lambda: fame(X, M, PERM, layout="x"), "`layout`.*'x'"),
    "fame apply": (lambda: fame(X, M, PERM, PERM), "`apply`.*int64"),
    "actor masks": (lambda: actor_cutmix(X, Y, M.long()), "`masks`.*int64"),
    "actor targets": (lambda: actor_cutmix(X, PERM, M), "`num_classes`"),
    "one frame": (lambda: fame_foreground_mask(X[:, :, :1]), "`videos`.*2 frames.*3 and 1"),
    "two colours": (lambda: fame_foreground_mask(X[:, :2]), "`videos`.*3 colours.*2 and 4"),
    "fame beta": (lambda: fame_foreground_mask(X, beta=1.5), r"`beta`.*\[0, 1\].*1.5"),
    "kernel even": (lambda: fame_foreground_mask(X, kernel_size=4), "`kernel_size`.*odd.*4"),
    "kernel too large": (lambda: fame_foreground_mask(X, kernel_size=11), "`kernel_size`.*below 10.*11"),
    "kernel negative": (lambda: fame_foreground_mask(X, kernel_size=-1), "`kernel_size`.*positive.*-1"),
    "fame videos uint8": (lambda: fame_foreground_mask(X.byte()), "`videos`.*uint8"),
    "stripe colour": (lambda: stripes(color=(0.1, 0.2, 1.3)), r"`color`.*\[0, 1\].*1.3"),
    "stripe colours": (lambda: stripes(color=(0.1, 0.2)), "`color`.*3 values.*2"),
    "linewidth": (lambda: stripes(linewidth=0), "`linewidth`.*positive.*0"),
    "spacing": (lambda: stripes(spacing=-1.0), "`spacing`.*positive.*-1"),
    "size": (lambda: stripes(size=0), "`size`.*positive.*0"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
