"""Tables on the host give, bit for bit, what tables beside the model's weights give."""

import copy
import sys
import threading
import time

import numpy as np
import pytest
import torch
from llm_builders import (
    SETTINGS,
    full,
    in_chunks,
    make_file,
    make_ids,
    make_lookup,
    make_manifest,
    make_memory,
    make_model,
)

from engram_core import HashedMemory, MemoryRecord, open_memory, write_memory
from engram_core.memory import TABLE
from engram_core.storage import decode_vectors
from engram_llm import tables
from engram_llm.loading import list_memories, load_memory, unload_memories
from engram_llm.memory import Memory, stored_tensors
from engram_llm.tables import HostTable, as_stored, copy_tensor

IDS = make_ids(2, 30)
CPU = torch.device("cpu")
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=["a file", "bytes"])
def source(request, tmp_path):
    memory = make_file(SETTINGS["long n-grams, two branches"])
    if request.param == "bytes":
        return memory
    memory.save(tmp_path / "toy.safetensors")
    return open_memory(tmp_path / "toy.safetensors")


def logits_of(source, dtype=torch.float32, **options):
    model = make_model("llama").to(dtype)
    load_memory(model, source, **options)
    return full(model, IDS), in_chunks(model, IDS, [7, 1, 22])


@pytest.mark.parametrize("fewest", [0, 10**9], ids=["by a thread", "at once"])
def test_logits_are_the_same_bit_for_bit(source, monkeypatch, fewest):
    monkeypatch.setattr(tables, "_FEWEST", fewest)
    for resident, host in zip(logits_of(source), logits_of(source, host_tables=True), strict=True):
        assert torch.equal(resident, host)


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_type_of_table_in_every_type_of_model(stored, wanted):
    source = make_file(dtype=stored)
    for resident, host in zip(logits_of(source, wanted), logits_of(source, wanted, host_tables=True), strict=True):
        assert resident.dtype == wanted
        assert torch.equal(resident, host)


def test_threads_read_at_once(source, monkeypatch):
    monkeypatch.setattr(tables, "_FEWEST", 0)
    model = make_model("llama")
    load_memory(model, source, host_tables=True)
    texts = [make_ids(1, length, seed=length) for length in (17, 26, 30)]
    expected, found = [full(model, text) for text in texts], [[] for _ in texts]

    def work(number):
        for _ in range(10):
            found[number].append(full(model, texts[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, alone in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(result, alone) for result in results)


def test_a_table_gives_its_rows():
    values = torch.randn(50, 3)
    table = HostTable(as_stored(values), CPU, torch.float32)
    rows = torch.tensor([[[4, 49], [0, 4]]])
    assert torch.equal(table(rows), values[rows].flatten(-2))
    assert torch.equal(table(table.fetch(rows)), values[rows].flatten(-2))
    assert table(rows).shape == (1, 2, 6)
    assert not list(table.parameters()) + list(table.buffers())
    assert copy.deepcopy(table) is table
    many = torch.randint(0, 50, (2, 700, 2))
    assert torch.equal(table(table.fetch(many)), values[many].flatten(-2))


@pytest.mark.parametrize("fewest", [0, 10**9])
def test_an_error_of_the_reader_is_heard(monkeypatch, fewest):
    monkeypatch.setattr(tables, "_FEWEST", fewest)
    table = HostTable(as_stored(torch.randn(5, 3)), CPU, torch.float32)
    with pytest.raises(IndexError):
        table(table.fetch(torch.tensor([[5]])))


@pytest.mark.parametrize("dtype", TYPES.values())
def test_tensors_are_stored_and_copied_exactly(dtype):
    values = torch.randn(4, 6).to(dtype).T
    kind, stored = as_stored(values)
    assert TYPES[kind] == dtype
    assert torch.equal(torch.from_numpy(decode_vectors(stored, kind)), values.float())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_memory_read_and_stored_is_the_same(dtype):
    source = make_file(dtype=dtype)
    memory = Memory.read(source, dtype=TYPES[dtype])
    again = HashedMemory.build(source.manifest, source.record, source.lookup, stored_tensors(memory))
    assert again.to_bytes() == source.to_bytes()
    wide = stored_tensors(Memory.read(source), "f32")
    assert np.array_equal(decode_vectors(source.tensor(1, TABLE)[1], dtype), wide[1][TABLE][1])
    assert copy_tensor(source, 1, TABLE).dtype == TYPES[dtype]


def test_a_read_memory_is_frozen_and_the_files_bytes_stay(source):
    before = source.identity()
    memory = Memory.read(source)
    assert not any(weight.requires_grad for weight in memory.parameters())
    assert not memory.training
    with torch.no_grad():
        for weight in memory.parameters():
            weight.zero_()
    assert HashedMemory.from_bytes(source.to_bytes()).identity() == before
    source.check()


def test_tables_on_the_host_are_not_read_on_loading(tmp_path):
    """What stands in a table is found where it is read: with the other weights, or not before it is used."""
    shape = SETTINGS["published"]
    tensors = stored_tensors(make_memory(shape))
    path = tmp_path / "toy.safetensors"
    write_memory(path, make_manifest(), MemoryRecord(name="toy", settings=shape), make_lookup(), tensors)
    source = open_memory(path)
    dtype, (rows, width), start = source.place(1, TABLE)
    with path.open("r+b") as file:  # what the mapping holds changes with the file
        file.seek(start)
        file.write(np.full((rows, width), np.nan, np.float32).tobytes())
    model = make_model("llama")
    load_memory(model, source, host_tables=True)
    assert full(model, IDS).isnan().any()
    unload_memories(model)
    with pytest.raises(ValueError, match=f"layers.1.{TABLE}: holds NaN or infinity"):
        load_memory(model, source)
    assert dtype == "f32"


def test_a_file_that_is_replaced_stays_what_it_was(tmp_path):
    path = tmp_path / "toy.safetensors"
    make_file().save(path)
    source, expected = open_memory(path), logits_of(make_file())
    make_file(seed=1).save(path, overwrite=True)
    for found, known in zip(logits_of(source, host_tables=True), expected, strict=True):
        assert torch.equal(found, known)


@pytest.mark.skipif(sys.platform == "win32", reason="needs files with holes")
def test_a_table_larger_than_memory_can_be_used(tmp_path):
    """Mapping it must not count as memory that could be written to."""
    path = tmp_path / "huge"
    rows = 1 << 34
    with path.open("wb") as file:
        file.truncate(rows * 32)  # half a terabyte of nothing
    stored = np.memmap(path, np.float32, "r", shape=(rows, 8))
    table = HostTable(("f32", stored), CPU, torch.float32)
    begin = time.perf_counter()
    assert not table(torch.tensor([[0, rows - 1]])).any()
    assert time.perf_counter() - begin < 5


def test_host_tables_are_no_part_of_what_the_memory_saves(source):
    model = make_model()
    load_memory(model, source, host_tables=True)
    memory = list_memories(model)[0].memory
    assert not any("embedding" in name for name in memory.state_dict())
    memory.to(torch.bfloat16)
    assert memory.layers["0"].multi_head_embedding(torch.tensor([[0]])).dtype == torch.float32
