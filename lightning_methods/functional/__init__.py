"""The methods' mathematics as pure functions on tensors; importing it needs torch only."""

from lightning_methods.functional.class_probs import accumulate_class_probs, normalize_class_probs
from lightning_methods.functional.eqsim import (
    EqSimTerms,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_quad_loss,
)
from lightning_methods.functional.eqsim_consistency import cross_modal_consistency_loss, in_modal_consistency_loss
from lightning_methods.functional.eqsim_sampling import eqsim_sample_close
from lightning_methods.functional.eqsim_scores import (
    FoilScores,
    GroupScores,
    RecallScores,
    embedding_recall,
    eqben_subset_scores,
    foil_scores,
    pair_group_scores,
    retrieval_recall,
)
from lightning_methods.functional.ikl import (
    IKLTerms,
    dkl_loss,
    gkl_loss,
    ikl_loss,
    ikl_terms,
    pairwise_wmse,
    soft_target_cross_entropy,
)
from lightning_methods.functional.proreg import ProRegTerms, proreg_loss, proreg_terms, proreg_weight
from lightning_methods.functional.proreg_prompts import fill_prompts, prompt_logits, prompt_text_features
from lightning_methods.functional.stillmix import (
    FrameBiasScores,
    StillMixDraw,
    frame_bias_scores,
    sample_stillmix,
    select_biased_frames,
    stillmix,
)
from lightning_methods.functional.stillmix_baselines import (
    Mixed,
    VideoMixBox,
    actor_cutmix,
    background_erase,
    fame,
    mixup_videos,
    videomix,
    videomix_box,
)
from lightning_methods.functional.stillmix_fame import fame_foreground_mask
from lightning_methods.functional.stillmix_scores import ContrastedResult, average_views, contrasted_accuracy
from lightning_methods.functional.stillmix_scuba import (
    FgValid,
    boxes_to_masks,
    conflicting_foreground,
    foreground_valid,
    merge_foreground_masks,
    replace_background,
    still_video,
)
from lightning_methods.functional.stillmix_stripes import (
    StripesDraw,
    random_stripes,
    sample_stripes,
    sinusoidal_stripes,
)

__all__ = [
    "ContrastedResult",
    "EqSimTerms",
    "FgValid",
    "FoilScores",
    "FrameBiasScores",
    "GroupScores",
    "IKLTerms",
    "Mixed",
    "ProRegTerms",
    "RecallScores",
    "StillMixDraw",
    "StripesDraw",
    "VideoMixBox",
    "accumulate_class_probs",
    "actor_cutmix",
    "average_views",
    "background_erase",
    "boxes_to_masks",
    "conflicting_foreground",
    "contrasted_accuracy",
    "cross_modal_consistency_loss",
    "dkl_loss",
    "embedding_recall",
    "eqben_subset_scores",
    "eqsim_all_pairs_loss",
    "eqsim_close_far_loss",
    "eqsim_itm_loss",
    "eqsim_quad_loss",
    "eqsim_sample_close",
    "fame",
    "fame_foreground_mask",
    "fill_prompts",
    "foil_scores",
    "foreground_valid",
    "frame_bias_scores",
    "gkl_loss",
    "ikl_loss",
    "ikl_terms",
    "in_modal_consistency_loss",
    "merge_foreground_masks",
    "mixup_videos",
    "normalize_class_probs",
    "pair_group_scores",
    "pairwise_wmse",
    "prompt_logits",
    "prompt_text_features",
    "proreg_loss",
    "proreg_terms",
    "proreg_weight",
    "random_stripes",
    "replace_background",
    "retrieval_recall",
    "sample_stillmix",
    "sample_stripes",
    "select_biased_frames",
    "sinusoidal_stripes",
    "soft_target_cross_entropy",
    "still_video",
    "stillmix",
    "videomix",
    "videomix_box",
]
