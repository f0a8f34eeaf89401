"""The hook edits the encoder's last hidden state as the reference says, and leaves everything else as it is."""

import sys
import threading

import numpy as np
import pytest
import torch
from vision_builders import LOUD, TRIGGER, ids_of, make_adapter, make_concept, states_of

from engram_core import InputError, Matcher, Residual
from engram_vision.hooks import TextEdit, attach, attached, detach

PROMPTS = [
    f"a photo of {TRIGGER} in the snow",
    "a red ball",
    f"{TRIGGER.upper()}, a hat, {TRIGGER}",
    "quell zorbit",
    "",
]
SILENT = ["a red ball", "quell zorbit", "zorbit", ""]
RULES = ["absolute", "absolute-tanh", "relative"]


def reference(adapter, base, prompts, **options):
    """Return the states that the NumPy reference gives."""
    matches = Matcher(adapter, "clip_l").match(ids_of(base, *prompts).numpy())
    return Residual(adapter, "clip_l").apply(states_of(base, *prompts), matches, **options)


def load(pipeline, adapter, **options):
    attach(pipeline.text_encoder, TextEdit.of(adapter, "clip_l", **options))


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("rule", RULES)
def test_states_are_those_of_the_reference(pipeline, base, rule, overlap, strength):
    adapter = make_adapter(base, make_concept(base, rule=rule, overlap=overlap))
    load(pipeline, adapter, strength=strength)
    found, expected = states_of(pipeline, *PROMPTS), reference(adapter, base, PROMPTS, strength=strength)
    assert np.abs(expected - states_of(base, *PROMPTS)).max() > 0.1
    if rule == "absolute":
        assert found.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_rows_in_which_nothing_fires_and_positions_outside_a_match_keep_their_bytes(pipeline, base):
    load(pipeline, make_adapter(base))
    found, frozen = states_of(pipeline, *PROMPTS), states_of(base, *PROMPTS)
    changed = (found != frozen).any(axis=-1)
    assert changed.sum(axis=1).tolist() == [4, 0, 8, 0, 0]
    assert changed[0].nonzero()[0].tolist() == [4, 5, 6, 7]  # after "begin", "a", "photo" and "of"
    assert found[~changed].tobytes() == frozen[~changed].tobytes()


def test_concepts_of_several_rules_act_in_one_prompt(pipeline, base):
    concepts = [make_concept(base, name="one"), make_concept(base, "mira voss", name="two", rule="relative", seed=1)]
    adapter = make_adapter(base, *concepts)
    strength = {"one": 0.5, "two": -1.5}
    load(pipeline, adapter, strength=strength)
    prompts = [f"mira voss and {TRIGGER}", "mira voss", TRIGGER]
    expected = reference(adapter, base, prompts, strength=strength)
    np.testing.assert_allclose(states_of(pipeline, *prompts), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("strength", "prompts"), [(1.0, SILENT), (0.0, PROMPTS), ({TRIGGER: 0.0}, PROMPTS)], ids=["silent", "zero", "named"]
)
def test_the_very_object_the_encoder_made_comes_back_when_nothing_fires(pipeline, base, monkeypatch, strength, prompts):
    encoder, made = pipeline.text_encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *args, **options: made.append(forward(*args, **options)) or made[-1])
    load(pipeline, make_adapter(base), strength=strength)
    for return_dict in (True, False):
        assert encoder(ids_of(base, *prompts), return_dict=return_dict) is made[-1]
    attach(encoder, TextEdit.of(make_adapter(base), "clip_l"))
    assert encoder(ids_of(base, TRIGGER)) is not made[-1]


@pytest.mark.parametrize("return_dict", [True, False])
def test_only_the_last_hidden_state_differs(pipeline, base, return_dict):
    load(pipeline, make_adapter(base))
    with torch.no_grad():
        found, frozen = (one.text_encoder(ids_of(base, *PROMPTS), return_dict=return_dict) for one in (pipeline, base))
    assert type(found) is type(frozen)
    if return_dict:
        assert found.keys() == frozen.keys() == {"last_hidden_state", "pooler_output"}
        assert found.last_hidden_state is found[0]
    assert len(found) == len(frozen) == 2
    assert not torch.equal(found[0], frozen[0])
    assert found[1].numpy().tobytes() == frozen[1].numpy().tobytes()


