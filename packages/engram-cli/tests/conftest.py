"""Adapters to work on, and the command as a user runs it: in a process of its own, or quicker in this one."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    MemoryRecord,
    MemorySettings,
    StreamSpec,
    build_registry,
    wrap_tokenizer,
    write_memory,
)

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode adds nothing
from cli_toys import Mute, Toy

WIDTH = 8
TEXTS = ["a photo of a pilot in the snow, by the sea", "the keeper of a lamp", "Aldric and Brindle"]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@dataclass(frozen=True)
class World:
    """A folder with a tokenizer and a way to make adapters for it."""

    folder: Path

    def build(
        self,
        name,
        trigger,
        *,
        file=None,
        seed=0,
        width=WIDTH,
        streams=("text",),
        sites=None,
        backbone="example",
        base_model="none",
        **record,
    ):
        tokenizer = wrap_tokenizer(Tokenizer.from_file(str(self.folder / "tokenizer.json")), max_length=24)
        registry = build_registry(trigger, tokenizer, contexts=record.pop("contexts", [("", ""), ("a photo of ", "")]))
        noise = np.random.default_rng(seed)
        spec = StreamSpec(width=width, site="last_hidden_state", tokenizer=tokenizer.spec, sites=sites)
        slots = noise.normal(size=(registry.n_slots, *spec.shape)).astype(np.float32)
        memory = ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=slots[list(registry.slots)],
            scales=noise.normal(size=spec.shape).astype(np.float32),
        )
        manifest = Manifest(backbone=backbone, base_model=base_model, streams=dict.fromkeys(streams, spec))
        concept = Concept(
            record=ConceptRecord(name=name, trigger=trigger, rule="absolute", **record),
            streams=dict.fromkeys(streams, memory),
        )
        path = self.folder / (file or f"{name}.safetensors")
        Adapter.build(manifest, [concept]).save(path)
        return path

    def build_memory(self, name, *, width=4, backbone="example", base_model="none", training=None, **record):
        """Write a hashed memory of noise."""
        tokenizer = wrap_tokenizer(Tokenizer.from_file(str(self.folder / "tokenizer.json")))
        settings = MemorySettings(
            engram_vocab_size=(11, 7),
            max_ngram_size=3,
            n_embed_per_ngram=4,
            n_head_per_ngram=2,
            layer_ids=(1, 3),
            kernel_size=2,
            dilation=3,
            pad_id=0,
        )
        noise = np.random.default_rng(0)
        primes = settings.hash(1, 0).primes
        tensors = {
            layer: {
                part: ("f32", noise.normal(size=shape).astype(np.float32))
                for part, shape in settings.shapes(width, int(primes[layer].sum())).items()
            }
            for layer in settings.layer_ids
        }
        spec = StreamSpec(width=width, site="decoder_layer_input", tokenizer=tokenizer.spec)
        manifest = Manifest(backbone=backbone, base_model=base_model, streams={"text": spec})
        record = MemoryRecord(name=name, settings=settings, training=training or {}, **record)
        path = self.folder / f"{name}.safetensors"
        write_memory(path, manifest, record, np.arange(tokenizer.spec.vocab_size, dtype=np.int32), tensors)
        return path

    def run(self, *arguments, color=False, columns=200, env=None, **options):
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        environment |= {"COLUMNS": str(columns), "TERM": "xterm-256color", "PYTHONWARNINGS": "error", **(env or {})}
        if color:
            environment["FORCE_COLOR"] = "1"
        command = [sys.executable, "-m", "engram_cli", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, **options
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(scope="session")
def tokenizer_text():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


@pytest.fixture
def world(tmp_path, tokenizer_text):
    (tmp_path / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")
    return World(tmp_path)


@pytest.fixture
def install(monkeypatch):
    """Make these backbones the installed ones, in this process."""

    def install(*backbones):
        entries = [
            SimpleNamespace(name=one.name, value="cli_toys:TOY", dist=None, load=lambda one=one: one)
            for one in backbones
        ]
        real = importlib.metadata.entry_points
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda **choice: entries if choice == {"group": "engram.backbones"} else real(**choice),
        )

    return install


@pytest.fixture
def toy(install):
    """A backbone that can do everything, installed beside one that can do nothing."""
    toy = Toy()
    install(toy, Mute())
    return toy


@pytest.fixture
def engram(world, monkeypatch, capsys):
    """The command in this process, in the world's folder."""
    from engram_cli.main import main

    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(done.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def toy_site(world):
    """The environment in which processes of their own find the toy installed."""
    info = world.folder / "site" / "engram_toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engram-toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[engram.backbones]\ntoy = cli_toys:TOY\n")
    return {"PYTHONPATH": os.pathsep.join([str(world.folder / "site"), str(Path(__file__).parent)])}
