"""Sites of Wan: every block's cross-attention reads text states of its own at the trigger."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from video_builders import FRAMES, LENGTH, SIZE, TRIGGER, build_wan, copy_of, encode, make_adapter, make_clip_set

from engram_core import Adapter, Concept, IncompatibleAdaptersError, open_adapter
from engram_video import load_engram, set_strength, unload_engrams
from engram_video.families import WAN22
from engram_video.settings import Wan22TrainSettings
from engram_video.training.clips import train
from engram_vision.site_hooks import attached_sites
from engram_vision.sites import find_places, name_sites


def site_adapter(pipeline, *, seed=None, **options):
    """Return an adapter with sites; without a seed all of them have the same memory."""
    plain, sites = make_adapter(**options), name_sites(WAN22, pipeline)
    rng = np.random.default_rng(seed)
    concepts = []
    for concept in plain.concepts():
        stream = concept.streams["umt5"]
        vectors = stream.vectors[:, None].repeat(len(sites), axis=1)
        if seed is not None:
            vectors = vectors + rng.normal(size=vectors.shape).astype(np.float32)
        scales = stream.scales[None].repeat(len(sites), axis=0)
        concepts.append(
            Concept(record=concept.record, streams={"umt5": replace(stream, vectors=vectors, scales=scales)})
        )
    spec = replace(plain.manifest.streams["umt5"], sites=sites)
    return Adapter.build(replace(plain.manifest, streams={"umt5": spec}), concepts)


def draw(pipeline, *prompts, **options):
    options = {"width": SIZE, "height": SIZE, "num_frames": FRAMES, "num_inference_steps": 2} | options
    generator = torch.Generator().manual_seed(0)
    options |= {"output_type": "np", "max_sequence_length": LENGTH, "guidance_scale": 2.0}
    return pipeline(prompt=list(prompts), generator=generator, **options).frames


def test_equal_sites_draw_what_one_edit_of_the_text_draws(base, pipeline, one_thread):
    prompts = [f"a photo of {TRIGGER} in the snow", "a red ball"]
    load_engram(pipeline, make_adapter())
    expected = draw(pipeline, *prompts)
    unload_engrams(pipeline)
    load_engram(pipeline, site_adapter(base))
    found = draw(pipeline, *prompts)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found[0] - draw(base, *prompts)[0]).max() > 1e-2


def test_only_prompts_with_the_trigger_change(base, pipeline, one_thread):
    prompts = [TRIGGER, "a red ball", f"{TRIGGER} jumping", ""]
    load_engram(pipeline, site_adapter(base, seed=1), name="one")
    found, frozen = draw(pipeline, *prompts), draw(base, *prompts)
    changed = [one.tobytes() != other.tobytes() for one, other in zip(found, frozen, strict=True)]
    assert changed == [True, False, True, False]
    assert torch.equal(encode(pipeline, *prompts), encode(base, *prompts))
    set_strength(pipeline, "one", 0.0)
    assert draw(pipeline, *prompts).tobytes() == frozen.tobytes()
    set_strength(pipeline, "one", 1.0)
    assert draw(pipeline, *prompts).tobytes() == found.tobytes()
    unload_engrams(pipeline)
    assert draw(pipeline, *prompts).tobytes() == frozen.tobytes()
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())


def test_each_site_acts(base, pipeline, one_thread):
    adapter = site_adapter(base, seed=1)
    (concept,) = adapter.concepts()
    found = set()
    for site in range(len(name_sites(WAN22, base))):
        stream = concept.streams["umt5"]
        scales = np.zeros_like(stream.scales)
        scales[site] = stream.scales[site]
        one = Concept(record=concept.record, streams={"umt5": replace(stream, scales=scales)})
        load_engram(pipeline, Adapter.build(adapter.manifest, [one]))
        found.add(draw(pipeline, TRIGGER).tobytes())
        unload_engrams(pipeline)
    assert len(found | {draw(base, TRIGGER).tobytes()}) == len(name_sites(WAN22, base)) + 1


def test_both_transformers_of_a_model_with_two_have_sites(one_thread):
    base = build_wan(expand_timesteps=False, second=True)
    sites = name_sites(WAN22, base)
    assert sites == tuple(f"{name}.blocks.{n}.attn2" for name in ("transformer", "transformer_2") for n in (0, 1))
    pipeline = copy_of(base)
    adapter = site_adapter(base, seed=1)
    load_engram(pipeline, adapter)
    steps = {"num_inference_steps": 4}
    frozen, whole = draw(base, TRIGGER, **steps), draw(pipeline, TRIGGER, **steps)
    (concept,) = adapter.concepts()
    stream = concept.streams["umt5"]
    scales = stream.scales.copy()
    scales[:2] = 0  # what is left belongs to the later steps
    late = Concept(record=concept.record, streams={"umt5": replace(stream, scales=scales)})
    unload_engrams(pipeline)
    load_engram(pipeline, Adapter.build(adapter.manifest, [late]))
    partly = draw(pipeline, TRIGGER, **steps)
    assert len({frozen.tobytes(), whole.tobytes(), partly.tobytes()}) == 3
    with pytest.raises(IncompatibleAdaptersError, match="has 4 sites"):
        load_engram(build_wan(), adapter)


def test_clips_of_pictures_read_the_same_sites(base, pipeline, one_thread):
    picture = Image.new("RGB", (SIZE, SIZE), (200, 40, 20))
    plain = WanImageToVideoPipeline(**copy_of(base).components, expand_timesteps=True)
    animating = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    for each in (plain, animating):
        each.set_progress_bar_config(disable=True)
    load_engram(animating, site_adapter(base, seed=1))
    assert draw(animating, "a red ball", image=picture).tobytes() == draw(plain, "a red ball", image=picture).tobytes()
    assert draw(animating, TRIGGER, image=picture).tobytes() != draw(plain, TRIGGER, image=picture).tobytes()


def test_training_with_sites_writes_what_can_be_drawn(base, tmp_path, one_thread):
    base.save_pretrained(tmp_path / "model")
    settings = {
        "data": make_clip_set(tmp_path / "clips"),
        "trigger": TRIGGER,
        "output": tmp_path / "out.safetensors",
        "model": str(tmp_path / "model"),
        "sites": "blocks",
        "steps": 3,
        "vector_rate": 0.05,
        "init_scale": 0.2,
        "warm_up": 1,
        "width": SIZE,
        "height": SIZE,
        "frames": FRAMES,
        "precision": "fp32",
        "validate_every": 0,
        "device": "cpu",
    }
    files = []
    for checkpointing in (False, True):
        values = settings | {
            "gradient_checkpointing": checkpointing,
            "output": tmp_path / f"{checkpointing}.safetensors",
        }
        files.append(open_adapter(train(Wan22TrainSettings(**values)).output))
    one, other = (next(file.concepts()).streams["umt5"].vectors for file in files)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert one.shape[1] == len(find_places(WAN22, base.transformer)) == len({row.tobytes() for row in one[0]})
    pipeline = copy_of(base)
    load_engram(pipeline, files[0])
    assert attached_sites(pipeline.transformer) is not None
    assert draw(pipeline, TRIGGER).tobytes() != draw(base, TRIGGER).tobytes()
    assert draw(pipeline, "a red ball").tobytes() == draw(base, "a red ball").tobytes()
