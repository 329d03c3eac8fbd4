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
from lightning_methods.functional.stillmix_stripes import (
    StripesDraw,
    random_stripes,
    sample_stripes,
    sinusoidal_stripes,
)
from lightning_methods.functional.umil import (
    DetectorLoss,
    InvarianceLoss,
    umil_detector_loss,
    umil_invariance_loss,
)
from lightning_methods.functional.umil_division import (
    ConfidenceSplit,
    confidence_split,
    confidence_split_from_moments,
)
from lightning_methods.functional.umil_mil import (
    MILLoss,
    mil_ranking_loss,
    mil_topk_loss,
    temporal_smoothness,
    temporal_sparsity,
    umil_mil_loss,
)
from lightning_methods.functional.umil_pairs import (
    PairwiseLoss,
    label_similarity,
    pairwise_bce,
    pairwise_cluster_loss,
    snippet_similarity,
)

__all__ = [
    "ConfidenceSplit",
    "DetectorLoss",
    "EqSimTerms",
    "FoilScores",
    "FrameBiasScores",
    "GroupScores",
    "IKLTerms",
    "InvarianceLoss",
    "MILLoss",
    "Mixed",
    "PairwiseLoss",
    "ProRegTerms",
    "RecallScores",
    "StillMixDraw",
    "StripesDraw",
    "VideoMixBox",
    "accumulate_class_probs",
    "actor_cutmix",
    "background_erase",
    "confidence_split",
    "confidence_split_from_moments",
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
    "frame_bias_scores",
    "gkl_loss",
    "ikl_loss",
    "ikl_terms",
    "in_modal_consistency_loss",
    "label_similarity",
    "mil_ranking_loss",
    "mil_topk_loss",
    "mixup_videos",
    "normalize_class_probs",
    "pair_group_scores",
    "pairwise_bce",
    "pairwise_cluster_loss",
    "pairwise_wmse",
    "prompt_logits",
    "prompt_text_features",
    "proreg_loss",
    "proreg_terms",
    "proreg_weight",
    "random_stripes",
    "retrieval_recall",
    "sample_stillmix",
    "sample_stripes",
    "select_biased_frames",
    "sinusoidal_stripes",
    "snippet_similarity",
    "soft_target_cross_entropy",
    "stillmix",
    "temporal_smoothness",
    "temporal_sparsity",
    "umil_detector_loss",
    "umil_invariance_loss",
    "umil_mil_loss",
    "videomix",
    "videomix_box",
]