def test_ids_may_come_as_keyword_and_without_a_batch(pipeline, base):
    load(pipeline, make_adapter(base))
    expected = states_of(pipeline, TRIGGER)
    ids = ids_of(base, TRIGGER)
    with torch.no_grad():
        assert pipeline.text_encoder(input_ids=ids)[0].numpy().tobytes() == expected.tobytes()
        assert pipeline.text_encoder(ids[0])[0].numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_keep_their_number_type(pipeline, base, dtype):
    encoder = pipeline.text_encoder.to(dtype)
    ids = ids_of(base, TRIGGER, "a red ball")
    with torch.no_grad():
        frozen = encoder(ids)[0]
        load(pipeline, make_adapter(base))
        found = encoder(ids)[0]
    assert found.dtype == dtype
    assert not torch.equal(found[0], frozen[0])
    assert torch.equal(found[1].view(torch.int16), frozen[1].view(torch.int16))


def test_every_variant_of_a_trigger_fires(pipeline, base):
    load(pipeline, make_adapter(base, make_concept(base, LOUD)))
    texts = [f"a {LOUD} on the beach", f"a {LOUD}, on the beach"]
    assert ids_of(base, texts[0])[0, 6] != ids_of(base, texts[1])[0, 6]
    changed = (states_of(pipeline, *texts) != states_of(base, *texts)).any(axis=-1)
    assert [row.nonzero()[0].tolist() for row in changed] == [[2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]]


def test_states_of_other_layers_are_refused_only_where_something_fires(pipeline, base):
    load(pipeline, make_adapter(base))
    encoder = pipeline.text_encoder
    with pytest.raises(InputError, match="clip_skip"):
        encoder(ids_of(base, TRIGGER), output_hidden_states=True)
    assert len(encoder(ids_of(base, "a red ball"), output_hidden_states=True).hidden_states) == 3
    load(pipeline, make_adapter(base), strength=0.0)
    assert len(encoder(ids_of(base, TRIGGER), output_hidden_states=True).hidden_states) == 3


def test_attaching_again_replaces_and_detaching_leaves_nothing(pipeline, base):
    encoder = pipeline.text_encoder
    detach(encoder)
    assert attached(encoder) is None
    load(pipeline, make_adapter(base))
    edit = TextEdit.of(make_adapter(base, make_concept(base, "mira voss")), "clip_l")
    attach(encoder, edit)
    assert len(encoder._forward_hooks) == 1
    assert attached(encoder) is edit
    assert states_of(pipeline, TRIGGER).tobytes() == states_of(base, TRIGGER).tobytes()
    assert states_of(pipeline, "mira voss").tobytes() != states_of(base, "mira voss").tobytes()
    detach(encoder)
    assert not encoder._forward_hooks
    assert not encoder._forward_hooks_with_kwargs
    assert "forward" not in vars(encoder)
    assert states_of(pipeline, "mira voss").tobytes() == states_of(base, "mira voss").tobytes()


def test_a_pass_that_meets_the_hook_half_attached_sees_the_base_model(pipeline, base):
    # PyTorch keeps the hook and how to call it in two places, which it reads and writes one after the other.
    load(pipeline, make_adapter(base))
    encoder = pipeline.text_encoder
    ids = ids_of(base, TRIGGER)
    encoder._forward_hooks_with_kwargs.clear()
    with torch.no_grad():
        assert encoder(ids)[0].numpy().tobytes() == states_of(base, TRIGGER).tobytes()


def test_each_pass_sees_all_of_an_edit_or_nothing_while_another_thread_changes_it(pipeline, base):
    edits = [TextEdit.of(make_adapter(base, make_concept(base, seed=seed)), "clip_l") for seed in (1, 2)]
    allowed = {states_of(base, TRIGGER).tobytes()}
    for edit in edits:
        attach(pipeline.text_encoder, edit)
        allowed.add(states_of(pipeline, TRIGGER).tobytes())
    assert len(allowed) == 3
    seen, failures, done = set(), [], threading.Event()

    def read():
        try:
            while not done.is_set():
                seen.add(states_of(pipeline, TRIGGER).tobytes())
        except Exception as error:  # noqa: BLE001 - any failure in a thread fails the test
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for reader in readers:
            reader.start()
        for number in range(150):
            attach(pipeline.text_encoder, edits[number % 2])
            if number % 3:
                detach(pipeline.text_encoder)
            states_of(base, TRIGGER)  # takes a while, so that the readers come to read
    finally:
        done.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert not failures
    assert seen <= allowed
