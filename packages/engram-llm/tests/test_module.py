"""One layer's memory: the published formulas, written out token by token, and how it learns."""

import math

import pytest
import torch
from llm_builders import SETTINGS, WIDTH, full, make_ids, make_lookup, make_memory, make_model, make_settings, memories
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from engram_llm.memory import Memory
from engram_llm.module import MemoryLayer, ShortConvolution, Table


def rms_norm(values, weight, eps):
    return values / torch.sqrt(values.pow(2).mean(-1, keepdim=True) + eps) * weight


def published(memory, layer, ids, hidden):
    """The residual as arXiv:2601.07372 (section 2.2 to 2.4) and TinyEngram's module have it; one text, float64."""
    settings = memory.settings
    weights = {name: value.double() for name, value in memory.layers[str(layer)].state_dict().items()}
    ngrams = settings.hash_lookup(make_lookup())
    compressed = make_lookup()[ids.numpy()]
    hashes = torch.from_numpy(ngrams.addresses(compressed[None], layer))[0]
    sizes = ngrams.primes[layer].reshape(-1).tolist()
    tables = weights["multi_head_embedding.embedding.weight"].split(sizes)
    retrieved = torch.cat([table[hashes[:, head]] for head, table in enumerate(tables)], dim=-1)
    none = torch.zeros(WIDTH, dtype=torch.float64)
    value = retrieved @ weights["value_proj.weight"].T + weights.get("value_proj.bias", none)
    total = torch.zeros_like(hidden)
    for branch in range(settings.hc_mult):
        key = retrieved @ weights[f"key_projs.{branch}.weight"].T + weights.get(f"key_projs.{branch}.bias", none)
        key = rms_norm(key, weights[f"norm1.{branch}.weight"], 2.0**-23)
        query = rms_norm(hidden, weights[f"norm2.{branch}.weight"], 2.0**-23)
        score = (key * query).sum(-1) / math.sqrt(WIDTH)
        score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
        gated = torch.sigmoid(score)[:, None] * value
        normed = rms_norm(gated, weights[f"short_conv.norms.{branch}.weight"], 1e-5)
        kernel = weights["short_conv.conv.weight"][branch * WIDTH : (branch + 1) * WIDTH]
        reach = (settings.kernel_size - 1) * settings.dilation
        padded = F.pad(normed.T[None], (reach, 0))
        mixed = F.conv1d(padded, kernel, dilation=settings.dilation, groups=WIDTH)[0].T
        total = total + gated + F.silu(mixed)
    return total


@pytest.mark.parametrize("name", SETTINGS)
def test_the_residual_is_the_published_one(name):
    memory, model, ids = make_memory(SETTINGS[name], seed=3), make_model(), make_ids(1, 25)
    inputs, edited = {}, {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: inputs.__setitem__(number, args[0]), with_kwargs=True
        )
        for number, layer in enumerate(model.model.layers)
    ]
    with memories(model, memory):
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: edited.__setitem__(number, args[0]), with_kwargs=True
            )
            for number, layer in enumerate(model.model.layers)
        ]
        full(model, ids)
    for number in range(len(model.model.layers)):
        found = (edited[number] - inputs[number])[0]
        if number not in memory.settings.layer_ids:
            assert edited[number] is inputs[number]
            continue
        expected = published(memory, number, ids[0], inputs[number][0].double())
        assert expected.abs().mean() > 0.3
        assert (found - expected).abs().max() < 2e-5


def test_a_new_memory_has_the_first_values_of_the_field():
    memory = Memory(make_settings(hc_mult=2), make_lookup(), WIDTH)
    layer = memory.layers["1"]
    assert not layer.short_conv.conv.weight.any()
    assert not layer.multi_head_embedding.embedding.weight.any()
    for norms in (layer.norm1, layer.norm2, layer.short_conv.norms):
        assert all((norm.weight == 1).all() for norm in norms)
    assert layer.value_proj.weight.std() > 0.01
    assert layer.gate_floor == 0


def test_a_new_convolution_gives_zero():
    convolution = ShortConvolution(WIDTH, 2, 3)
    values = torch.randn(1, 5, 2, WIDTH)
    inputs = convolution.normalize(values)
    assert inputs.shape == (1, 5, 2 * WIDTH)
    assert not convolution([inputs, inputs, inputs]).any()


