"""The methods' mathematics as pure functions on tensors; importing it needs torch only."""

from lightning_methods.functional.acf import (
    ClusterResult,
    SpanScores,
    cluster_attention,
    cluster_from_logits,
    span_cluster_matrix,
    span_logits,
    span_scores,
)
from lightning_methods.functional.acf_captions import (
    BleuResult,
    CiderResult,
    DocumentFrequency,
    bleu,
    caption_tokens,
    cider_d,
    document_frequency,
)
from lightning_methods.functional.acf_grid import (
    GridClusterResult,
    grid_cluster_matrix,
)
from lightning_methods.functional.acf_lean import (
    NeighborLinks,
    neighbor_cluster_attention,
    neighbor_links,
    span_cluster_attention,
)
from lightning_methods.functional.acf_losses import (
    PrefixRows,
    caption_mask,
    masked_token_nll,
    prefix_mask_rows,
    self_critical_loss,
)
from lightning_methods.functional.acf_neighbors import (
    NeighborClusterResult,
    neighbor_cluster_matrix,
)
from lightning_methods.functional.class_probs import (
    accumulate_class_probs,
    normalize_class_probs,
)
from lightning_methods.functional.eqsim import (
    EqSimTerms,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_quad_loss,
)
from lightning_methods.functional.eqsim_consistency import (
    cross_modal_consistency_loss,
    in_modal_consistency_loss,
)
from lightning_methods.functional.eqsim_sampling import (
    eqsim_sample_close,
)
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
from lightning_methods.functional.proreg import (
    ProRegTerms,
    proreg_loss,
    proreg_terms,
    proreg_weight,
)
from lightning_methods.functional.proreg_prompts import (
    fill_prompts,
    prompt_logits,
    prompt_text_features,
)
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
from lightning_methods.functional.stillmix_fame import (
    fame_foreground_mask,
)
from lightning_methods.functional.stillmix_scores import (
    ContrastedResult,
    average_views,
    contrasted_accuracy,
)
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
from lightning_methods.functional.twbert import (
    TrajectoryResult,
    TrajectoryWordResult,
    trajectory_pool,
    trajectory_word_attention,
)
from lightning_methods.functional.twbert_frames import (
    FrameSelection,
    perturbed_topk,
    select_frames,
)
from lightning_methods.functional.twbert_losses import (
    MaskedTokens,
    fine_grained_contrastive_loss,
    mask_tokens,
    sample_hard_negatives,
    video_text_contrastive_loss,
    video_text_matching_loss,
)
from lightning_methods.functional.twbert_retrieval import (
    retrieval_ranks,
    two_stage_retrieval_metrics,
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
from lightning_methods.functional.umil_frames import (
    FramePieces,
    VideoRecord,
    frame_level_pieces,
    frame_level_scores,
    piecewise_auroc,
    piecewise_average_precision,
    snippet_cell_index,
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
    "BleuResult",
    "CiderResult",
    "ClusterResult",
    "ConfidenceSplit",
    "ContrastedResult",
    "DetectorLoss",
    "DocumentFrequency",
    "EqSimTerms",
    "FgValid",
    "FoilScores",
    "FrameBiasScores",
    "FramePieces",
    "FrameSelection",
    "GridClusterResult",
    "GroupScores",
    "IKLTerms",
    "InvarianceLoss",
    "MILLoss",
    "MaskedTokens",
    "Mixed",
    "NeighborClusterResult",
    "NeighborLinks",
    "PairwiseLoss",
    "PrefixRows",
    "ProRegTerms",
    "RecallScores",
    "SpanScores",
    "StillMixDraw",
    "StripesDraw",
    "TrajectoryResult",
    "TrajectoryWordResult",
    "VideoMixBox",
    "VideoRecord",
    "accumulate_class_probs",
    "actor_cutmix",
    "average_views",
    "background_erase",
    "bleu",
    "boxes_to_masks",
    "caption_mask",
    "caption_tokens",
    "cider_d",
    "cluster_attention",
    "cluster_from_logits",
    "confidence_split",
    "confidence_split_from_moments",
    "conflicting_foreground",
    "contrasted_accuracy",
    "cross_modal_consistency_loss",
    "dkl_loss",
    "document_frequency",
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
    "fine_grained_contrastive_loss",
    "foil_scores",
    "foreground_valid",
    "frame_bias_scores",
    "frame_level_pieces",
    "frame_level_scores",
    "gkl_loss",
    "grid_cluster_matrix",
    "ikl_loss",
    "ikl_terms",
    "in_modal_consistency_loss",
    "label_similarity",
    "mask_tokens",
    "masked_token_nll",
    "merge_foreground_masks",
    "mil_ranking_loss",
    "mil_topk_loss",
    "mixup_videos",
    "neighbor_cluster_attention",
    "neighbor_cluster_matrix",
    "neighbor_links",
    "normalize_class_probs",
    "pair_group_scores",
    "pairwise_bce",
    "pairwise_cluster_loss",
    "pairwise_wmse",
    "perturbed_topk",
    "piecewise_auroc",
    "piecewise_average_precision",
    "prefix_mask_rows",
    "prompt_logits",
    "prompt_text_features",
    "proreg_loss",
    "proreg_terms",
    "proreg_weight",
    "random_stripes",
    "replace_background",
    "retrieval_ranks",
    "retrieval_recall",
    "sample_hard_negatives",
    "sample_stillmix",
    "sample_stripes",
    "select_biased_frames",
    "select_frames",
    "self_critical_loss",
    "sinusoidal_stripes",
    "snippet_cell_index",
    "snippet_similarity",
    "soft_target_cross_entropy",
    "span_cluster_attention",
    "span_cluster_matrix",
    "span_logits",
    "span_scores",
    "still_video",
    "stillmix",
    "temporal_smoothness",
    "temporal_sparsity",
    "trajectory_pool",
    "trajectory_word_attention",
    "two_stage_retrieval_metrics",
    "umil_detector_loss",
    "umil_invariance_loss",
    "umil_mil_loss",
    "video_text_contrastive_loss",
    "video_text_matching_loss",
    "videomix",
    "videomix_box",
]
