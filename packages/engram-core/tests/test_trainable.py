"""A concept in training does what its adapter will do, learns where it fires, and stores what it has learned."""

import numpy as np
import pytest
from core_builders import WIDTHS, bits, byte_tokenizer, make_manifest, make_spec, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_core import Adapter, ConceptRecord, InputError, Matcher, build_registry

torch = pytest.importorskip("torch")

import engram_core.torch as twin  # noqa: E402

WIDTH = WIDTHS["clip_l"]
TRIGGER = "a cat"
LIGATURE = "a \ufb01g"
"""In capitals it is one byte shorter, so it has variants that share no vector."""

TEXTS = ["see a cat run", "A CAT!", "a dog", "a cat a cat"]
LENGTH = max(map(len, TEXTS))


def make_stream(trigger=TRIGGER, tokenizer=None, *, seed=0, **record):
    """A stream with random values, and the record of its concept."""
    record = ConceptRecord(**{"name": "cat", "trigger": trigger, "rule": "absolute"} | record)
    registry = build_registry(trigger, tokenizer or byte_tokenizer(), max_ngram=record.max_ngram)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(registry.n_slots, WIDTH, generator=generator)
    return twin.TrainableStream(record, registry, make_spec(WIDTH), vectors, torch.randn(WIDTH, generator=generator))


def make_concept():
    streams = {"clip_l": make_stream(), "t5": make_stream(seed=1)}
    return twin.TrainableConcept(ConceptRecord(name="cat", trigger=TRIGGER, rule="absolute"), streams)


def make_adapter(concept):
    return Adapter.build(make_manifest({"clip_l": WIDTH}), [concept])


def read(*texts):
    """Token ids, a byte each, int64 [B, L]."""
    return torch.tensor([list(text.encode().ljust(LENGTH)) for text in texts])


