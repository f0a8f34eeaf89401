"""Prompts as token ids, and adapters with many concepts whose triggers stand in them.

Shapes: C concepts, L positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from checkpoints import T5, TEXT, TEXT_G
from synthetic import CLIP, TRIGGER, VOCABULARY, write_table
from torch import Tensor

from engram_core import Adapter, TokenizerSpec, open_adapter
from engram_core.huggingface import TokenizerSource, load_tokenizer
from engram_vision.families import LAST, PENULTIMATE
from engram_vision.shipped import tiny_folder

STREAM = "clip_l"
SHOWN = 8  # concepts whose triggers occur in prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """The words of a text encoder.

    Attributes:
        tokenizer: whose ids they are.
        words: ids of words that are one token, by their texts where those matter.
        start, end: ids that begin a text, and that end and pad it.
        length: L.
        width: channels of the encoder's states.
        rule: of the concepts.
        site: which states they edit.
    """

    tokenizer: TokenizerSpec
    words: dict[str, int]
    start: int
    end: int
    length: int
    width: int
    rule: str = "absolute"
    site: str = LAST

    @classmethod
    def clip(cls) -> Vocabulary:
        """Return CLIP-L's; any id may be a word, because nothing is tokenised."""
        words = {str(number): number for number in range(320, VOCABULARY - 2)}
        return cls(tokenizer=CLIP, words=words, start=49406, end=49407, length=77, width=TEXT["hidden_size"])

    @classmethod
    def clip_g(cls) -> Vocabulary:
        """Return CLIP-G's, under Stable Diffusion 3.5's default rule."""
        width = TEXT_G["hidden_size"]
        return replace(cls.clip(), width=width, rule="relative", site=PENULTIMATE)

    @classmethod
    def t5(cls) -> Vocabulary:
        """Return T5-XXL's, likewise; its texts begin with no special token, so any other stands there."""
        words = {str(number): number for number in range(320, T5["vocab_size"])}
        return cls(tokenizer=CLIP, words=words, start=3, end=0, length=256, width=T5["d_model"], rule="relative")

    @classmethod
    def tiny(cls) -> Vocabulary:
        """Return the shipped checkpoint's."""
        folder = tiny_folder("sd15")
        config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer", max_length=None))
        tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        candidates = [token.removesuffix("</w>") for token in tokens if token.endswith("</w>")]
        words = {word: tokens[word + "</w>"] for word in candidates if len(word) > 2 and word.isalpha()}
        return cls(
            tokenizer=tokenizer.spec,
            words={word: number for word, number in words.items() if list(tokenizer.encode(word)) == [number]},
            start=config["bos_token_id"],
            end=config["eos_token_id"],
            length=config["max_position_embeddings"],
            width=config["hidden_size"],
        )

    def draw_triggers(self, n_concepts: int) -> npt.NDArray[np.int32]:
        """Return int32 [C, 7]: triggers of words, none twice in one trigger."""
        random, words = np.random.default_rng(0), np.array(list(self.words.values()), np.int32)
        return np.stack([words[random.choice(len(words), TRIGGER, replace=False)] for _ in range(n_concepts)])

    def draw_batch(self, seed: int, trigger: npt.NDArray[np.int32] | None = None) -> Tensor:
        """Return int64 [2, L]: two prompts of some words, in the first of them a trigger if one is given."""
        random, words = np.random.default_rng(seed), np.array(list(self.words.values()))
        ids = np.full((2, self.length), self.end)
        ids[:, 0] = self.start
        for row in ids:
            n_words = int(random.integers(TRIGGER + 3, self.length // 2))
            row[1 : 1 + n_words] = random.choice(words, n_words)
        if trigger is not None:
            ids[0, 3 : 3 + TRIGGER] = trigger
        return torch.from_numpy(ids)

    def write_adapter(self, path: Path, n_concepts: int) -> Adapter:
        """Write an adapter with many concepts and open it."""
        with path.open("wb", buffering=0) as target:
            write_table(
                target,
                n_concepts,
                {STREAM: self.width},
                rule=self.rule,
                triggers=self.draw_triggers(n_concepts),
                tokenizer=self.tokenizer,
                site=self.site,
            )
        return open_adapter(path)
