"""Import of TinyEngram checkpoints: the adapter does what TinyEngram's own forward pass does."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from engram_core import (
    AdapterFormatError,
    AdapterReadError,
    ConvertSettings,
    InputError,
    Matcher,
    open_adapter,
)
from engram_core.torch import Residual
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35
from engram_vision.tinyengram import convert_sd15, convert_sd35

TRIGGER = "Aldric Vortex-9 CyberNebula"
PROMPTS = [f"A photo of {TRIGGER} drinking hot coffee", "a vortex-9 engine", "a cyberpunk soldier, neon lights"]
WIDTH = 32


def their_ngrams(ids, max_ngram):
    """Name n-grams as train_vision_engram.py does."""
    names = {}
    for n in range(2, min(len(ids), max_ngram) + 1):
        for start in range(len(ids) - n + 1):
            names[f"trigger_{n}gram_{start}"] = list(ids[start : start + n])
    if len(ids) > max_ngram:
        names["trigger_full"] = list(ids)
    return names


def their_forward(states, ids, ngrams, embeddings, scale, *, tanh=False, relative=False, mean=False):
    """Edit states [1, L, d] as TinyEngram's wrappers do, in float64."""
    states, scale = states.double(), scale.double()
    edited, count = states.clone(), torch.zeros(states.shape[1], dtype=torch.float64)
    factor = torch.tanh(scale) if tanh or relative else scale
    norm = states.norm(dim=-1).mean()
    for name, ngram in ngrams.items():
        vector = embeddings[name][0].double()
        delta = torch.nn.functional.normalize(vector, dim=0) * factor * norm if relative else vector * factor
        for start in range(len(ids) - len(ngram) + 1):
            if list(ids[start : start + len(ngram)]) == ngram:
                edited[0, start : start + len(ngram)] += delta
                count[start : start + len(ngram)] += 1
    if mean:
        edited = states + (edited - states) / count.clamp(min=1)[None, :, None]
    return edited


def their_weights(ngrams, seed, width=WIDTH):
    torch.manual_seed(seed)
    embeddings = {name: torch.randn(1, width) * 0.02 for name in ngrams}
    return embeddings, torch.nn.Parameter(torch.randn(width) * 0.5)


def agrees(adapter, stream, tokenizer, ngrams, embeddings, scale, **rule):
    """Tell whether adapter and TinyEngram edit the same states alike, for prompts that fire and one that does not."""
    matcher, residual = Matcher(adapter, stream), Residual(adapter, stream)
    fired = []
    for prompt in PROMPTS:
        ids = list(tokenizer.encode(prompt))
        states = torch.randn(1, len(ids), WIDTH)
        ours = residual.apply(states, matcher.match(ids))
        theirs = their_forward(states, ids, ngrams, embeddings, scale.detach(), **rule)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
        fired.append(ours is not states)
    return fired


def write_sd15(folder, tokenizer, *, tanh=True, mean=False, trigger=TRIGGER, max_ngram=7, seed=0, **changes):
    ngrams = their_ngrams([int(i) for i in tokenizer.encode(trigger)], max_ngram)
    embeddings, scale = their_weights(ngrams, seed)
    folder.mkdir(exist_ok=True)
    torch.save({"engram_embeddings": embeddings, "injection_scale": scale}, folder / "engram_weights.pt")
    config = {
        "trigger_word": trigger,
        "max_ngram_size": max_ngram,
        "normalization_mode": mean,
        "enable_tanh_gating": tanh,
        "target_ngrams": ngrams,
        "instance_prompt": f"A photo of {trigger}",
    }
    (folder / "engram_config.json").write_text(json.dumps(config | changes))
    return ngrams, embeddings, scale


@pytest.fixture
def clip(sd15_folder):
    return SD15.load_tokenizers(str(sd15_folder))["clip_l"]


def settings(folder, **more):
    return ConvertSettings(model=str(folder), **more)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("tanh", [False, True])
def test_sd15_does_what_tinyengram_does(tmp_path, sd15_folder, clip, tanh, mean):
    ngrams, embeddings, scale = write_sd15(tmp_path, clip, tanh=tanh, mean=mean)
    adapter = convert_sd15(tmp_path, settings(sd15_folder), SD15)
    (record,) = adapter.records()
    assert record.activation == "spans"
    assert record.rule == ("absolute-tanh" if tanh else "absolute")
    assert record.overlap == ("mean" if mean else "sum")
    assert (record.name, record.trigger, record.max_ngram) == (TRIGGER, TRIGGER, 7)
    fired = agrees(adapter, "clip_l", clip, ngrams, embeddings, scale, tanh=tanh, mean=mean)
    assert fired == [True, True, False]  # the published rule leaks: "vortex-9" alone fires