def states(*texts, seed=0, dtype=torch.float32):
    return torch.randn(len(texts), LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def edited(stream, hidden, ids, *lengths):
    """The states as training edits them."""
    return twin.add_delta(hidden, stream(hidden, ids, *lengths))


def visit_all(stream):
    for variant in stream.registry.variants:
        stream(states(variant.example[:LENGTH]), read(variant.example)[:, :LENGTH])
    stream.visited[:] = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("activation", ["anchored", "spans"])
@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_states_in_training_are_those_of_the_adapter_bit_for_bit(rule, activation, overlap, dtype):
    stream = make_stream(rule=rule, activation=activation, overlap=overlap)
    concept = twin.TrainableConcept(ConceptRecord(name="cat", trigger=TRIGGER, rule=rule), {"clip_l": stream})
    concept.record = ConceptRecord(name="cat", trigger=TRIGGER, rule=rule, activation=activation, overlap=overlap)
    hidden, ids = states(*TEXTS, dtype=dtype), read(*TEXTS)
    with torch.no_grad():
        trained = twin.add_delta(hidden, concept({"clip_l": (hidden, ids)})["clip_l"])
    visit_all(stream)
    adapter = make_adapter(concept.snapshot())
    matches = Matcher(adapter, "clip_l").match(ids.numpy())
    assert len(matches)
    expected = twin.Residual(adapter, "clip_l").apply(hidden, matches)
    assert trained.dtype == dtype
    assert bits(trained.float().numpy()) == bits(expected.float().numpy())


@settings(deadline=None, max_examples=40)
@given(
    trigger=st.text("ab !", min_size=2, max_size=10).map(str.strip).filter(lambda text: len(text) > 1),
    max_ngram=st.integers(2, 4),
    overlap=st.sampled_from(["sum", "mean"]),
)
def test_any_trigger_acts_as_its_adapter(trigger, max_ngram, overlap):
    stream = make_stream(trigger, max_ngram=max_ngram, overlap=overlap)
    record = ConceptRecord(name="cat", trigger=trigger, rule="absolute", max_ngram=max_ngram, overlap=overlap)
    ids = read(trigger, trigger.upper(), f"x{trigger}y"[:LENGTH])
    hidden = states("", "", "")
    with torch.no_grad():
        trained = edited(stream, hidden, ids)
    visit_all(stream)
    adapter = make_adapter(twin.TrainableConcept(record, {"clip_l": stream}).snapshot())
    expected = twin.Residual(adapter, "clip_l").apply(hidden, Matcher(adapter, "clip_l").match(ids.numpy()))
    assert bits(trained.numpy()) == bits(expected.numpy())


def test_the_mean_norm_counts_the_lengths_that_are_given():
    stream = make_stream(rule="relative")
    hidden, ids = states(*TEXTS), read(*TEXTS)
    lengths = torch.tensor([len(text) for text in TEXTS])
    visit_all(stream)
    record = ConceptRecord(name="cat", trigger=TRIGGER, rule="relative")
    adapter = make_adapter(twin.TrainableConcept(record, {"clip_l": stream}).snapshot())
    matches = Matcher(adapter, "clip_l").match(ids.numpy())
    expected = twin.Residual(adapter, "clip_l").apply(hidden, matches, lengths=lengths)
    with torch.no_grad():
        assert torch.equal(edited(stream, hidden, ids, lengths), expected)
        assert not torch.equal(edited(stream, hidden, ids), expected)


def test_the_very_same_tensor_comes_back_when_nothing_fires():
    stream = make_stream()
    hidden = states("a dog")
    assert stream(hidden, read("a dog")) is None
    assert edited(stream, hidden, read("a dog")) is hidden
    assert make_concept()({"t5": (hidden, read("a dog"))}) == {"t5": None}
    assert not stream.visited.any()


@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_gradients_reach_what_fired_and_nothing_else(rule):
    stream = make_stream(LIGATURE, rule=rule)
    hidden, ids, weight = states(""), read(LIGATURE), states("", seed=1)

    def loss():
        return (edited(stream, hidden, ids) * weight).sum()

    loss().backward()
    fired = sorted(stream.registry.slots_of(stream.registry.variants[0]))
    assert stream.registry.n_slots > len(fired)
    sizes = stream.vectors.grad.abs().sum(dim=1)
    assert (sizes > 0).nonzero().flatten().tolist() == fired == stream.visited.nonzero().flatten().tolist()
    assert stream.scales.grad.abs().min() > 0
    step = 1e-2  # the losses are smooth and float32 is coarse: central differences
    with torch.no_grad():
        for parameter, index in ((stream.vectors, (fired[0], 1)), (stream.scales, (2,))):
            parameter[index] += step
            high = loss().item()
            parameter[index] -= 2 * step
            numeric = (high - loss().item()) / (2 * step)
            parameter[index] += step
            assert numeric == pytest.approx(parameter.grad[index].item(), rel=0.02, abs=5e-3)


def test_variants_of_one_length_learn_together():
    stream = make_stream()
    lower, upper = (states("a cat"), read("a cat")), (states("a cat"), read("A CAT"))
    assert torch.equal(edited(stream, *lower), edited(stream, *upper))
    edited(stream, *upper).sum().backward()
    alone = stream.vectors.grad.clone()
    stream.vectors.grad = None
    hidden, ids = (torch.cat(pair) for pair in zip(lower, upper, strict=True))
    edited(stream, hidden, ids).sum().backward()
    assert torch.allclose(stream.vectors.grad, 2 * alone, rtol=1e-5)


def test_what_was_never_visited_is_not_stored():
    stream = make_stream("a  cat", word_tokenizer())
    registry = stream.registry
    assert len(registry.variants) > 1
    # Words get their ids as they are seen, so each spelling is a variant of its own.
    ids = torch.tensor([list(registry.variants[0].ids) + [999] * 4])
    stream(torch.zeros(1, ids.shape[1], WIDTH), ids)
    stored = stream.snapshot()
    visited = registry.slots_of(registry.variants[0])
    expected = {variant.ids for variant in registry.variants if registry.slots_of(variant) <= visited}
    assert set(stored.triggers) == expected
    slot_of = dict(zip(registry.entries, registry.slots, strict=True))
    assert {slot_of[entry] for entry in stored.entries} == visited
    for entry, vector in zip(stored.entries, stored.vectors, strict=True):
        assert bits(vector) == bits(stream.vectors[slot_of[entry]].detach().numpy())


def test_a_snapshot_needs_a_visit_and_is_a_copy():
    stream = make_stream()
    with pytest.raises(InputError, match="training visited no token variant of 'a cat' in full"):
        stream.snapshot()
    visit_all(stream)
    stored = stream.snapshot()
    before = bits(stored.vectors), bits(stored.scales)
    with torch.no_grad():
        stream.vectors.add_(1)
        stream.scales.add_(1)
    assert (bits(stored.vectors), bits(stored.scales)) == before
    assert stored.vectors.dtype == stored.scales.dtype == np.float32


def test_only_vectors_and_scales_are_trained_and_kept():
    concept = make_concept()
    names = {f"streams.{stream}.{part}" for stream in ("clip_l", "t5") for part in ("vectors", "scales")}
    assert {name for name, _ in concept.named_parameters()} == concept.state_dict().keys() == names
    assert {value.dtype for value in concept.parameters()} == {torch.float32}


def test_streams_are_edited_by_name_and_a_record_may_be_given_at_the_end():
    concept = make_concept()
    hidden, ids = states(*TEXTS), read(*TEXTS)
    found = concept({"t5": (hidden, ids), "clip_l": (hidden, ids)})
    assert torch.equal(found["t5"].values, concept.stream("t5")(hidden, ids).values)
    assert not torch.equal(found["t5"].values, found["clip_l"].values)
    for name in ("clip_l", "t5"):
        visit_all(concept.stream(name))
    record = ConceptRecord(name="dog", trigger=TRIGGER, rule="absolute", training={"steps": 3})
    assert concept.snapshot(record).record is record
    assert set(concept.snapshot().streams) == {"clip_l", "t5"}
    with pytest.raises(KeyError):
        concept.stream("clip_g")


def test_first_values_are_copied():
    registry = build_registry(TRIGGER, byte_tokenizer())
    record = ConceptRecord(name="cat", trigger=TRIGGER, rule="absolute")
    vectors, scales = torch.ones(registry.n_slots, WIDTH, dtype=torch.float64), torch.ones(WIDTH)
    stream = twin.TrainableStream(record, registry, make_spec(WIDTH), vectors, scales)
    vectors.zero_()
    scales.zero_()
    assert bool((stream.vectors == 1).all())
    assert bool((stream.scales == 1).all())


@pytest.mark.parametrize(("more", "width", "scales"), [(1, WIDTH, WIDTH), (0, WIDTH + 1, WIDTH), (0, WIDTH, WIDTH + 1)])
def test_first_values_must_fit(more, width, scales):
    registry = build_registry(TRIGGER, byte_tokenizer())
    record = ConceptRecord(name="cat", trigger=TRIGGER, rule="absolute")
    vectors = torch.zeros(registry.n_slots + more, width)
    said = rf"\[{registry.n_slots + more}, {width}\].*\[{scales}\].*{registry.n_slots} vectors of shape \[{WIDTH}\]"
    with pytest.raises(InputError, match=said):
        twin.TrainableStream(record, registry, make_spec(WIDTH), vectors, torch.zeros(scales))
