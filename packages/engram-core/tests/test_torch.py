"""The PyTorch twin agrees with the NumPy reference, keeps types and bytes, and lets gradients through."""

import numpy as np
import pytest
from core_builders import adapters, bits, law, make_adapter, make_concept, prompts, vectors
from hypothesis import given
from hypothesis import strategies as st

from engram_core import NO_MATCHES, InputError, Matcher, Residual
from engram_core.residual import Editor
from engram_core.residual import mean_norm as reference_mean_norm

torch = pytest.importorskip("torch")

import engram_core.torch as twin  # noqa: E402

ONE_STREAM = {"clip_l": 3}
HALVES = [torch.float16, torch.bfloat16]


def both(adapter, rows, hidden, **options):
    """The reference's states and the twin's."""
    matches = Matcher(adapter, "clip_l").match(rows)
    tensor_options = dict(options)
    if options.get("lengths") is not None:
        tensor_options["lengths"] = torch.tensor(options["lengths"])
    found = twin.Residual(adapter, "clip_l").apply(torch.from_numpy(hidden), matches, **tensor_options)
    return Residual(adapter, "clip_l").apply(hidden, matches, **options), found


def draw_states(data, rows):
    return data.draw(vectors((len(rows), 1 + max(1, *map(len, rows)), 3)), label="hidden")


@law
@given(data=st.data(), rows=prompts(), strength=st.sampled_from([1.0, 0.3, -2.0]))
def test_the_absolute_rule_agrees_to_the_bit(data, rows, strength):
    adapter = data.draw(adapters(widths=ONE_STREAM, rules=["absolute"]), label="adapter")
    expected, found = both(adapter, rows, draw_states(data, rows), strength=strength)
    assert bits(found.numpy()) == bits(expected)


@law
@given(data=st.data(), rows=prompts(), strength=st.sampled_from([1.0, 0.3, -2.0]))
def test_all_rules_agree(data, rows, strength):
    adapter = data.draw(adapters(widths=ONE_STREAM), label="adapter")
    hidden = draw_states(data, rows)
    lengths = data.draw(
        st.none() | st.lists(st.integers(1, hidden.shape[1]), min_size=len(rows), max_size=len(rows)), label="lengths"
    )
    expected, found = both(adapter, rows, hidden, strength=strength, lengths=lengths)
    largest = max(1.0, float(np.abs(expected - hidden).max()), float(np.abs(hidden).max()))
    vectors_max = max(float(np.abs(c.streams["clip_l"].vectors).max()) for c in adapter.concepts())
    assert np.abs(found.numpy() - expected).max() <= 1e-6 * max(largest, vectors_max)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_very_same_tensor_when_nothing_fires(dtype):
    adapter = make_adapter(make_concept("cat", (1, 2)))
    hidden = torch.full((2, 4, 3), -0.0, dtype=dtype)
    residual, matcher = twin.Residual(adapter, "clip_l"), Matcher(adapter, "clip_l")
    assert residual.apply(hidden, NO_MATCHES) is hidden
    assert residual.apply(hidden, matcher.match([[3, 4]])) is hidden
    assert residual.apply(hidden, matcher.match([[1, 2]]), strength=0) is hidden
    assert residual.apply(hidden, matcher.match([[1, 2]]), strength={"cat": 0.0}) is hidden
    assert residual.delta(hidden, NO_MATCHES) is None
    assert residual.delta(hidden, matcher.match([[1, 2]]), strength=0) is None
    assert twin.add_delta(hidden, None) is hidden


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_delta_says_what_is_added_and_where(dtype):
    values = {"entries": [(1, 2)], "vectors": [[0.1, 1 / 3, 2.0**-20]], "scales": [1, 1, 1]}
    adapter = make_adapter(make_concept("cat", (1, 2), **values))
    hidden = torch.full((2, 3, 3), -0.0, dtype=dtype)
    residual, matches = twin.Residual(adapter, "clip_l"), Matcher(adapter, "clip_l").match([[0, 1, 2], [1, 2, 0]])
    delta = residual.delta(hidden, matches, strength=2.0)
    assert list(zip(delta.row.tolist(), delta.position.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert delta.values.dtype == torch.float32
    assert torch.equal(delta.values, 2 * torch.tensor(values["vectors"]).expand(4, 3))
    found = twin.add_delta(hidden, delta)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(word), residual.apply(hidden, matches, strength=2.0).view(word))
    assert torch.equal(hidden, torch.zeros_like(hidden))
    assert bool(hidden.signbit().all())


def test_a_delta_passes_gradients_to_the_states_and_to_what_is_added():
    hidden, values = torch.randn(1, 3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    delta = twin.Delta(row=torch.tensor([0, 0]), position=torch.tensor([0, 2]), values=values)
    weight = torch.randn(1, 3, 3)
    (twin.add_delta(hidden, delta) * weight).sum().backward()
    assert torch.equal(hidden.grad, weight)
    assert torch.equal(values.grad, weight[0, [0, 2]])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_the_sum_is_cast_once_to_the_type_of_the_states(dtype, rule):
    adapter = make_adapter(make_concept("cat", (1, 2, 3), rule=rule))
    rows = [[1, 2, 3, 0], [0, 1, 2, 3], [3, 2, 1, 0]]
    hidden = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)).to(dtype)
    found = twin.Residual(adapter, "clip_l").apply(hidden, Matcher(adapter, "clip_l").match(rows))
    assert found.dtype == dtype
    # From zero states the edit itself comes out in float32; the relative rule needs the states' size.
    matches = Matcher(adapter, "clip_l").match(rows)
    wide = hidden.float()
    delta = twin.Residual(adapter, "clip_l").apply(wide.double(), matches) - wide.double()
    expected = hidden.float() + delta.float().to(dtype).float()
    assert torch.equal(found[2].view(torch.int16), hidden[2].view(torch.int16))
    assert torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rounds_exactly_once(dtype):
    values = {"entries": [(1, 2)], "vectors": [[0.1, 1 / 3, 2.0**-20]], "scales": [1, 1, 1]}
    adapter = make_adapter(make_concept("cat", (1, 2), **values))
    hidden = torch.tensor([[[0.3, -0.7, -0.0], [1.1, 5.0, -0.0], [9.0, -0.0, -0.0]]], dtype=dtype)
    found = twin.Residual(adapter, "clip_l").apply(hidden, Matcher(adapter, "clip_l").match([[1, 2]]))
    delta = torch.tensor(values["vectors"][0], dtype=torch.float32).to(dtype)
    expected = torch.cat([hidden[:, :2] + delta, hidden[:, 2:]], dim=1)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_bytes_stay_where_nothing_fires(dtype):
    adapter = make_adapter(make_concept("cat", (1, 2), rule="relative"))
    hidden = torch.full((3, 4, 3), -0.0, dtype=dtype)
    hidden[1] = float("nan")
    hidden[0, 2:] = -0.0
    word = torch.int32 if dtype == torch.float32 else torch.int16
    before = hidden.clone()
    found = twin.Residual(adapter, "clip_l").apply(hidden, Matcher(adapter, "clip_l").match([[1, 2], [0], [2, 1]]))
    assert found is not hidden
    assert torch.equal(hidden.view(word), before.view(word))
    untouched = torch.ones(3, 4, dtype=torch.bool)
    untouched[0, :2] = False
    assert torch.equal(found[untouched].view(word), before[untouched].view(word))


