"""Tokenizers from model folders and hub repositories, without PyTorch or transformers; needs the extra `huggingface`.

What several backbones share. Reads the layouts of diffusers (`tokenizer/`, `tokenizer_2/`, ...) and
transformers (`tokenizer.json` at the top); CLIP folders often hold `vocab.json` and `merges.txt` alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_core.errors import InputError, one_line
from engram_core.tokenizer import StreamTokenizer, wrap_tokenizer

__all__ = ["TokenizerSource", "load_tokenizer", "load_tokenizers", "read_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
# How CLIP cuts text into words before byte-pair encoding (openai/CLIP, simple_tokenizer.py).
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """Where a stream's tokenizer lies in a model, and how much the encoder reads.

    Attributes:
        subfolder: folder within the model; empty for the top.
        max_length: ids the encoder reads, special tokens included; None when unlimited. A tokenizer whose own
            configuration says less (`model_max_length`) counts.
    """

    subfolder: str
    max_length: int | None


def load_tokenizers(
    model: str, sources: Mapping[str, TokenizerSource], streams: Collection[str] | None = None
) -> dict[str, StreamTokenizer]:
    """Return the tokenizers of a model by stream; reads no weights.

    Args:
        model: a local folder or a hub id.
        sources: where each stream's tokenizer lies.
        streams: load only these; None means all.

    Raises:
        InputError: a stream is unknown, or its tokenizer is missing or malformed.
    """
    wanted = list(sources) if streams is None else list(streams)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InputError(f"there is no stream {unknown[0]!r}; there are {', '.join(sources)}")
    return {name: load_tokenizer(model, sources[name]) for name in wanted}


def load_tokenizer(model: str, source: TokenizerSource) -> StreamTokenizer:
    """Return one tokenizer of a model.

    Args:
        model: a local folder, or a hub id (downloads the tokenizer's files when they are not cached).
        source: where in the model.

    Raises:
        InputError: it is missing or malformed.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, source.subfolder)
    place = folder / source.subfolder
    config = _read_config(place)
    own, limit = config.get("model_max_length"), source.max_length
    if limit is not None and isinstance(own, int) and 0 < own < limit:
        limit = own
    name = config.get("tokenizer_class")
    class_name = name if isinstance(name, str) and name.isidentifier() else None
    return wrap_tokenizer(read_tokenizer(place), max_length=limit, class_name=class_name)


def read_tokenizer(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` in a file (`tokenizer.json`) or folder.

    Raises:
        InputError: there is none, or it is malformed, or the `tokenizers` package is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "reading tokenizers needs the package 'tokenizers'; install engram-core with its extra 'huggingface'"
        ) from None
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _read_clip(path)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise InputError(f"{file}: is not a tokenizer: {one_line(error)}") from None
    raise InputError(f"{path}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")


def _read_config(folder: Path) -> dict[str, Any]:
    """Return what the folder says of its tokenizer; nothing when it says nothing that can be read."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _read_clip(folder: Path) -> Any:
    """Build CLIP's tokenizer from its vocabulary and merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    begin, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if begin not in vocabulary or end not in vocabulary:
        raise InputError(f"{folder}: vocab.json is not CLIP's ({begin} is missing); a tokenizer.json is needed")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=end,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(begin, special=True), AddedToken(end, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (begin, vocabulary[begin]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _download(model: str, subfolder: str) -> Path:
    """Return the local copy of a hub repository's tokenizer files."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"model {model!r} is not a local folder, and 'huggingface_hub' is not installed") from None
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in _FILES]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - any failure of a download means the same to the user
        raise InputError(
            f"model {model!r} is not a local folder, not in the hub's cache, and cannot be downloaded "
            f"({type(error).__name__}); pass --model with a folder that holds its tokenizers"
        ) from None
