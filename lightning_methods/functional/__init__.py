"""The methods' mathematics as pure functions on tensors; needs torch only."""

from lightning_methods.functional.class_probs import accumulate_class_probs, normalize_class_probs
from lightning_methods.functional.ikl import (
    IKLTerms,
    dkl_loss,
    gkl_loss,
    ikl_loss,
    ikl_terms,
    pairwise_wmse,
    soft_target_cross_entropy,
)

__all__ = [
    "IKLTerms",
    "accumulate_class_probs",
    "dkl_loss",
    "gkl_loss",
    "ikl_loss",
    "ikl_terms",
    "normalize_class_probs",
    "pairwise_wmse",
    "soft_target_cross_entropy",
]