def test_ids_may_be_a_tensor():
    adapter = make_adapter(make_concept("cat", (1, 2)))
    matcher = Matcher(adapter, "clip_l")
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.int16):
        matches = twin.match_tensor(matcher, torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=dtype))
        assert matches.start.tolist() == [1, 0]
        assert twin.match_tensor(matcher, torch.tensor([1, 2], dtype=dtype)).start.tolist() == [0]
    assert twin.match_tensor(matcher, torch.tensor([[5, 6]])) is NO_MATCHES
    assert twin.match_tensor(matcher, torch.tensor([[0, 1], [1, 2]]).T).start.tolist() == [0]


@pytest.mark.parametrize("ids", [torch.zeros(2, 2), torch.zeros(1, 1, 1, dtype=torch.int64)])
def test_ids_must_be_integers_of_two_axes_at_most(ids):
    with pytest.raises(InputError, match="token ids are"):
        twin.match_tensor(Matcher(make_adapter(make_concept("cat", (1, 2))), "clip_l"), ids)


@law
@given(hidden=vectors((2, 5, 3)), lengths=st.none() | st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_the_mean_norm_agrees(hidden, lengths):
    found = twin.mean_norm(torch.from_numpy(hidden), None if lengths is None else torch.tensor(lengths))
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(reference_mean_norm(hidden, lengths), rel=1e-6)


def test_the_mean_norm_has_no_gradient():
    assert not twin.mean_norm(torch.ones(1, 2, 3, requires_grad=True)).requires_grad
    assert twin.mean_norm(torch.full((1, 1, 4), 60000, dtype=torch.float16)).tolist() == [120000]


@pytest.mark.parametrize("lengths", [[0, 1], [1, 6], [1], [1.0, 2.0]])
def test_lengths_must_fit_the_states(lengths):
    with pytest.raises(InputError, match="lengths"):
        twin.mean_norm(torch.ones(2, 5, 3), torch.tensor(lengths))


def test_states_must_be_floats_of_the_streams_width():
    adapter = make_adapter(make_concept("cat", (1, 2)))
    residual, matches = twin.Residual(adapter, "clip_l"), Matcher(adapter, "clip_l").match([[1, 2]])
    with pytest.raises(InputError, match=r"states are torch.int64, expected floats"):
        residual.apply(torch.zeros(1, 2, 3, dtype=torch.int64), matches)
    with pytest.raises(InputError, match=r"states have shape \[1, 2, 4\], expected \[B, L, 3\]"):
        residual.apply(torch.zeros(1, 2, 4), matches)
    with pytest.raises(InputError, match="has no stream 't5'"):
        twin.Residual(adapter, "t5")


# Gradients


def train_step(rules, overlap="sum", dtype=torch.float32):
    """States edited by trainable vectors and scales, and a scalar of them."""
    concepts = [
        make_concept(f"c{number}", (1, 2, 3), rule=rule, overlap=overlap, seed=number)
        for number, rule in enumerate(rules)
    ]
    adapter = make_adapter(*concepts)
    matches = Matcher(adapter, "clip_l").match([[1, 2, 3, 0], [0, 1, 2, 3]])
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 3)
    weight = torch.randn(2, 4, 3)
    edit = Editor(adapter, "clip_l").prepare(hidden.shape, matches, 1.0)
    table = adapter.streams["clip_l"]
    vectors = torch.from_numpy(table.vectors[edit.entries].astype(np.float32)).requires_grad_()
    scales = torch.from_numpy(table.scales[edit.concepts].astype(np.float32)).requires_grad_()

    def loss(vectors, scales):
        terms = twin.entry_terms(vectors, scales, edit.rules)[torch.from_numpy(edit.which)]
        rho = twin.mean_norm(hidden)[torch.from_numpy(edit.matches.row)]
        terms = torch.where(torch.from_numpy(edit.relative)[:, None], terms * rho[:, None], terms)
        edited = twin.add_delta(hidden.to(dtype), twin.sum_terms(edit, terms))
        return (edited.float() * weight).sum()

    return loss, vectors, scales


