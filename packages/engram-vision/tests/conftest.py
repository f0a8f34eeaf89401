"""Model folders: with real tokenizers (CLIP's own vocabulary, a small byte-level BPE in place of T5's), and a whole
Stable Diffusion 1.x with random weights, small enough to train in a second.

Makes the shared modules beside this file importable: with `--import-mode=importlib` pytest adds nothing to `sys.path`.
"""

import gzip
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def clip_files():
    """Return CLIP's vocabulary and merges, from the file that open_clip ships."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip_torch, which ships CLIP's vocabulary, is not installed")
    archive = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(archive.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def byte_letters():
    """Return the printable letter that stands for each byte, in the order of CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def write_clip(folder, clip_files):
    vocabulary, merges = clip_files
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}), encoding="utf-8")


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory, clip_files):
    folder = tmp_path_factory.mktemp("sd15")
    write_clip(folder / "tokenizer", clip_files)
    return folder


@pytest.fixture(scope="session")
def sd35_folder(tmp_path_factory, clip_files):
    folder = tmp_path_factory.mktemp("sd35")
    write_clip(folder / "tokenizer", clip_files)
    write_clip(folder / "tokenizer_2", clip_files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a photo of a pilot in the snow"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    (folder / "tokenizer_3").mkdir()
    tokenizer.save(str(folder / "tokenizer_3" / "tokenizer.json"))
    return folder


# Whole models; the imports are slow, and tests of other things do without.


@pytest.fixture(scope="session")
def one_thread():
    """Compute on one thread, so that sums are made in one order and a run can be compared bit for bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory, one_thread):
    """Return a folder with a small Stable Diffusion 1.x that predicts the noise."""
    from vision_builders import build_model

    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def v_model(tmp_path_factory, one_thread):
    """Return a folder with one that predicts v, and whose noise schedule ends in pure noise."""
    from vision_builders import build_model

    folder = tmp_path_factory.mktemp("v_model")
    build_model(prediction="v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(model):
    """Return a pipeline into which nothing is ever loaded."""
    from engram_vision.families import SD15
    from engram_vision.models import load_pipeline

    return load_pipeline(SD15, str(model))


@pytest.fixture
def pipeline(base):
    """Return an equal pipeline for one test."""
    from vision_builders import copy_of

    return copy_of(base)


# Models of every family, by name


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, one_thread):
    """Return a function from a family's name to a folder with a small model of it."""
    from vision_families import build_family

    @cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        build_family(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def base_of(one_thread):
    """Return a function from a family's name to a pipeline into which nothing is ever loaded."""
    from vision_families import build_family

    return cache(build_family)
