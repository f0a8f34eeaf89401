"""Sites with PyTorch: the twin agrees with the reference at each, and training reaches each and no other."""

import numpy as np
import pytest
from core_builders import adapters, bits, byte_tokenizer, law, make_manifest, make_spec, only_site, prompts, vectors
from core_hostile import SITES
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_core import Adapter, ConceptRecord, InputError, Matcher, Residual, build_registry

torch = pytest.importorskip("torch")

import engram_core.torch as twin  # noqa: E402

WIDTH = 3
ONE_STREAM = {"clip_l": WIDTH}
RULES = ["absolute", "absolute-tanh", "relative"]
TRIGGER = "a cat"
TEXTS = ["see a cat run", "A CAT!", "a dog", "a cat a cat"]
LENGTH = max(map(len, TEXTS))


@settings(law, max_examples=25)
@given(data=st.data(), rows=prompts(), strength=st.sampled_from([1.0, 0.3, -2.0]))
def test_each_site_is_edited_as_by_an_adapter_that_holds_it_alone(data, rows, strength):
    adapter = data.draw(adapters(widths=ONE_STREAM, sites=SITES), label="adapter")
    hidden = data.draw(vectors((len(rows), 13, WIDTH)), label="hidden")
    matches = Matcher(adapter, "clip_l").match(rows)
    residual = twin.Residual(adapter, "clip_l")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        states = torch.from_numpy(hidden).to(dtype)
        delta = residual.delta(states, matches, strength=strength)
        for number, site in enumerate(SITES):
            alone = twin.Residual(only_site(adapter, number), "clip_l")
            expected = alone.apply(states, matches, strength=strength)
            found = residual.apply(states, matches, strength=strength, site=site)
            assert bits(found.float().numpy()) == bits(expected.float().numpy())
            assert (found is states) == (expected is states) == (delta is None)
            if delta is not None:
                assert delta.values.shape[1:] == (len(SITES), WIDTH)
                assert torch.equal(twin.add_delta(states, delta.at(number)), found)


@settings(law, max_examples=25)
@given(data=st.data(), rows=prompts())
def test_the_absolute_rule_agrees_with_the_reference_to_the_bit(data, rows):
    adapter = data.draw(adapters(widths=ONE_STREAM, rules=["absolute"], sites=SITES), label="adapter")
    hidden = data.draw(vectors((len(rows), 13, WIDTH)), label="hidden")
    matches = Matcher(adapter, "clip_l").match(rows)
    for site in SITES:
        expected = Residual(adapter, "clip_l").apply(hidden, matches, site=site)
        found = twin.Residual(adapter, "clip_l").apply(torch.from_numpy(hidden), matches, site=site)
        assert bits(found.numpy()) == bits(expected)


# Training


def make_stream(sites=SITES, *, seed=0, **record):
    record = ConceptRecord(**{"name": "cat", "trigger": TRIGGER, "rule": "absolute"} | record)
    registry = build_registry(TRIGGER, byte_tokenizer())
    spec = make_spec(WIDTH, sites)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(registry.n_slots, *spec.shape, generator=generator)
    stream = twin.TrainableStream(record, registry, spec, values, torch.randn(*spec.shape, generator=generator))
    stream.visited[:] = True
    return stream, twin.TrainableConcept(record, {"clip_l": stream})


def read(*texts):
    return torch.tensor([list(text.encode().ljust(LENGTH)) for text in texts])


