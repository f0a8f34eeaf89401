"""A training run learns what plain PyTorch would learn, changes nothing frozen, and writes what it says."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from vision_builders import (
    LENGTH,
    LOUD,
    TRIGGER,
    WIDTH,
    Log,
    build_model,
    captions,
    copy_of,
    ids_of,
    train_settings,
    weights_of,
    write_pictures,
)

from engram_core import InputError, TargetExistsError, TrainingError, TriggerError, open_adapter
from engram_core.settings import Layer, resolve_settings
from engram_core.training.metrics import read_metrics
from engram_vision.dataset import read_dataset
from engram_vision.drawing import Drawing, draw
from engram_vision.images import fit_square, load_picture
from engram_vision.loading import load_engram
from engram_vision.settings import SD15TrainSettings
from engram_vision.training import pictures, preparation, pupil
from engram_vision.training.batches import Batch, draw_batch
from engram_vision.training.frozen import FrozenData
from engram_vision.training.objectives import Diffusion
from engram_vision.training.state import load_state
from engram_vision.training.trainer import METRICS, PREVIEWS, SETTINGS, STATE, train


@pytest.fixture
def run(tmp_path, model):
    """Return a function that trains on three pictures and returns report and adapter."""
    write_pictures(tmp_path / "pictures", captions())

    def start(log=None, *, resume=False, overwrite=False, model=model, **values):
        settings = train_settings(tmp_path, model, **values)
        report = train(settings, resume=resume, overwrite=overwrite, watcher=log)
        return report, open_adapter(report.output)

    return start


def vectors_of(adapter):
    return next(adapter.concepts()).streams["clip_l"].vectors


def scales_of(adapter):
    return next(adapter.concepts()).streams["clip_l"].scales


# The same as plain PyTorch


def plain_training(pipeline, settings):
    """Train without any cache or class of the project but for random numbers; returns losses, vectors, scales."""
    data = read_dataset(settings.data, settings.trigger)
    pictures = [np.asarray(fit_square(load_picture(item.path), 32), np.float32) / 127.5 - 1 for item in data]
    trigger = pipeline.tokenizer(settings.trigger, add_special_tokens=False).input_ids
    spans = sorted(
        {tuple(trigger[i : i + n]) for n in range(2, len(trigger) + 1) for i in range(len(trigger) - n + 1)},
        key=lambda span: (len(span), span),
    )
    # The slots are numbered by length and place in the trigger, the entries by length and ids.
    slots = [tuple(trigger[i : i + n]) for n in range(2, len(trigger) + 1) for i in range(len(trigger) - n + 1)]
    generator = torch.Generator().manual_seed(settings.seed)
    vectors = (torch.randn(len(slots), WIDTH, generator=generator) * settings.init_std).requires_grad_()
    scales = torch.full((WIDTH,), settings.init_scale, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [vectors], "lr": settings.vector_rate}, {"params": [scales], "lr": settings.scale_rate}],
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / (settings.warm_up + 1)
            if step < settings.warm_up
            else (settings.steps - step) / (settings.steps - settings.warm_up)
        ),
    )
    share = pipeline.scheduler.alphas_cumprod
    losses = []
    for step in range(settings.steps):
        total = 0.0
        for part in range(settings.accumulate):
            views, epsilon, noise, times = random_numbers(len(data), settings, step * settings.accumulate + part)
            pixels = torch.from_numpy(np.stack([pictures[view] for view in views]).transpose(0, 3, 1, 2))
            with torch.no_grad():
                encoded = pipeline.vae.encode(pixels).latent_dist
                latents = (encoded.mean + encoded.std * epsilon) * pipeline.vae.config.scaling_factor
                ids = ids_of(pipeline, *(data[view].caption for view in views))
                states = pipeline.text_encoder(ids)[0]
            rows = []
            for row, tokens in enumerate(ids.tolist()):
                delta = torch.zeros(LENGTH, WIDTH)
                for place in range(LENGTH):
                    for span in spans:
                        if tuple(tokens[place : place + len(span)]) == span:
                            vector = vectors[slots.index(span)]
                            if settings.rule == "relative":
                                size = states[row].norm(dim=-1).mean()
                                edit = vector / vector.norm() * scales.tanh() * size
                            else:
                                edit = vector * scales
                            delta = delta + torch.nn.functional.pad(
                                edit.expand(len(span), -1), (0, 0, place, LENGTH - place - len(span))
                            )
                rows.append(states[row] + delta)
            alpha = share[times][:, None, None, None]
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            guess = pipeline.unet(noisy, times, torch.stack(rows)).sample
            target = noise
            snr = share[times] / (1 - share[times])
            weight = torch.ones(len(times)) if settings.min_snr is None else snr.clamp(max=settings.min_snr) / snr
            if pipeline.scheduler.config.prediction_type == "v_prediction":
                target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
                if settings.min_snr is not None:
                    weight = snr.clamp(max=settings.min_snr) / (snr + 1)
            loss = ((guess - target).square().mean(dim=(1, 2, 3)) * weight).mean() / settings.accumulate
            loss.backward()
            total += loss.item()
        losses.append(total)
        for parameter in (vectors, scales):
            torch.nn.utils.clip_grad_norm_(parameter, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses, vectors.detach()[[slots.index(span) for span in spans]].numpy(), scales.detach().numpy()


def random_numbers(n_pictures, settings, number):
    """Return which pictures a batch shows, and its random numbers, drawn from data that give them away."""
    diffusion = Diffusion(None, build_model().scheduler)
    mean = torch.arange(n_pictures, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 8, 8)
    forms = ((0,),) * n_pictures
    options = {"size": settings.batch_size, "number": number, "seed": settings.seed}
    told = FrozenData(mean=mean, std=torch.zeros_like(mean), texts={}, captions=forms, origin={})
    drawn = FrozenData(mean=torch.zeros_like(mean), std=torch.ones_like(mean), texts={}, captions=forms, origin={})
    batch = draw_batch(drawn, diffusion, **options)
    views = draw_batch(told, diffusion, **options).latents[:, 0, 0, 0].int().tolist()
    return views, batch.latents, batch.noise, batch.times


@pytest.mark.parametrize(
    ("prediction", "values"),
    [
        ("epsilon", {}),
        ("epsilon", {"min_snr": 5.0, "accumulate": 2, "rule": "relative"}),
        ("v_prediction", {"warm_up": 0, "weight_decay": 0.1}),
        ("v_prediction", {"min_snr": 5.0, "max_grad_norm": 0.01, "seed": 3}),
    ],
)
def test_losses_and_vectors_are_those_of_plain_pytorch(run, tmp_path, model, v_model, prediction, values):
    folder = model if prediction == "epsilon" else v_model
    # Saving at each step logs each step.
    values = {"steps": 6, "batch_size": 3, "save_every": 1, "keep": "last", "init_std": 0.3} | values
    report, adapter = run(model=folder, **values)
    settings = train_settings(tmp_path, folder, **values)
    losses, vectors, scales = plain_training(build_model(prediction=prediction), settings)
    found = [line["loss"] for line in read_metrics(report.run_dir / METRICS)]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(vectors_of(adapter), vectors, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scales_of(adapter), scales, rtol=1e-3, atol=1e-5)
    assert np.abs(scales - settings.init_scale).max() > 1e-3


def test_batches_that_accumulate_act_as_one(run, monkeypatch):
    _, whole = run(batch_size=4, keep="last")

    def draw_part(data, diffusion, *, size, number, seed):
        batch = draw_batch(data, diffusion, size=2 * size, number=number // 2, seed=seed)
        return batch.part(number % 2 * size, size)

    monkeypatch.setattr(pupil, "draw_batch", draw_part)
    _, parts = run(batch_size=2, accumulate=2, keep="last", overwrite=True)
    np.testing.assert_allclose(vectors_of(parts), vectors_of(whole), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scales_of(parts), scales_of(whole), rtol=1e-4, atol=1e-6)
    assert vectors_of(parts).tobytes() != vectors_of(run(batch_size=2, overwrite=True)[1]).tobytes()


def test_gradient_checkpointing_saves_memory_and_changes_nothing(run):
    _, plain = run()
    _, saved = run(gradient_checkpointing=True, overwrite=True)
    np.testing.assert_allclose(vectors_of(saved), vectors_of(plain), rtol=1e-4, atol=1e-6)


def test_the_frozen_model_can_be_bfloat16(run):
    report, adapter = run(precision="bf16")
    _, plain = run(overwrite=True)
    assert np.isfinite(report.loss)
    assert vectors_of(adapter).dtype == np.float32
    found, expected = vectors_of(adapter), vectors_of(plain)
    assert found.tobytes() != expected.tobytes()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def test_the_same_run_gives_the_same_file(run):
    first, _ = run(steps=4)
    second, _ = run(steps=4, overwrite=True)
    other, _ = run(steps=4, seed=1, overwrite=True)
    assert first.identity == second.identity != other.identity


# What learns, and what does not


def test_only_vectors_and_scales_change(run, monkeypatch):
    kept = []

    def load(*args, **options):
        pipeline = load_pipeline(*args, **options)
        parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
        kept.append((type("Parts", (), parts), weights_of(pipeline)))
        return pipeline

    load_pipeline = preparation.load_pipeline
    monkeypatch.setattr(preparation, "load_pipeline", load)
    _, adapter = run(preview_every=3, gradient_checkpointing=True)
    ((parts, before),) = kept
    assert weights_of(parts) == before
    weights = [weight for name in ("unet", "vae", "text_encoder") for weight in getattr(parts, name).parameters()]
    assert all(weight.grad is None for weight in weights)
    assert not parts.text_encoder._forward_hooks
    start = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02
    assert np.abs(vectors_of(adapter) - start.numpy()).max() > 0.02
    assert np.abs(scales_of(adapter) - 0.5).max() > 0.002


def test_every_variant_that_was_shown_is_stored(run, tmp_path):
    write_pictures(tmp_path / "loud", captions(LOUD))
    _, adapter = run(data=tmp_path / "loud", trigger=LOUD, steps=16, validate_every=0)
    assert len(next(adapter.concepts()).streams["clip_l"].triggers) == 3


def test_a_variant_that_no_step_showed_is_not_stored_even_if_validation_saw_it(run, tmp_path):
    write_pictures(tmp_path / "loud", captions(LOUD))
    # Here validation shows the trigger before a comma, which is a variant of another length.
    write_pictures(tmp_path / "unseen", [f"a photo of {LOUD}, in the snow"])
    _, adapter = run(
        data=tmp_path / "loud",
        validation_data=tmp_path / "unseen",
        trigger=LOUD,
        steps=1,
        batch_size=1,
        validate_every=1,
        preview_every=1,
        preview_prompts=(f"{LOUD}, at night",),
    )
    stream = next(adapter.concepts()).streams["clip_l"]
    assert [len(ids) for ids in stream.triggers] == [5]
    assert len(stream.entries) == 4 + 3 + 2 + 1


@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_training_can_begin_from_words(run, rule):
    report, adapter = run(init="a tiny green house", rule=rule, steps=1, vector_rate=1e-9, scale_rate=1e-9)
    _, drawn = run(rule=rule, steps=1, overwrite=True)
    assert np.linalg.norm(vectors_of(adapter)) > 3 * np.linalg.norm(vectors_of(drawn))
    assert np.isfinite(report.loss)
    assert next(adapter.records()).training["init"] == "a tiny green house"


def test_the_loss_falls(run):
    log = Log()
    run(log, steps=40, validate_every=20, vector_rate=0.2, warm_up=5)
    losses = [figures["validation_loss"] for figures in log.figures.values() if "validation_loss" in figures]
    assert losses[-1] < losses[0] < 1.2
    assert losses[0] - losses[-1] > 0.01


# Validation


def test_validation_is_the_same_whenever_it_is_done(run, tmp_path):
    write_pictures(tmp_path / "unseen", [f"a red ball and {TRIGGER}"], seed=5)
    log = Log()
    options = {"vector_rate": 0.0, "scale_rate": 1e-30, "validate_every": 2, "validation_data": tmp_path / "unseen"}
    run(log, steps=6, validation_draws=3, **options)
    losses = [figures["validation_loss"] for figures in log.figures.values() if "validation_loss" in figures]
    assert len(losses) == 3
    assert len(set(losses)) == 1
    other = Log()
    run(other, steps=2, validation_draws=3, overwrite=True, **options | {"validation_data": None})
    assert other.figures[2]["validation_loss"] != losses[0]


def test_the_vectors_of_the_best_validation_are_kept_unless_the_last_are_wanted(run):
    log = Log()
    options = {"vector_rate": 0.2, "schedule": "constant", "warm_up": 0, "validate_every": 1}
    best, adapter = run(log, steps=10, **options)
    losses = {step: figures["validation_loss"] for step, figures in log.figures.items()}
    assert best.kept_step == min(losses, key=losses.get)
    assert 1 < best.kept_step < 10, "the run is to overshoot"
    assert best.loss == losses[best.kept_step]
    assert next(adapter.records()).training["kept_step"] == best.kept_step
    _, short = run(steps=best.kept_step, keep="last", overwrite=True, **options)
    assert vectors_of(adapter).tobytes() == vectors_of(short).tobytes()
    last, long = run(steps=10, keep="last", overwrite=True, **options)
    assert last.kept_step == 10
    assert vectors_of(adapter).tobytes() != vectors_of(long).tobytes()


def test_without_validation_the_last_vectors_are_kept(run):
    log = Log()
    report, _ = run(log, validate_every=0)
    assert report.kept_step == report.steps == 6
    assert report.loss == log.figures[6]["loss"]
    assert not any("validation_loss" in figures for figures in log.figures.values())


# What a run writes


def test_the_report_and_the_record_say_what_was_done(run, model, tmp_path):
    report, adapter = run(name="mira", license="CC0-1.0", flip=True, crops=2, dtype="bf16", activation="spans")
    record = next(adapter.records())
    assert (record.name, record.trigger, record.license) == ("mira", TRIGGER, "CC0-1.0")
    assert (record.dtype, record.activation, record.rule) == ("bf16", "spans", "absolute")
    assert record.training["steps"] == 6
    assert record.training["pictures"] == 3
    assert not {"data", "output", "device"} & record.training.keys()
    manifest = adapter.manifest
    assert (manifest.backbone, manifest.base_model) == ("sd15", model.name)
    assert manifest.streams["clip_l"].site == "last_hidden_state"
    assert manifest.streams["clip_l"].width == WIDTH
    assert report.identity == adapter.identity()
    assert report.n_bytes == report.output.stat().st_size
    assert report.entries == {"clip_l": 6}
    assert report.run_dir == tmp_path / "out.run"
    assert report.seconds > 0


def test_work_is_told_as_it_goes(run, model):
    log = Log()
    run(log, flip=True, crops=2)
    assert log.works == [
        ("reading pictures", None, 0),
        ("estimating memory", None, 0),
        (f"loading {model}", None, 0),
        ("encoding pictures and captions", 12, 0),
        ("training", 6, 0),
    ]
    assert list(log.figures) == [1, 2, 3, 4, 5, 6]


def test_metrics_have_a_line_for_every_tenth_step_each_validation_and_each_saved_state(run):
    report, _ = run(steps=25, validate_every=8, save_every=12)
    lines = read_metrics(report.run_dir / METRICS)
    assert [line["step"] for line in lines] == [8, 10, 12, 16, 20, 24, 25]
    assert [line["step"] for line in lines if "validation_loss" in line] == [8, 16, 24, 25]
    always = {"step", "loss", "rate", "steps_per_second", "memory_mb"}
    assert all(line.keys() - {"validation_loss"} == always for line in lines)
    assert all(line["steps_per_second"] > 0 and line["memory_mb"] > 10 for line in lines)
    assert lines[0]["rate"] == pytest.approx(0.05 * (25 - 7) / (25 - 2))


def test_the_settings_that_are_written_are_those_of_the_run(run, tmp_path, model):
    values = {"max_grad_norm": 0.0, "preview_prompts": ("a", "b"), "run_dir": tmp_path / "elsewhere", "min_snr": 5.0}
    report, _ = run(steps=1, **values)
    assert report.run_dir == tmp_path / "elsewhere"
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    table = tomllib.loads((report.run_dir / SETTINGS).read_text(encoding="utf-8"))["train"]
    assert table.pop("backbone") == "sd15"
    read = resolve_settings(SD15TrainSettings, [Layer(source="file", values=table)])
    assert read == train_settings(tmp_path, model, steps=1, **values)


def test_previews_are_what_generation_draws_with_the_adapter_of_that_step(run, base, tmp_path, monkeypatch):
    monkeypatch.setattr("engram_vision.training.pictures._PREVIEW_STEPS", 2)
    options = {"schedule": "constant", "warm_up": 0, "vector_rate": 0.5, "keep": "last", "validate_every": 0}
    prompts = (f"{TRIGGER} at night", "a red ball")
    report, with_previews = run(steps=6, preview_every=3, preview_prompts=prompts, seed=2, **options)
    _, without = run(steps=6, seed=2, overwrite=True, **options)
    assert vectors_of(with_previews).tobytes() == vectors_of(without).tobytes()
    names = [f"step-{step:06d}-{number}.png" for step in (3, 6) for number in (0, 1)]
    assert sorted(path.name for path in (report.run_dir / PREVIEWS).iterdir()) == names
    _, third = run(steps=3, seed=2, overwrite=True, **options)
    for step, adapter in ((3, third), (6, without)):
        pipeline = copy_of(base)
        load_engram(pipeline, adapter)
        drawings = [Drawing(prompt=prompt, seed=2) for prompt in prompts]
        for number, image in enumerate(draw(pipeline, drawings, steps=2, guidance=pictures._PREVIEW_GUIDANCE)):
            with Image.open(report.run_dir / PREVIEWS / f"step-{step:06d}-{number}.png") as preview:
                assert preview.tobytes() == image.tobytes()
                assert preview.text == {"prompt": prompts[number], "seed": "2", "step": str(step)}


# Refusals


def refuse(error, run, *told, **values):
    log = Log()
    with pytest.raises(error) as caught:
        run(log, **values)
    message = str(caught.value)
    assert all(text in message for text in told), message
    assert message.isprintable()
    return log


def test_an_existing_output_is_refused_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    log = refuse(TargetExistsError, run, "out.safetensors: exists", "--force")
    assert log.works == []
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    assert not (tmp_path / "out.run").exists()
    run(overwrite=True)
    assert len(open_adapter(tmp_path / "out.safetensors")) == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"output": "none/out.safetensors"}, ["none/out.safetensors: there is no folder", "create it first"]),
        ({"output": "folder.safetensors", "overwrite": True}, ["folder.safetensors: is a folder"]),
        ({"run_dir": "file"}, ["file: is a file", "--run-dir"]),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_anything_is_loaded(run, tmp_path, values, told):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    values = {name: tmp_path / value if isinstance(value, str) else value for name, value in values.items()}
    assert refuse(InputError, run, *told, **values).works == []


@pytest.mark.parametrize("resolution", [12, 31, 36])
def test_a_resolution_the_model_cannot_halve_is_refused(run, resolution):
    refuse(InputError, run, f"resolution is {resolution}, expected a multiple of 8", resolution=resolution)


def test_pictures_may_have_another_resolution(run):
    report, _ = run(steps=1, resolution=24)
    assert np.isfinite(report.loss)


def test_a_caption_whose_trigger_is_cut_off_is_refused_by_file(run, tmp_path):
    write_pictures(tmp_path / "long", [f"{TRIGGER} at night", "a red ball in the snow " * 6 + TRIGGER])
    refuse(InputError, run, "long/1.png: the caption has 40 tokens and clip_l reads 30", data=tmp_path / "long")


def test_a_trigger_of_one_token_is_refused(run, tmp_path):
    write_pictures(tmp_path / "snow", captions("snow"))
    refuse(TriggerError, run, "single token", data=tmp_path / "snow", trigger="snow")
    _, adapter = run(data=tmp_path / "snow", trigger="snow", allow_single_token=True, steps=1)
    assert [len(ids) for ids in next(adapter.concepts()).streams["clip_l"].triggers] == [1]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(run, tracker):
    if find_spec(tracker) or find_spec("tensorboardX"):
        pytest.skip(f"{tracker} is installed")
    assert refuse(InputError, run, f"needs the package {tracker}", "install it", tracker=tracker).works == []


def test_figures_reach_tensorboard(run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report, _ = run(tracker="tensorboard", preview_prompts=("a", "b"))
    read = events.EventAccumulator(str(report.run_dir / "engram"))
    read.Reload()
    assert [event.step for event in read.Scalars("validation_loss")] == [3, 6]


# When it goes wrong


def test_a_model_of_nan_is_told_with_step_and_remedy(run, tmp_path):
    broken = build_model()
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    told = ["step 1: the loss is nan", "no state was saved", "--force and a vector_rate below 0.05", "fp32"]
    refuse(TrainingError, run, *told, model=tmp_path / "broken", save_every=1)
    assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "out.run" / STATE).exists()


def test_a_run_that_blows_up_keeps_the_state_before(run, tmp_path):
    values = {"vector_rate": 1e30, "warm_up": 0, "save_every": 1, "steps": 30, "validate_every": 0}
    state = tmp_path / "out.run" / STATE
    refuse(TrainingError, run, "step 2: the loss is", f"{state} keeps the last good state", "1e+30", **values)
    progress, groups = load_state(state)
    assert progress.step == 1
    assert all(bool(value.isfinite().all()) for group in groups.values() for value in group.values())
    assert not (tmp_path / "out.safetensors").exists()
    assert [line["step"] for line in read_metrics(tmp_path / "out.run" / METRICS)] == [1]


def test_a_run_that_blows_up_in_its_last_step_is_told_where_it_validates(run, tmp_path):
    values = {"vector_rate": 1e30, "warm_up": 0, "steps": 1, "validate_every": 1, "keep": "last"}
    refuse(TrainingError, run, "step 1: the validation loss is", "no state was saved", **values)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_batch_can_be_cut_into_parts():
    whole = Batch(latents=torch.arange(6.0), noise=torch.arange(6.0), times=torch.arange(6), texts=torch.arange(6))
    assert whole.part(2, 3).texts.tolist() == [2, 3, 4]
    assert whole.part(4, 4).times.tolist() == [4, 5]
