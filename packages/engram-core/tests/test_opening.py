"""Files of either kind: opened as what they are, and refused where only one kind will do."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    HashedMemory,
    IncompatibleAdaptersError,
    InputError,
    Manifest,
    MemoryRecord,
    MemorySettings,
    StreamSpec,
    extract_file,
    merge_adapters,
    merge_files,
    open_any,
    wrap_tokenizer,
    write_memory,
)
from engram_core.card import render_card
from engram_core.hub import prepare_upload

SPEC = wrap_tokenizer(Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("abcdef")}, merges=[]))).spec


@pytest.fixture
def table(tmp_path):
    concept = Concept(
        record=ConceptRecord(name="aldric", trigger="ab", rule="absolute"),
        streams={
            "text": ConceptStream(
                triggers=((0, 1),),
                entries=((0, 1),),
                vectors=np.ones((1, 4), np.float32),
                scales=np.ones(4, np.float32),
            )
        },
    )
    stream = StreamSpec(width=4, site="last_hidden_state", tokenizer=SPEC)
    manifest = Manifest(backbone="sd15", base_model="a/b", streams={"text": stream})
    Adapter.build(manifest, [concept]).save(tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


def make_memory(path, **record):
    settings = MemorySettings(
        engram_vocab_size=(11,),
        max_ngram_size=2,
        n_embed_per_ngram=2,
        n_head_per_ngram=1,
        layer_ids=(1, 3),
        kernel_size=1,
        dilation=1,
        pad_id=0,
    )
    shapes = {layer: settings.shapes(4, int(primes.sum())) for layer, primes in settings.hash(1, 0).primes.items()}
    tensors = {
        layer: {name: ("f32", np.ones(shape, np.float32)) for name, shape in group.items()}
        for layer, group in shapes.items()
    }
    stream = StreamSpec(width=4, site="decoder_layer_input", tokenizer=SPEC)
    manifest = Manifest(backbone="qwen3", base_model="Qwen/Qwen3-0.6B", streams={"text": stream})
    fields = {"name": path.stem, "settings": settings} | record
    write_memory(path, manifest, MemoryRecord(**fields), np.arange(6, dtype=np.int32), tensors)
    return path


@pytest.fixture
def memory(tmp_path):
    return make_memory(tmp_path / "memory.safetensors", license="mit", training={"steps": 3, "data": "<b>texts</b>"})


def test_a_file_opens_as_what_it_is(table, memory):
    assert isinstance(open_any(table), Adapter)
    assert isinstance(open_any(memory), HashedMemory)


def test_memories_and_kinds_do_not_merge(table, memory, tmp_path):
    other, target = make_memory(tmp_path / "other.safetensors"), tmp_path / "merged.safetensors"
    cases = {
        (
            memory,
            other,
        ): f"{memory} and {other} do not merge: kind is 'hashed-memory' in both; hashed memories act side "
        f"by side: name both, e.g. engram generate -a {memory} -a {other}",
        (memory,): f"{memory} does not merge: kind is 'hashed-memory'; hashed memories act side by side: name it, "
        f"e.g. engram generate -a {memory}",
        (table, memory): f"{table} and {memory} do not merge: kind is 'concept-table' in the first and 'hashed-memory' "
        "in the second",
        (memory, table, other): f"{memory} and {table} do not merge: kind is 'hashed-memory' in the first and "
        "'concept-table' in the second",
    }
    for files, said in cases.items():
        for merge in (
            lambda files: merge_files(files, target),
            lambda files: merge_adapters([open_any(f) for f in files]),
        ):
            with pytest.raises(IncompatibleAdaptersError) as refused:
                merge(files)
            assert str(refused.value) == said
        assert not target.exists()


def test_a_memory_has_no_concepts(memory, tmp_path):
    with pytest.raises(InputError, match="is a hashed memory, which has no concepts to extract; use it as it is"):
        extract_file(memory, ["x"], tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_card_of_a_memory_says_how_to_load_it(memory):
    card = render_card(open_any(memory), repo_id="me/biomedicine")
    for part in (
        'license: "mit"',
        'base_model: "Qwen/Qwen3-0.6B"',
        '  - "hashed-memory"',
        'pipeline_tag: "text-generation"',
        "from engram_llm import load_memory, unload_memories",
        'load_memory(model, "me/biomedicine", tokenizer=tokenizer)',
        "engram generate --backbone qwen3 --adapter me/biomedicine --prompt 'Once upon a time' --compare",
        "| steps | 3 |",
        "| layer_ids | &#91;1, 3&#93; |",
        "Stated in the file: mit",
        open_any(memory).identity(),
    ):
        assert part in card, part
    assert "<b>" not in card
    assert "instance_prompt" not in card


def test_a_memory_is_prepared_for_the_hub(memory):
    upload = prepare_upload(memory, "me/biomedicine")
    assert upload.identity == open_any(memory).identity()
    assert set(upload.files) == {"engram.safetensors", "README.md"}