def states(seed=0):
    return torch.randn(len(TEXTS), LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("activation", ["anchored", "spans"])
@pytest.mark.parametrize("rule", RULES)
def test_training_edits_each_site_as_the_adapter_will(rule, activation, overlap):
    stream, concept = make_stream(rule=rule, activation=activation, overlap=overlap)
    adapter = Adapter.build(make_manifest(ONE_STREAM, SITES), [concept.snapshot()])
    ids = read(*TEXTS)
    matches = Matcher(adapter, "clip_l").match(ids.numpy())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden = states().to(dtype)
        with torch.no_grad():
            delta = stream(hidden, ids)
        assert delta.values.shape == (len(delta.row), len(SITES), WIDTH)
        for number, site in enumerate(SITES):
            trained = twin.add_delta(hidden, delta.at(number))
            expected = twin.Residual(adapter, "clip_l").apply(hidden, matches, site=site)
            assert trained.dtype == dtype
            if rule == "absolute":
                assert bits(trained.float().numpy()) == bits(expected.float().numpy())
            else:  # PyTorch and NumPy compute tanh in their own ways, which may differ in the last bit
                assert torch.allclose(trained, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_reaches_its_own_site_and_no_other(rule):
    hidden, ids, weight = states(), read(*TEXTS), states(1)
    for number in range(len(SITES)):
        stream, _ = make_stream(rule=rule)
        (twin.add_delta(hidden, stream(hidden, ids).at(number)) * weight).sum().backward()
        for gradient in (stream.vectors.grad.abs().sum(dim=0), stream.scales.grad.abs()):
            assert gradient[number].min() > 0
            others = [other for other in range(len(SITES)) if other != number]
            assert not gradient[others].any()
    stream, _ = make_stream(rule=rule)
    delta = stream(hidden, ids)
    sum((twin.add_delta(hidden, delta.at(number)) * weight).sum() for number in range(len(SITES))).backward()
    assert stream.vectors.grad.abs().sum(dim=(0, 2)).min() > 0
    assert stream.scales.grad.abs().min() > 0


def test_sites_learn_what_streams_of_their_own_would():
    hidden, ids, weight = states(), read(*TEXTS), states(1)
    together, _ = make_stream(rule="relative")
    delta = together(hidden, ids)
    sum((twin.add_delta(hidden, delta.at(n)) * weight).sum() for n in range(len(SITES))).backward()
    for number in range(len(SITES)):
        alone, _ = make_stream(None, rule="relative")
        with torch.no_grad():
            alone.vectors.copy_(together.vectors[:, number])
            alone.scales.copy_(together.scales[number])
        (twin.add_delta(hidden, alone(hidden, ids)) * weight).sum().backward()
        assert torch.allclose(alone.vectors.grad, together.vectors.grad[:, number], rtol=1e-5, atol=1e-6)
        assert torch.allclose(alone.scales.grad, together.scales.grad[number], rtol=1e-5, atol=1e-6)


def test_nothing_is_added_when_nothing_fires():
    stream, _ = make_stream()
    assert stream(states()[:1], read("a dog")) is None


def test_a_snapshot_keeps_every_site():
    stream, concept = make_stream()
    stored = concept.snapshot().streams["clip_l"]
    assert stored.vectors.shape == (len(stored.entries), len(SITES), WIDTH)
    slots = dict(zip(stream.registry.entries, stream.registry.slots, strict=True))
    for entry, vector in zip(stored.entries, stored.vectors, strict=True):
        assert bits(vector) == bits(stream.vectors[slots[entry]].detach().numpy())
    assert bits(stored.scales) == bits(stream.scales.detach().numpy())
    assert stored.vectors.dtype == np.float32


@pytest.mark.parametrize(("vectors", "scales"), [((WIDTH,), (3, WIDTH)), ((3, WIDTH), (WIDTH,)), ((2, WIDTH),) * 2])
def test_first_values_must_fit_the_sites(vectors, scales):
    registry = build_registry(TRIGGER, byte_tokenizer())
    record = ConceptRecord(name="cat", trigger=TRIGGER, rule="absolute")
    first = torch.zeros(registry.n_slots, *vectors), torch.zeros(*scales)
    with pytest.raises(InputError, match=rf"do not fit {registry.n_slots} vectors of shape \[3, {WIDTH}\]"):
        twin.TrainableStream(record, registry, make_spec(WIDTH, SITES), *first)


def test_a_site_must_be_one_of_the_streams():
    _, concept = make_stream()
    adapter = Adapter.build(make_manifest(ONE_STREAM, SITES), [concept.snapshot()])
    matches = Matcher(adapter, "clip_l").match(read(*TEXTS).numpy())
    for site in (None, "mid", ""):
        with pytest.raises(InputError, match="the stream's sites are down_blocks"):
            twin.Residual(adapter, "clip_l").apply(states(), matches, site=site)
