"""Training for models of several text encoders: every stream learns, as a step without any cache would teach it."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from vision_builders import SIZE, TRIGGER, Log, captions, write_pictures
from vision_families import (
    TRAIN_SETTINGS,
    WIDTH_T5,
    copy_family,
    draw_pictures,
    encode,
    frozen_states,
    ids_in,
    registry_of,
    width_of,
    words_of,
)

from engram_core import ConceptRecord, InputError, StreamSpec, open_adapter
from engram_core.torch import TrainableStream, add_delta
from engram_core.training.metrics import read_metrics
from engram_vision.dataset import CaptionedImage, read_dataset
from engram_vision.families import SD35, family_of
from engram_vision.loading import load_engram
from engram_vision.training import trainer
from engram_vision.training.frozen import TextReader, freeze
from engram_vision.training.initial import describe_vectors
from engram_vision.training.objectives import Diffusion, Flow, make_objective
from engram_vision.training.pictures import encode_pictures, encode_views
from engram_vision.training.state import load_state
from engram_vision.training.trainer import METRICS, PREVIEWS, STATE, train

CPU = torch.device("cpu")

# The scheduler of diffusers is older than NumPy's way to copy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=["sdxl", "sd35"])
def base(request, base_of):
    return base_of(request.param)


def settings_for(base, folder_of, tmp_path, **values):
    """Return settings for a run of a second, on three pictures that are written where they are not yet."""
    name = family_of(base).name
    if not (tmp_path / "pictures").exists():
        write_pictures(tmp_path / "pictures", captions())
    fields = {
        "data": tmp_path / "pictures",
        "trigger": TRIGGER,
        "output": tmp_path / "out.safetensors",
        "model": str(folder_of(name)),
        "steps": 4,
        "batch_size": 2,
        "vector_rate": 0.05,
        "scale_rate": 0.01,
        "init_scale": 0.1,
        "warm_up": 1,
        "validate_every": 0,
        "precision": "fp32",
        "device": "cpu",
    }
    return TRAIN_SETTINGS[name](**fields | values)


@pytest.fixture
def run(base, folder_of, tmp_path):
    """Return a function that trains and returns report and adapter."""

    def start(log=None, *, resume=False, overwrite=False, **values):
        settings = settings_for(base, folder_of, tmp_path, **values)
        report = train(settings, resume=resume, overwrite=overwrite, watcher=log)
        return report, open_adapter(report.output)

    return start


def tables_of(adapter):
    return next(adapter.concepts()).streams


# A run


def test_every_stream_learns_and_the_adapter_says_so(base, run, folder_of):
    family = family_of(base)
    report, adapter = run(validate_every=2)
    assert np.isfinite(report.loss)
    manifest = adapter.manifest
    assert (manifest.backbone, manifest.base_model) == (family.name, folder_of(family.name).name)
    assert set(manifest.streams) == set(family.streams)
    for stream, part in family.streams.items():
        spec = manifest.streams[stream]
        assert (spec.width, spec.site) == (width_of(base, stream), part.site)
        assert spec.tokenizer == words_of(stream).spec
        table, registry = tables_of(adapter)[stream], registry_of(stream, TRIGGER)
        assert registry.variants[0].ids in table.triggers
        assert report.entries[stream] == len(table.entries) > 0
        assert np.abs(table.scales - 0.1).max() > 1e-3
    record = next(adapter.records())
    assert record.rule == "relative"
    told = {"sdxl": {"min_snr"}, "sd35": {"logit_mean", "logit_std"}}[family.name]
    assert told - {"min_snr"} <= record.training.keys()


def test_what_was_learned_can_be_drawn_and_acts_in_every_stream(base, run):
    _, adapter = run()
    pipeline = copy_family(base)
    load_engram(pipeline, adapter)
    assert draw_pictures(pipeline, ["a red ball"]) == draw_pictures(base, ["a red ball"])
    assert draw_pictures(pipeline, [TRIGGER]) != draw_pictures(base, [TRIGGER])
    changed = (encode(pipeline, TRIGGER)["prompt"] != encode(base, TRIGGER)["prompt"])[0]
    assert changed.any(dim=-1).sum() == (4 if family_of(base) is not SD35 else 4 + 4)


def test_the_same_run_gives_the_same_file_and_an_interrupted_one_too(base, run, tmp_path):
    def stop():
        raise KeyboardInterrupt

    options = {"steps": 5, "validate_every": 2, "validation_draws": 1, "save_every": 1, "flip": True}
    whole, _ = run(**options)
    expected = whole.output.read_bytes()
    lines = [line["loss"] for line in read_metrics(whole.run_dir / METRICS)]
    with pytest.raises(KeyboardInterrupt):
        run(Log({2: stop}), overwrite=True, **options)
    _, groups = load_state(tmp_path / "out.run" / STATE)
    assert set(groups["visited"]) == set(family_of(base).streams)
    again, _ = run(resume=True, overwrite=True, **options)
    assert again.output.read_bytes() == expected
    assert [line["loss"] for line in read_metrics(again.run_dir / METRICS)] == lines


def test_losses_and_vectors_are_those_of_steps_that_encode_everything_anew(base, run, monkeypatch):
    options = {"steps": 4, "save_every": 1, "batch_size": 3}
    cached, adapter = run(**options)
    found = [line["loss"] for line in read_metrics(cached.run_dir / METRICS)]
    monkeypatch.setattr(trainer._Run, "_losses", lambda _, parts: [plain_losses(base, *part) for part in parts])
    plain, expected = run(overwrite=True, **options)
    losses = [line["loss"] for line in read_metrics(plain.run_dir / METRICS)]
    assert len(losses) == 4
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for stream, table in tables_of(adapter).items():
        np.testing.assert_allclose(table.vectors, tables_of(expected)[stream].vectors, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(table.scales, tables_of(expected)[stream].scales, rtol=1e-3, atol=1e-5)


def plain_losses(base, pupil, batch, data):
    """Return a batch's losses by the book: the encoders run anew, everything is put together by hand."""
    family, states, pooled = family_of(base), {}, {}
    for stream, part in family.streams.items():
        ids = data.texts[stream].ids[batch.texts]
        with torch.no_grad():
            output = getattr(base, part.encoder)(ids, output_hidden_states=stream != "t5")
        states[stream] = (output[0] if stream == "t5" else output.hidden_states[-2], ids)
        pooled[stream] = getattr(output, "text_embeds", None)
    deltas = pupil.model(states)
    edited = {stream: add_delta(parts[0], deltas[stream]) for stream, parts in states.items()}
    clip = torch.cat([edited["clip_l"], edited["clip_g"]], dim=-1)
    if family is SD35:
        share = batch.times[:, None, None, None]
        noisy, target = (1 - share) * batch.latents + share * batch.noise, batch.noise - batch.latents
        rest = torch.zeros(*clip.shape[:2], WIDTH_T5 - clip.shape[2])
        guess = base.transformer(
            hidden_states=noisy,
            timestep=1000 * batch.times,
            encoder_hidden_states=torch.cat([torch.cat([clip, rest], dim=-1), edited["t5"]], dim=1),
            pooled_projections=torch.cat([pooled["clip_l"], pooled["clip_g"]], dim=-1),
        ).sample
    else:
        share = base.scheduler.alphas_cumprod[batch.times][:, None, None, None]
        noisy, target = share.sqrt() * batch.latents + (1 - share).sqrt() * batch.noise, batch.noise
        sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).expand(len(noisy), -1).float()
        added = {"text_embeds": pooled["clip_g"], "time_ids": sizes}
        guess = base.unet(noisy, batch.times, encoder_hidden_states=clip, added_cond_kwargs=added).sample
    return (guess - target).square().mean(dim=(1, 2, 3))


