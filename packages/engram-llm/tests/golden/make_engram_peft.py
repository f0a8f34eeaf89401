"""Writes engram_peft.json: what engram-peft's own layers add to hidden states, for weights that follow from a seed.

Needs Python 3.12 and the package engram-peft, so it is run by hand in an environment of its own:

    python packages/engram-llm/tests/golden/make_engram_peft.py
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from engram_peft.compression import CompressedTokenizer  # noqa: E402
from engram_peft.config import EngramConfig  # noqa: E402
from engram_peft.hashing import NgramHashMapping  # noqa: E402
from engram_peft.layer import EngramLayer  # noqa: E402
from engram_peft.utils import safe_load_file  # noqa: E402
from llm_foreign import WORDS, make_word_tokenizer, write_peft  # noqa: E402

WIDTH, LENGTH = 8, 11
COMMON = {"hidden_size": WIDTH, "enable_telemetry": False, "use_sparse_embeddings": False}
CONFIGS = {
    "compressed": {
        "engram_vocab_size_per_ngram": [46, 31],
        "ngram_sizes": [2, 3],
        "n_head_per_ngram": 2,
        "embedding_dim": 16,
        "enable_tokenizer_compression": True,
        "target_layers": [3, 1],
        "hc_mult": 1,
        "conv_kernel_size": 4,
    },
    "compressed, added tokens": {
        "engram_vocab_size_per_ngram": [64],
        "ngram_sizes": [2],
        "n_head_per_ngram": 3,
        "embedding_dim": 12,
        "enable_tokenizer_compression": True,
        "target_layers": [2],
        "hc_mult": 1,
        "conv_kernel_size": 2,
        "pad_id": len(WORDS),
    },
    "plain, branches": {
        "engram_vocab_size_per_ngram": [60, 60, 41],
        "ngram_sizes": [2, 3, 4],
        "n_head_per_ngram": 3,
        "embedding_dim": 18,
        "enable_tokenizer_compression": False,
        "compressed_vocab_size": len(WORDS),
        "target_layers": [0, 2],
        "hc_mult": 2,
        "conv_kernel_size": 3,
        "conv_dilation": 2,
        "seed": 5,
    },
}


def main() -> None:
    cases = {}
    for name, fields in CONFIGS.items():
        n_added = 3 * ("added" in name)
        compressor = CompressedTokenizer(tokenizer=make_word_tokenizer(n_added))
        config = EngramConfig(**COMMON | {"pad_id": 0} | fields)
        compressed = config.enable_tokenizer_compression
        if compressed:
            config.compressed_vocab_size = len(compressor)
        saved = {
            field: getattr(config, field) for field in [*COMMON, *fields, "seed", "pad_id", "compressed_vocab_size"]
        }
        saved |= {"model_type": "engram", "conv_dilation": config.conv_dilation, "engine": config.engine}
        mapping = NgramHashMapping(
            engram_vocab_size_per_ngram=config.engram_vocab_size_per_ngram,
            ngram_sizes=config.ngram_sizes,
            n_head_per_ngram=config.n_head_per_ngram,
            layer_ids=config.target_layers,
            compressed_vocab_size=config.compressed_vocab_size,
            pad_id=compressor.map_id(config.pad_id) if compressed else config.pad_id,
            seed=config.seed,
        )
        generator = np.random.default_rng(7)
        ids = generator.integers(0, len(WORDS), (1, LENGTH))
        ids[0, 1 : 1 + n_added] = len(WORDS) + np.arange(n_added)[::-1]
        hidden = generator.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
        rows = mapping.hash(compressor.compress(ids) if compressed else ids)
        with tempfile.TemporaryDirectory() as folder:
            write_peft(Path(folder), saved)
            weights = safe_load_file(str(Path(folder) / "engram_adapters.safetensors"))
        residuals = {}
        for layer in config.target_layers:
            primes = [prime for part in mapping.prime_tables[layer] for prime in part]
            module = EngramLayer(config=config, layer_id=layer, primes=primes, compressor=compressor)
            own = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{layer}.")}
            module.load_state_dict(own, strict=True)
            states = torch.from_numpy(hidden)
            with torch.no_grad():
                out = module(hidden_states=states, engram_hash_indices=torch.from_numpy(rows[layer]))
            residuals[str(layer)] = np.round((out - states)[0].double().numpy(), 7).tolist()
        cases[name] = {
            "added": n_added,
            "config": saved,
            "ids": ids.tolist(),
            "hidden": hidden.tolist(),
            "residuals": residuals,
        }
    versions = {name: importlib.metadata.version(name) for name in ("engram-peft", "torch", "transformers")}
    text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
    (HERE / "engram_peft.json").write_text(text + "\n")
    print(f"wrote {len(text)} bytes")  # noqa: T201


main()
