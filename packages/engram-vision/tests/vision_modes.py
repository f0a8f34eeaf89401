"""Ways to use a pipeline, and the two promises that hold in each; for engrams with sites as well."""

import tempfile
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from transformers import BitsAndBytesConfig
from vision_builders import TRIGGER
from vision_families import (
    as_bytes,
    copy_family,
    draw_pictures,
    edited_states,
    encode,
    family_adapter,
    joined,
    modules_of,
)

from engram_vision.families import family_of
from engram_vision.loading import list_engrams, load_engram, unload_engrams

SILENT = ["a red ball", ""]
MIXED = [f"a photo of {TRIGGER} in the snow", "a red ball", TRIGGER, ""]
FIRES = [True, False, True, False]


def encoders_of(pipeline):
    return family_of(pipeline).encoders(pipeline)


def denoiser_of(pipeline):
    return getattr(pipeline, family_of(pipeline).denoiser)


def expected_states(base, adapter, texts, **options):
    """Return the prompt embedding by the NumPy reference; `base` has nothing loaded."""
    return joined(
        family_of(base), {name: edited_states(base, name, texts, adapter, **options) for name in encoders_of(base)}
    )


def states(pipeline, texts, **options):
    return encode(pipeline, texts, **options)["prompt"].float().numpy()


def differing(found, expected):
    return [one != other for one, other in zip(found, expected, strict=True)]


# Modes


def in_bf16(pipeline):
    pipeline.to(torch.bfloat16)


def in_fp16(pipeline):
    pipeline.to(torch.float16)


def with_model_offload(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")


def with_sequential_offload(pipeline):
    """Do what `enable_sequential_cpu_offload` does, which refuses to work without a GPU."""
    for module in modules_of(pipeline).values():
        cpu_offload(module, torch.device("cpu"))


def with_group_offload(kind):
    def apply(pipeline):
        for module in (*encoders_of(pipeline).values(), denoiser_of(pipeline)):
            options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            apply_group_offloading(module, onload_device=torch.device("cpu"), offload_type=kind, **options)

    return apply


def with_dynamic_int8(pipeline):
    for stream, encoder in encoders_of(pipeline).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear}, dtype=torch.qint8)
        setattr(pipeline, family_of(pipeline).streams[stream].encoder, quantised)


def with_torchao_int8(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        for encoder in encoders_of(pipeline).values():
            quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig())


def with_bitsandbytes_int8(pipeline):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True)
    for stream, encoder in encoders_of(pipeline).items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder.save_pretrained(folder)
            quantised = type(encoder).from_pretrained(folder, quantization_config=config, device_map="cpu")
        setattr(pipeline, family_of(pipeline).streams[stream].encoder, quantised)


def with_compiled_denoiser(pipeline):
    name = family_of(pipeline).denoiser
    setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend="eager"))


def with_compiled_encoders(pipeline):
    for stream, encoder in encoders_of(pipeline).items():
        setattr(pipeline, family_of(pipeline).streams[stream].encoder, torch.compile(encoder, backend="eager"))


def with_encoders_compiled_in_place(pipeline):
    for encoder in encoders_of(pipeline).values():
        encoder.compile(backend="eager")


def with_slices_and_tiles(pipeline):
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()


EAGER_MODES = {
    "bf16": in_bf16,
    "fp16": in_fp16,
    "model offload": with_model_offload,
    "sequential offload": with_sequential_offload,
    "groups of leaves": with_group_offload("leaf_level"),
    "groups of blocks": with_group_offload("block_level"),
    "dynamic int8": with_dynamic_int8,
    "torchao int8": with_torchao_int8,
    "bitsandbytes int8": with_bitsandbytes_int8,
    "slices and tiles": with_slices_and_tiles,
}
COMPILED_MODES = {
    "compiled denoiser": with_compiled_denoiser,
    "compiled encoders": with_compiled_encoders,
    "encoders compiled in place": with_encoders_compiled_in_place,
}


# What a pipeline gets in place of its encoders is loaded into anew.
REPLACING = {with_dynamic_int8, with_bitsandbytes_int8}


def has_sites(adapter):
    return any(spec.sites for spec in adapter.manifest.streams.values())


def check_law(base, mode, *, warm=False, adapter=None):
    """Check that a mode keeps both promises, whether it or the engram comes first, and that unloading restores it.

    With `warm` the pipeline has drawn before it is loaded into, so that whatever is compiled was compiled without.
    """
    adapter = adapter or family_adapter(base)
    never, after, before = (copy_family(base) for _ in range(3))
    mode(never)
    mode(after)
    if warm:
        draw_pictures(after, MIXED)
        encode(after, SILENT)
    load_engram(after, adapter)
    load_engram(before, adapter)
    mode(before)
    if mode in REPLACING:
        assert list_engrams(before) == ()
        load_engram(before, adapter)
    frozen = draw_pictures(never, MIXED)
    assert len(set(frozen)) == len(frozen)
    for pipeline in (after, before):
        assert draw_pictures(pipeline, SILENT) == draw_pictures(never, SILENT)
        assert as_bytes(encode(pipeline, SILENT)) == as_bytes(encode(never, SILENT))
        assert differing(draw_pictures(pipeline, MIXED), frozen) == FIRES
    assert states(after, MIXED).tobytes() == states(before, MIXED).tobytes()
    if has_sites(adapter):
        assert states(after, MIXED).tobytes() == states(never, MIXED).tobytes()
    elif encode(never, "")["prompt"].dtype == torch.float32:
        assert states(after, MIXED).tobytes() == expected_states(never, adapter, MIXED).tobytes()
    unload_engrams(after)
    assert draw_pictures(after, MIXED) == frozen