def test_gradient_checkpointing_changes_nothing(run):
    _, plain = run()
    _, saved = run(gradient_checkpointing=True, overwrite=True)
    for stream, table in tables_of(saved).items():
        np.testing.assert_allclose(table.vectors, tables_of(plain)[stream].vectors, rtol=1e-4, atol=1e-6)


def test_the_frozen_model_can_be_bfloat16(run):
    report, adapter = run(precision="bf16", steps=2)
    assert np.isfinite(report.loss)
    assert all(table.vectors.dtype == np.float32 for table in tables_of(adapter).values())


def test_previews_are_drawn_with_every_encoder(run, monkeypatch):
    monkeypatch.setattr("engram_vision.training.pictures._PREVIEW_STEPS", 2)
    options = {"steps": 4, "keep": "last"}
    report, adapter = run(preview_every=2, preview_prompts=(TRIGGER, "a red ball"), **options)
    pictures = sorted((report.run_dir / PREVIEWS).iterdir())
    assert [path.name for path in pictures] == [f"step-{step:06d}-{number}.png" for step in (2, 4) for number in (0, 1)]
    with Image.open(pictures[1]) as first, Image.open(pictures[3]) as last:
        assert first.tobytes() == last.tobytes()
    _, without = run(overwrite=True, **options)
    for stream, table in tables_of(without).items():
        assert table.vectors.tobytes() == tables_of(adapter)[stream].vectors.tobytes()