@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize(
    "rules", [["absolute"], ["absolute-tanh"], ["relative"], ["relative", "absolute", "absolute-tanh"]]
)
def test_gradients_reach_vectors_and_scales(rules, overlap):
    loss, vectors, scales = train_step(rules, overlap)
    loss(vectors, scales).backward()
    step = 1e-2  # the losses are smooth and float32 is coarse: central differences
    for parameter in (vectors, scales):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        for index in np.ndindex(*parameter.shape):
            changed = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in (vectors, scales)]
                moved[parameter is scales][index] += sign * step
                changed.append(loss(*moved).item())
            numeric = (changed[0] - changed[1]) / (2 * step)
            assert parameter.grad[index].item() == pytest.approx(numeric, rel=0.02, abs=5e-3)


def test_gradients_pass_through_half_precision_states():
    loss, vectors, scales = train_step(["absolute"], dtype=torch.bfloat16)
    loss(vectors, scales).backward()
    exact_loss, exact_vectors, exact_scales = train_step(["absolute"])
    exact_loss(exact_vectors, exact_scales).backward()
    assert torch.allclose(vectors.grad, exact_vectors.grad, rtol=2e-2, atol=2e-2)
    assert vectors.grad.dtype == torch.float32


def test_entry_terms_follow_the_rules():
    vectors, scales = torch.tensor([[3.0, 4.0]] * 3), torch.tensor([[0.5, -1.0]] * 3)
    terms = twin.entry_terms(vectors, scales, ["relative", "absolute", "absolute-tanh"])
    bounded = torch.tensor([0.5, -1.0]).tanh()
    expected = torch.stack([torch.tensor([0.6, 0.8]) * bounded, torch.tensor([1.5, -4.0]), vectors[0] * bounded])
    assert torch.allclose(terms, expected)
    assert twin.entry_terms(vectors.half(), scales.half(), ["absolute"] * 3).dtype == torch.float32


@pytest.mark.gpu
def test_everything_on_a_gpu():
    device = torch.device("cuda")
    rules = ["absolute", "relative", "absolute-tanh"]
    adapter = make_adapter(*(make_concept(f"c{i}", (1, 2, 3), rule=rule, seed=i) for i, rule in enumerate(rules)))
    rows = torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3], [3, 2, 1, 0]])
    matches = twin.match_tensor(Matcher(adapter, "clip_l"), rows.to(device))
    hidden = torch.randn(3, 4, 3)
    lengths = torch.tensor([4, 3, 2])
    residual = twin.Residual(adapter, "clip_l")
    expected = residual.apply(hidden, matches, lengths=lengths)
    found = residual.apply(hidden.to(device), matches, lengths=lengths.to(device))
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[2].cpu(), hidden[2])
    for dtype in HALVES:
        states = hidden.to(device, dtype)
        assert residual.apply(states, NO_MATCHES) is states
        assert residual.apply(states, matches).dtype == dtype


@pytest.mark.gpu
def test_the_absolute_rule_agrees_to_the_bit_on_a_gpu():
    adapter = make_adapter(make_concept("a", (1, 2, 3)), make_concept("b", (1, 2), activation="spans", overlap="mean"))
    matches = Matcher(adapter, "clip_l").match([[1, 2, 3, 1, 2]])
    hidden = torch.randn(1, 5, 3)
    expected = Residual(adapter, "clip_l").apply(hidden.numpy(), matches)
    found = twin.Residual(adapter, "clip_l").apply(hidden.cuda(), matches)
    assert bits(found.cpu().numpy()) == bits(expected)
