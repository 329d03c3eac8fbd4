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