def test_training_can_begin_from_words(base, run):
    report, adapter = run(init="a red ball", steps=1, vector_rate=1e-9, scale_rate=1e-9)
    assert np.isfinite(report.loss)
    assert next(adapter.records()).training["init"] == "a red ball"


def test_a_caption_that_one_encoder_cuts_is_refused_with_the_stream(base, run, tmp_path):
    write_pictures(tmp_path / "long", ["a red ball in the snow " * 6 + TRIGGER])
    with pytest.raises(InputError, match=r"long/0.png: the caption has 40 tokens and clip_l reads 30.*cuts.*off"):
        run(data=tmp_path / "long")


# Without T5


def test_without_t5_the_adapter_has_no_such_stream(base_of, folder_of, tmp_path):
    log = Log()
    settings = settings_for(base_of("sd35"), folder_of, tmp_path, without_t5=True)
    report = train(settings, watcher=log)
    adapter = open_adapter(report.output)
    assert set(adapter.manifest.streams) == set(report.entries) == {"clip_l", "clip_g"}
    assert any("no text_encoder_3" in note and "no stream t5" in note for note in log.notes)
    whole = copy_family(base_of("sd35"))
    load_engram(whole, adapter)
    changed = (encode(whole, TRIGGER)["prompt"] != encode(base_of("sd35"), TRIGGER)["prompt"])[0].any(dim=-1)
    assert changed.sum() == 4


# First values


@pytest.mark.parametrize(("rule", "scale"), [("absolute", 0.5), ("absolute-tanh", 0.5), ("relative", 0.01)])
def test_in_every_stream_a_trigger_begins_near_the_words_that_describe_it(base, rule, scale):
    family = family_of(base)
    for stream, part in family.streams.items():
        words = "a red ball"
        reader = TextReader(family, base, stream, words_of(stream), CPU)
        registry = registry_of(stream, TRIGGER)
        vectors = describe_vectors(reader, registry, words, rule=rule, overlap="sum", scale=scale)
        assert vectors.shape == (registry.n_slots, width_of(base, stream))
        spec = StreamSpec(width=reader.width, site=part.site, tokenizer=reader.tokenizer.spec)
        record = ConceptRecord(name="x", trigger=TRIGGER, rule=rule)
        learner = TrainableStream(record, registry, spec, vectors, torch.full((reader.width,), scale))
        before = reader.n_opening
        own, theirs = (torch.from_numpy(frozen_states(base, stream, [text])[0]) for text in (TRIGGER, words))
        length, n_words = (len(reader.tokenizer.encode(text)) for text in (TRIGGER, words))
        target = theirs[0, before : before + n_words][torch.linspace(0, n_words - 1, length).round().long()]
        with torch.no_grad():
            edited = add_delta(own, learner(own, ids_in(base, stream, [TRIGGER])))
        far, near = (float((one[0, before : before + length] - target).norm()) for one in (own, edited))
        assert near < (0.99 if rule == "relative" else 0.75) * far