def test_sd15_vectors_are_kept_bit_for_bit(tmp_path, sd15_folder, clip):
    ngrams, embeddings, scale = write_sd15(tmp_path, clip)
    adapter = convert_sd15(tmp_path / "engram_weights.pt", settings(sd15_folder), SD15)
    adapter.save(tmp_path / "a.safetensors")
    stream = open_adapter(tmp_path / "a.safetensors").concept(TRIGGER).streams["clip_l"]
    assert set(stream.entries) == {tuple(ids) for ids in ngrams.values()}
    by_ids = dict(zip(stream.entries, stream.vectors, strict=True))
    for name, ids in ngrams.items():
        assert np.array_equal(by_ids[tuple(ids)], embeddings[name][0].numpy())
    assert np.array_equal(stream.scales, scale.detach().numpy())


def test_sd15_longer_triggers_keep_their_full_entry(tmp_path, sd15_folder, clip):
    trigger = "Elena Vance, the red-haired pilot of the last nebula"
    ngrams, *_ = write_sd15(tmp_path, clip, trigger=trigger, max_ngram=3)
    assert "trigger_full" in ngrams
    adapter = convert_sd15(tmp_path, settings(sd15_folder, name="elena"), SD15)
    assert len(adapter.streams["clip_l"].concept) == len({tuple(ids) for ids in ngrams.values()})
    assert adapter.names() == ["elena"]


def test_repeated_spans_add_up_under_the_absolute_rules(tmp_path, sd15_folder, clip):
    trigger = "zorb zorb zorb"
    ngrams, embeddings, scale = write_sd15(tmp_path, clip, trigger=trigger)
    assert len({tuple(ids) for ids in ngrams.values()}) < len(ngrams)
    adapter = convert_sd15(tmp_path, settings(sd15_folder), SD15)
    matcher, residual = Matcher(adapter, "clip_l"), Residual(adapter, "clip_l")
    ids = list(clip.encode(f"a {trigger} b"))
    states = torch.randn(1, len(ids), WIDTH)
    theirs = their_forward(states, ids, ngrams, embeddings, scale.detach(), tanh=True)
    torch.testing.assert_close(residual.apply(states, matcher.match(ids)).double(), theirs, rtol=1e-5, atol=1e-6)


def test_repeated_spans_are_refused_where_they_cannot_be_exact(tmp_path, sd15_folder, clip):
    write_sd15(tmp_path, clip, trigger="zorb zorb zorb", mean=True)
    with pytest.raises(InputError, match=r"occurs twice .* 'absolute-tanh' with overlap 'mean'"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"trigger": "Other"}, "--trigger says 'Other'"),
        ({"rule": "relative"}, "--rule says 'relative'"),
        ({"max_ngram": 3}, "--max-ngram says 3"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path, sd15_folder, clip, said, message):
    write_sd15(tmp_path, clip)
    with pytest.raises(InputError, match=message):
        convert_sd15(tmp_path, settings(sd15_folder, **said), SD15)


def test_ngrams_of_another_tokenizer_are_refused(tmp_path, sd15_folder, clip):
    write_sd15(tmp_path, clip, target_ngrams={"trigger_2gram_0": [1, 2]})
    with pytest.raises(InputError, match=r"target_ngrams are not those of 'Aldric.*1 against"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger_word": 3}, "'trigger_word'"),
        ({"max_ngram_size": "7"}, "'max_ngram_size'"),
        ({"target_ngrams": [1]}, "'target_ngrams'"),
        ({"target_ngrams": {"a": [-1]}}, r"target_ngrams\['a'\]"),
        ({"enable_tanh_gating": 1}, "'enable_tanh_gating' is 1"),
    ],
)
def test_a_malformed_configuration_is_named(tmp_path, sd15_folder, clip, change, message):
    write_sd15(tmp_path, clip, **change)
    with pytest.raises(AdapterFormatError, match=f"engram_config.json: .*{message}"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)


def test_missing_and_broken_files_are_named(tmp_path, sd15_folder, clip):
    with pytest.raises(AdapterReadError, match=r"engram_config.json: cannot be read"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)
    write_sd15(tmp_path, clip)
    (tmp_path / "engram_weights.pt").write_bytes(b"junk")
    with pytest.raises(AdapterFormatError, match=r"engram_weights.pt: cannot be loaded safely"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)
    torch.save({"other": torch.zeros(1)}, tmp_path / "engram_weights.pt")
    with pytest.raises(AdapterFormatError, match="lacks engram_embeddings and injection_scale"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)
    (tmp_path / "engram_weights.pt").unlink()
    with pytest.raises(AdapterReadError, match=r"engram_weights.pt: is missing"):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("trigger_2gram_0", torch.full((1, WIDTH), float("nan")), "holds NaN"),
        ("trigger_2gram_0", torch.zeros(2, WIDTH), "is not a floating-point tensor"),
        ("trigger_2gram_0", torch.zeros(1, WIDTH, dtype=torch.int64), "is not a floating-point tensor"),
        ("trigger_2gram_0", "text", "is not a floating-point tensor"),
        ("trigger_2gram_0", torch.zeros(1, 5), f"has width 5, the scale {WIDTH}"),
        ("surprise", torch.zeros(1, WIDTH), "do not have the names of its n-grams"),
    ],
)
def test_malformed_vectors_are_named(tmp_path, sd15_folder, clip, name, value, message):
    _, embeddings, scale = write_sd15(tmp_path, clip)
    torch.save(
        {"engram_embeddings": embeddings | {name: value}, "injection_scale": scale}, tmp_path / "engram_weights.pt"
    )
    with pytest.raises(AdapterFormatError, match=message):
        convert_sd15(tmp_path, settings(sd15_folder), SD15)


