"""Vectors between memory (float32) and file (f32, f16, bf16). NumPy has no bfloat16: its bits are uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

STORED_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
}
"""Vector type of a record to the NumPy type that holds its bits."""

CONTAINER_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Vector type of a record to its name in a safetensors header."""


def encode_vectors(vectors: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Return float32 vectors as stored bits, rounded to nearest even.

    Args:
        vectors: float32, any shape.
        dtype: `f32`, `f16` or `bf16`.

    Returns:
        A C-contiguous array of the same shape: float32, float16, or uint16 holding bfloat16 bits.
    """
    source: npt.NDArray[np.float32] = np.ascontiguousarray(vectors, dtype="<f4")
    if dtype == "f32":
        return source
    if dtype == "f16":
        with np.errstate(over="ignore"):  # overflow becomes infinity, which the writer refuses by name
            half: npt.NDArray[np.float16] = source.astype("<f2")
            return half
    bits = source.view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded[np.isnan(source)] = 0x7FC0 << 16  # the carry would turn some of them into numbers
    upper: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype("<u2")
    return upper


def decode_vectors(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return stored bits as float32, exactly."""
    if dtype == "bf16":
        stored = (stored.astype("<u4") << np.uint32(16)).view("<f4")
    decoded: npt.NDArray[np.float32] = stored.astype("<f4", copy=False)
    return decoded


def are_finite(stored: npt.NDArray[Any], dtype: str) -> bool:
    """Tell whether stored bits hold neither NaN nor infinity."""
    if dtype == "bf16":
        return not bool(((stored & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
    return bool(np.isfinite(stored).all())


def widest(dtypes: set[str]) -> str:
    """Return the type that holds all of these exactly: f32 unless they agree."""
    return next(iter(dtypes)) if len(dtypes) == 1 else "f32"