# Frozen data


def freeze_all(base, items, **options):
    family = family_of(base)
    readers = {stream: TextReader(family, base, stream, words_of(stream), CPU) for stream in family.streams}
    registries = {stream: registry_of(stream, TRIGGER) for stream in family.streams}
    given = {"resolution": SIZE, "flip": False, "crops": 1, "seed": 0, "device": CPU, "advance": lambda done: None}
    return freeze(readers, items, registries, lambda: encode_pictures(base.vae, items, **given | options))


@pytest.fixture
def pictures(tmp_path):
    return read_dataset(write_pictures(tmp_path / "pictures", captions()), TRIGGER)


def test_every_variant_of_every_stream_is_shown_by_some_form_of_each_caption(base, pictures):
    data = freeze_all(base, pictures)
    for stream in family_of(base).streams:
        ids = data.texts[stream].ids.tolist()
        for forms in data.captions:
            for variant in registry_of(stream, TRIGGER).variants:
                assert any(holds(ids[row], variant.ids) for row in forms)
    assert all(len(texts.ids) == len(next(iter(data.texts.values())).ids) for texts in data.texts.values())


def holds(ids, part):
    return any(tuple(ids[first : first + len(part)]) == part for first in range(len(ids)))


def test_latents_are_shifted_and_scaled_as_the_pipeline_undoes_it(base):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    mean, std = encode_views(base.vae, [picture], CPU)
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = base.vae.encode(pixels).latent_dist
    config = base.vae.config
    assert bool(config.shift_factor) == (family_of(base) is SD35)
    shift = config.shift_factor or 0
    torch.testing.assert_close(mean, (found.mean - shift) * config.scaling_factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, found.std * config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_a_half_precision_vae_that_overflows_computes_in_full(base):
    vae = copy_family(base).vae.to(torch.float16)
    assert vae.config.force_upcast
    mean, _ = encode_views(vae, [Image.new("RGB", (SIZE, SIZE))], CPU)
    assert vae.dtype == torch.float16
    assert mean.dtype == torch.float32


def test_captions_of_one_picture_keep_one_row_for_all_streams(base, pictures):
    items = [*pictures, CaptionedImage(path=pictures[0].path, caption=pictures[0].caption)]
    data = freeze_all(base, items)
    assert data.captions[3] == data.captions[0]
    rows = [forms[0] for forms in data.captions[:3]]
    for stream, texts in data.texts.items():
        assert torch.equal(texts.ids[rows], ids_in(base, stream, captions()))
        assert (texts.pooled is None) == (stream == "t5" or (stream, family_of(base).name) == ("clip_l", "sdxl"))


# The flow


class Guess:
    """Guesses a constant, and keeps what it was given."""

    dtype = torch.float32

    def __call__(self, *, hidden_states, timestep, **conditions):
        self.noisy, self.times, self.conditions = hidden_states, timestep, conditions
        return type("Output", (), {"sample": torch.full_like(hidden_states, 0.25)})


def flow(*, shift=3.0, guess=None, **options):
    return Flow(guess or Guess(), FlowMatchEulerDiscreteScheduler(shift=shift), **options)


def test_the_loss_is_the_mean_square_of_the_velocity():
    guess = Guess()
    times = torch.tensor([0.0, 0.25, 0.5, 1.0])
    latents, noise = torch.randn(2, 4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    states = torch.ones(4, 5, 6)
    losses = flow(guess=guess).losses(latents, noise, times, {"encoder_hidden_states": states})
    share = times[:, None, None, None]
    torch.testing.assert_close(guess.noisy, (1 - share) * latents + share * noise)
    assert guess.times.tolist() == [0, 250, 500, 1000]
    assert torch.equal(guess.conditions["encoder_hidden_states"], states)
    torch.testing.assert_close(losses, (0.25 - (noise - latents)).square().mean(dim=(1, 2, 3)))
    assert (losses.shape, losses.dtype) == ((4,), torch.float32)


def test_a_model_that_knows_the_velocity_has_no_loss_and_the_sampler_goes_back_along_it():
    class Oracle(Guess):
        def __call__(self, *, hidden_states, timestep):
            return type("Output", (), {"sample": noise - latents})

    latents, noise = torch.randn(2, 1, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    objective = flow(guess=Oracle())
    assert objective.losses(latents, noise, torch.tensor([0.3]), {}).item() == 0
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    sample = noise
    for time in scheduler.timesteps:
        sample = scheduler.step(noise - latents, time, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=1e-4, atol=1e-4)


def test_conditions_and_latents_come_in_the_models_number_type():
    guess = Guess()
    guess.dtype = torch.bfloat16
    latents, noise = torch.randn(2, 2, 8, 3, 3)
    conditions = {"pooled_projections": torch.zeros(2, 3), "added": {"time_ids": torch.zeros(2, 6)}}
    losses = flow(guess=guess).losses(latents, noise, torch.tensor([0.5, 0.7]), conditions)
    assert guess.noisy.dtype == guess.conditions["pooled_projections"].dtype == torch.bfloat16
    assert guess.conditions["added"]["time_ids"].dtype == torch.bfloat16
    assert guess.times.dtype == losses.dtype == torch.float32


@examples(max_examples=8, deadline=None)
@given(mean=st.floats(-1, 1), std=st.floats(0.3, 2), shift=st.sampled_from([1.0, 3.0, 6.0]), seed=st.integers(0, 99))
def test_times_are_logit_normal_then_shifted(mean, std, shift, seed):
    count = 4000
    found = flow(shift=shift, mean=mean, std=std).spread_times(count, torch.Generator().manual_seed(seed))
    assert found.dtype == torch.float32
    assert found.min() > 0
    assert found.max() <= 1
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = torch.sigmoid(drawn * std + mean)
    expected = shift * times / (1 + (shift - 1) * times)
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):
        assert torch.quantile(found.double(), share).item() == pytest.approx(
            torch.quantile(expected, share).item(), abs=0.035
        )


def test_the_shift_is_the_samplers():
    plain, shifted = (FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.double() for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    one, three = (flow(shift=shift).spread_times(9, torch.Generator().manual_seed(1)).double() for shift in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one / (1 + 2 * one), rtol=1e-5, atol=1e-6)


def test_the_times_of_a_batch_cover_all_noise_levels():
    orders = set()
    for seed in range(30):
        times = flow(shift=1.0).spread_times(4, torch.Generator().manual_seed(seed))
        parts = (torch.special.ndtr(torch.logit(times.double())) * 4).long().tolist()
        assert sorted(parts) == [0, 1, 2, 3]
        orders.add(tuple(parts))
    assert len(orders) > 8


def test_a_scheduler_of_another_objective_is_refused():
    with pytest.raises(InputError, match="scheduler is DDPMScheduler, expected one that matches flows"):
        Flow(Guess(), DDPMScheduler())


def test_each_family_has_its_objective(base, base_of, folder_of, tmp_path):
    settings = settings_for(base, folder_of, tmp_path)
    assert type(make_objective(settings, base)) is (Flow if family_of(base) is SD35 else Diffusion)
    assert type(make_objective(settings_for(base_of("sd15"), folder_of, tmp_path), base_of("sd15"))) is Diffusion
