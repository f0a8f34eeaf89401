"""Matching, residuals and training with PyTorch; needs the extra `torch`, and no other module imports it."""

from engram_core.torch.residual import Delta, Residual, add_delta, entry_terms, match_tensor, mean_norm, sum_terms
from engram_core.torch.trainable import TrainableConcept, TrainableStream

__all__ = [
    "Delta",
    "Residual",
    "TrainableConcept",
    "TrainableStream",
    "add_delta",
    "entry_terms",
    "match_tensor",
    "mean_norm",
    "sum_terms",
]
