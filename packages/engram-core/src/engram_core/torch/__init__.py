"""Matching, residuals and training with PyTorch; needs the extra `torch`, and no other module imports it."""

from engram_core.torch.residual import Residual, add_terms, entry_terms, match_tensor, mean_norm
from engram_core.torch.trainable import TrainableConcept, TrainableStream

__all__ = [
    "Residual",
    "TrainableConcept",
    "TrainableStream",
    "add_terms",
    "entry_terms",
    "match_tensor",
    "mean_norm",
]
