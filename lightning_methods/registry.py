"""One row of facts for each method; the command line, the docs and the tests read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MethodInfo:
    """What there is to say about a method in a table.

    Attributes:
        name: The method's name; also the name of its file in every folder.
        title: One line.
        callbacks: Names in `lightning_methods.callbacks`.
        functional: Names in `lightning_methods.functional`.
        paper: Authors, title, venue, arXiv number.
        task: What it is for.
        kind: How it attaches: in the training step, by changing the model, or by plain hooks.
        changes_inference: Whether the trained module needs the method at inference.
        card: Path of its documentation page.
        known_limits: What it does not do, in a sentence each.
        commands: Tools on the command line, `lightning-methods NAME`; files in `lightning_methods.commands`.
        more_demos: Demos besides the one of the method's name; files in `lightning_methods.demos`.
    """

    name: str
    title: str
    callbacks: tuple[str, ...]
    functional: tuple[str, ...]
    paper: str
    task: str
    kind: Literal["step", "surgery", "plain"]
    changes_inference: bool
    card: str
    known_limits: tuple[str, ...]
    commands: tuple[str, ...] = ()
    more_demos: tuple[str, ...] = ()

    @property
    def demos(self) -> tuple[str, ...]:
        """What `lightning-methods demo` runs of this method."""
        return (self.name, *self.more_demos)


METHODS: tuple[MethodInfo, ...] = (
    MethodInfo(
        name="ikl",
        title="Improved and generalised KL: distillation whose pairwise logit term reaches the student",
        callbacks=("IKLDistillation",),
        functional=(
            "pairwise_wmse",
            "soft_target_cross_entropy",
            "dkl_loss",
            "ikl_loss",
            "gkl_loss",
            "ikl_terms",
            "accumulate_class_probs",
            "normalize_class_probs",
        ),
        paper="Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, arXiv 2305.13948",
        task="classification, knowledge distillation",
        kind="step",
        changes_inference=False,
        card="docs/methods/ikl.md",
        known_limits=(
            "The gain over well-tuned KL distillation with the usual T² factor is small.",
            "Class-wise weights hold a C x C matrix: use class_wise=False from about 20,000 classes on.",
        ),
    ),
    MethodInfo(
        name="eqsim",
        title="Equivariant similarity: opposite changes of an image-text pair move the score by the same amount",
        callbacks=("EqSim",),
        functional=(
            "eqsim_quad_loss",
            "eqsim_all_pairs_loss",
            "eqsim_close_far_loss",
            "eqsim_sample_close",
            "eqsim_itm_loss",
            "cross_modal_consistency_loss",
            "in_modal_consistency_loss",
            "pair_group_scores",
            "eqben_subset_scores",
            "foil_scores",
            "retrieval_recall",
            "embedding_recall",
        ),
        paper="Wang et al., Equivariant Similarity for Vision-Language Foundation Models, ICCV 2023, arXiv 2303.14465",
        task="image-text retrieval and matching",
        kind="step",
        changes_inference=False,
        card="docs/methods/eqsim.md",
        known_limits=(
            "It needs a retrieval loss beside it: equal similarities everywhere fulfil it.",
            "In our demo a contrastive loss at a well-chosen temperature does as well without it.",
            "A weight that is too large hurts, and the released setting shows no effect on small models.",
            "The paper was read in its abstract only; formulas and settings are those of the authors' code.",
        ),
        commands=("eval-eqben",),
        more_demos=("eqsim_clip",),
    ),
    MethodInfo(
        name="umil",
        title="UMIL: a detector trained on bags learns from confident and from ambiguous instances at once",
        callbacks=("UMIL",),
        functional=(
            "umil_invariance_loss",
            "umil_detector_loss",
            "umil_mil_loss",
            "mil_topk_loss",
            "mil_ranking_loss",
            "temporal_smoothness",
            "temporal_sparsity",
            "confidence_split",
            "confidence_split_from_moments",
            "pairwise_cluster_loss",
            "pairwise_bce",
            "snippet_similarity",
            "label_similarity",
            "snippet_cell_index",
            "frame_level_scores",
            "frame_level_pieces",
            "piecewise_auroc",
            "piecewise_average_precision",
        ),
        paper=(
            "Lv et al., Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly Detection, CVPR 2023, "
            "arXiv 2303.12369"
        ),
        task="weakly supervised anomaly detection, multiple-instance learning",
        kind="step",
        changes_inference=False,
        card="docs/methods/umil.md",
        known_limits=(
            "Pairs cannot tell normal from abnormal: begun too early, all predictions may be inverted.",
            "The similarity threshold has to fit the features: with nearly all pairs alike, or none, it does not help.",
            "Of the paper only summaries could be read, and nobody is known to have reproduced its numbers.",
        ),
        commands=("score-video",),
    ),
    MethodInfo(
        name="proreg",
        title="Prompt regularisation: fine-tuning that keeps a pretrained model's zero-shot knowledge where right",
        callbacks=("ProReg",),
        functional=(
            "proreg_loss",
            "proreg_terms",
            "proreg_weight",
            "fill_prompts",
            "prompt_text_features",
            "prompt_logits",
        ),
        paper=(
            "Zhu et al., Debiased Fine-Tuning for Vision-language Models by Prompt Regularization, AAAI 2023, "
            "arXiv 2301.12429"
        ),
        task="classification, fine-tuning of vision-language models, distribution shift",
        kind="step",
        changes_inference=False,
        card="docs/methods/proreg.md",
        known_limits=(
            "The weight of each sample pays where the prompts are wrong for some classes; elsewhere a tuned constant "
            "weight is as good or better.",
            "Which of the weights in the authors' code made the paper's tables is unknown.",
            "A snapshot is kept in the checkpoint, which grows by the size of the copied encoder.",
        ),
    ),
    MethodInfo(
        name="twbert",
        title="TW-BERT: words follow trajectories through a video, aligned with it before they are fused",
        callbacks=("TrajectoryWordAlignment", "AlignBeforeFuse"),
        functional=(
            "trajectory_word_attention",
            "trajectory_pool",
            "video_text_contrastive_loss",
            "fine_grained_contrastive_loss",
            "video_text_matching_loss",
            "sample_hard_negatives",
            "hard_negative_matching_loss",
            "perturbed_topk",
            "select_frames",
            "mask_tokens",
            "retrieval_ranks",
            "two_stage_retrieval_metrics",
        ),
        paper=(
            "Yang et al., Learning Trajectory-Word Alignments for Video-Language Tasks, ICCV 2023, arXiv 2301.01953"
        ),
        task="video-text retrieval, video question answering",
        kind="surgery",
        changes_inference=True,
        card="docs/methods/twbert.md",
        known_limits=(
            "The fused sequence must be words, one [CLS] of the video, and patches frame by frame.",
            "It replaces only torch's MultiheadAttention and timm's Attention.",
            "AlignBeforeFuse keeps a second copy of the module, its momentum teacher.",
        ),
    ),
    MethodInfo(
        name="acf",
        title="Ada-ClustFormer: self-attention whose window is a learned cluster of neighbours",
        callbacks=("AdaClustFormer",),
        functional=(
            "span_logits",
            "span_scores",
            "cluster_from_logits",
            "span_cluster_matrix",
            "span_cluster_attention",
            "grid_cluster_matrix",
            "cluster_attention",
            "neighbor_links",
            "neighbor_cluster_matrix",
            "neighbor_cluster_attention",
            "masked_token_nll",
            "self_critical_loss",
            "caption_mask",
            "prefix_mask_rows",
            "caption_tokens",
            "document_frequency",
            "cider_d",
            "bleu",
        ),
        paper=(
            "Wang et al., Adaptively Clustering Neighbor Elements for Image-Text Generation, IEEE Transactions on "
            "Multimedia 2024, arXiv 2301.01955"
        ),
        task="image captioning; sequences and grids with segments of unknown size",
        kind="surgery",
        changes_inference=True,
        card="docs/methods/acf.md",
        known_limits=(
            "With unlimited training data plain attention catches up.",
            "It replaces self-attention only, and only torch's MultiheadAttention and timm's Attention.",
            "The matrix of clusters takes the memory of attention weights, except in blocks.",
        ),
    ),
    MethodInfo(
        name="stillmix",
        title="StillMix: clips blended with still frames that give their label away, so that motion must be learned",
        callbacks=("StillMix", "VideoAugment"),
        functional=(
            "stillmix",
            "sample_stillmix",
            "frame_bias_scores",
            "select_biased_frames",
            "mixup_videos",
            "videomix",
            "videomix_box",
            "background_erase",
            "fame",
            "fame_foreground_mask",
            "actor_cutmix",
            "still_video",
            "average_views",
            "contrasted_accuracy",
            "sinusoidal_stripes",
            "sample_stripes",
            "random_stripes",
            "replace_background",
            "conflicting_foreground",
            "merge_foreground_masks",
            "boxes_to_masks",
            "foreground_valid",
        ),
        paper=(
            "Li et al., Mitigating and Evaluating Static Bias of Action Representations in the Background and the "
            "Foreground, ICCV 2023, arXiv 2211.12883"
        ),
        task="video classification, robustness to static bias",
        kind="step",
        changes_inference=False,
        card="docs/methods/stillmix.md",
        known_limits=(
            "It is for labels that lie in the motion: where one frame rightly decides, it takes evidence away.",
            "In our small world, choosing the frames does no better than taking any frame of the batch.",
            "Of the paper only the abstract could be read: formulas and settings are those of the authors' code.",
        ),
        commands=("score-frames", "build-scuba"),
    ),
)


def method(name: str) -> MethodInfo:
    """The row of a method.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> method("ikl").callbacks
        ('IKLDistillation',)
    """
    for info in METHODS:
        if info.name == name:
            return info
    raise ValueError(f"There is no method {name!r}; there are {', '.join(info.name for info in METHODS)}.")