def test_without_bias_there_is_none():
    names = set(Memory(make_settings(bias=False), make_lookup(), WIDTH).state_dict())
    assert not any(name.endswith("bias") for name in names)
    assert {name.replace("weight", "bias") for name in names if "_proj" in name} == {
        name for name in Memory(make_settings(), make_lookup(), WIDTH).state_dict() if name.endswith("bias")
    }


@pytest.mark.parametrize("hc_mult", [1, 2])
def test_gates_are_at_least_the_floor(hc_mult):
    layer = make_memory(make_settings(hc_mult=hc_mult)).layers["1"]
    hidden, retrieved = torch.randn(2, 50, WIDTH), torch.randn(2, 50, layer.value_proj.in_features)
    free = layer.gates(hidden, retrieved)
    assert free.shape == (2, 50, hc_mult)
    assert 0 < free.min() < 0.4 < 0.6 < free.max() < 1
    layer.gate_floor = 0.5
    assert torch.equal(layer.gates(hidden, retrieved), free.clamp_min(0.5))
    layer.gate_floor = 1.0
    assert (layer.gates(hidden, retrieved) == 1).all()
    assert torch.equal(
        layer.values(hidden, retrieved), layer.value_proj(retrieved).unsqueeze(2).expand(2, 50, hc_mult, -1)
    )


def test_scores_are_summed_in_float32():
    layer = make_memory(dtype_free := make_settings()).layers["1"].to(torch.bfloat16)
    assert dtype_free.hc_mult == 1
    hidden = torch.randn(1, 5, WIDTH, dtype=torch.bfloat16)
    retrieved = torch.randn(1, 5, layer.value_proj.in_features, dtype=torch.bfloat16)
    assert layer.gates(hidden, retrieved).dtype == torch.float32
    assert layer.values(hidden, retrieved).dtype == torch.bfloat16


@pytest.mark.parametrize("sparse", [False, True])
def test_every_weight_learns(sparse):
    settings = SETTINGS["every layer, any order"]
    memory = Memory(settings, make_lookup(), WIDTH, lambda _, rows: Table(rows, settings.head_width, sparse=sparse))
    source = make_memory(settings)
    memory.load_state_dict(source.state_dict())
    model = make_model().requires_grad_(False)
    with memories(model, memory):
        model(make_ids(2, 20), use_cache=False).logits.square().mean().backward()
    for name, weight in memory.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.is_sparse == (sparse and "embedding" in name)
        gradient = weight.grad.coalesce().values() if weight.grad.is_sparse else weight.grad
        assert gradient.abs().max() > 0, name
        assert gradient.isfinite().all()
    assert all(weight.grad is None for weight in model.parameters())


def test_sparse_gradients_are_the_dense_ones():
    settings, gradients = make_settings(), []
    for sparse in (False, True):
        memory = Memory(settings, make_lookup(), WIDTH, lambda _, rows: Table(rows, settings.head_width, sparse=sparse))  # noqa: B023
        memory.load_state_dict(make_memory(settings).state_dict())
        model = make_model()
        with memories(model, memory):
            model(make_ids(2, 20), use_cache=False).logits.square().mean().backward()
        gradients.append(memory.layers["1"].multi_head_embedding.embedding.weight.grad)
    dense, sparse_one = gradients
    assert sparse_one.coalesce().indices().shape[1] < dense.shape[0]
    assert torch.allclose(sparse_one.to_dense(), dense, atol=1e-9)


def test_the_gate_has_a_gradient_at_a_score_of_zero():
    layer = make_memory().layers["1"]
    hidden = torch.zeros(1, 1, WIDTH, requires_grad=True)
    layer.values(hidden, torch.zeros(1, 1, layer.value_proj.in_features)).sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_layer_is_a_module_with_the_names_of_the_file():
    memory = make_memory(make_settings(hc_mult=2))
    layer = memory.layers["3"]
    assert isinstance(layer, MemoryLayer)
    n_rows = memory.addresses.n_rows[3]
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == memory.settings.shapes(WIDTH, n_rows)
    assert {name for name, _ in memory.named_buffers()} >= {"lookup", "addresses.primes"}
    assert not any(isinstance(part, nn.Embedding) and part.sparse for part in memory.modules())
