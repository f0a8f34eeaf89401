"""How many tokens a second become table rows: on the model's device, and the same in NumPy as other tools do it.

Run through `run.py`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from measure import Outcome, Spread, Table
from paired import time_call
from sizes import SHAPES, make_memory, make_model

from engram_core import NgramHash
from engram_llm.memory import Memory
from engram_llm.reading import Neighbours, Positions

LENGTHS = (1, 1_024, 65_536)


@torch.no_grad()
def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    model = make_model(small=False, dtype=torch.float32, device="meta")  # no weight of it is needed
    rows, figures = [], {"threads": torch.get_num_threads()}
    for name, shape in SHAPES.items():
        sizes = [min(size, 2000) for size in shape["engram_vocab_size"]]
        memory = make_memory(shape, model, device=device, engram_vocab_size=sizes)
        ngrams = memory.settings.hash(int(memory.lookup.max()) + 1, memory.compressed_pad_id)
        for length in LENGTHS:
            ids = torch.randint(0, len(memory.lookup), (1, length), generator=torch.Generator().manual_seed(0))
            in_torch = partial(_hash, memory, ids.to(device))
            in_numpy = partial(_hash_in_numpy, ngrams, memory.lookup.cpu().numpy(), ids.numpy())
            ours, numpy = [], []
            for _ in range(5 if quick else 50):
                ours.append(time_call(in_torch, device))
                numpy.append(time_call(in_numpy, device))
            mine, other = Spread.of(ours), Spread.of(numpy)
            rate = f"{length * len(ngrams.layer_ids) / mine.median:,.0f}"
            rows.append((name, f"{length:,}", rate, mine.show(), other.show(), f"{other.median / mine.median:.2f}"))
            figures[f"{name}, {length}"] = {"ours_s": mine.median, "numpy_s": other.median}
    columns = ("memory", "tokens", "tokens and layers a second", "ours", "NumPy", "ratio")
    table = Table(title="From token ids to table rows, all layers", columns=columns, rows=rows)
    return Outcome(tables=[table], figures=figures)


def _hash(memory: Memory, ids: torch.Tensor) -> None:
    starts = torch.zeros_like(ids, dtype=torch.bool)
    positions = Positions(ids=memory.compress(ids), starts=starts, plain=True)
    neighbours = Neighbours(positions, ids.shape[1], memory.reach)
    memory.rows(positions, neighbours, ids.shape[1])


def _hash_in_numpy(ngrams: NgramHash, lookup: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> None:
    compressed = lookup[ids]
    for layer in ngrams.layer_ids:
        ngrams.addresses(compressed, layer)