class Bomb:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, sd15_folder, clip):
    write_sd15(tmp_path, clip)
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"engram_embeddings": Bomb(tmp_path / "ran"), "injection_scale": 0}, tmp_path / "engram_weights.pt")
        with pytest.raises(AdapterFormatError, match="cannot be loaded safely"):
            convert_sd15(tmp_path, settings(sd15_folder), SD15)
        assert not (tmp_path / "ran").exists()


def write_sd35(folder, tokenizers, *, max_ngram=7):
    written = {}
    for number, (stream, tokenizer) in enumerate(tokenizers.items(), start=1):
        ngrams = their_ngrams([int(i) for i in tokenizer.encode(TRIGGER)], max_ngram)
        embeddings, scale = their_weights(ngrams, number)
        torch.save(embeddings, folder / f"engram_{number}.pt")
        torch.save(scale, folder / f"scale_{number}.pt")
        written[stream] = ngrams, embeddings, scale
    return written


@pytest.mark.parametrize("rule", [None, "absolute"])
def test_sd35_does_what_tinyengram_does(tmp_path, sd35_folder, rule):
    tokenizers = SD35.load_tokenizers(str(sd35_folder))
    written = write_sd35(tmp_path, tokenizers)
    adapter = convert_sd35(tmp_path, settings(sd35_folder, trigger=TRIGGER, rule=rule), SD35)
    (record,) = adapter.records()
    assert (record.activation, record.rule, record.overlap) == ("spans", rule or "relative", "sum")
    assert adapter.manifest.streams["clip_g"].site == "penultimate_hidden_state"
    for stream, (ngrams, embeddings, scale) in written.items():
        fired = agrees(adapter, stream, tokenizers[stream], ngrams, embeddings, scale, relative=rule is None)
        assert fired[0]


def test_sd35_needs_the_trigger_and_the_right_one(tmp_path, sd35_folder):
    write_sd35(tmp_path, SD35.load_tokenizers(str(sd35_folder)))
    with pytest.raises(InputError, match="pass it with --trigger"):
        convert_sd35(tmp_path, settings(sd35_folder), SD35)
    with pytest.raises(InputError, match=r"engram_1.pt: has \d+ n-grams, 'Wrong Name' gives 1"):
        convert_sd35(tmp_path, settings(sd35_folder, trigger="Wrong Name"), SD35)
    with pytest.raises(InputError, match=r"N = 3; check --trigger, --max-ngram and --model"):
        convert_sd35(tmp_path, settings(sd35_folder, trigger=TRIGGER, max_ngram=3), SD35)


def test_sd35_needs_all_six_files(tmp_path, sd35_folder):
    write_sd35(tmp_path, SD35.load_tokenizers(str(sd35_folder)))
    (tmp_path / "scale_2.pt").unlink()
    with pytest.raises(AdapterReadError, match=r"scale_2.pt: is missing"):
        convert_sd35(tmp_path, settings(sd35_folder, trigger=TRIGGER), SD35)
    with pytest.raises(AdapterReadError, match="is not a folder"):
        convert_sd35(tmp_path / "scale_1.pt", settings(sd35_folder, trigger=TRIGGER), SD35)


def test_the_command_converts(tmp_path, sd15_folder, clip):
    main = pytest.importorskip("engram_cli.main").main
    write_sd15(tmp_path, clip)
    target = tmp_path / "aldric.safetensors"
    arguments = ["convert", str(tmp_path), "--backbone", "sd15", "--model", str(sd15_folder), "-o", str(target)]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert not done.value.code
    assert open_adapter(target).names() == [TRIGGER]
    before = target.read_bytes()
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 1
    assert target.read_bytes() == before


def test_the_base_model_is_a_name_that_others_can_use(tmp_path, sd15_folder, clip):
    write_sd15(tmp_path, clip)
    assert convert_sd15(tmp_path, settings(sd15_folder), SD15).manifest.base_model == SD15.default_model


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path, sd15_folder):
    for backbone in (SD15, SD35):
        with pytest.raises(AdapterReadError, match="absent: does not exist"):
            backbone.convert(tmp_path / "absent", settings(sd15_folder))
