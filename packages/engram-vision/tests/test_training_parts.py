"""The parts of training, each by its own law: objective, batches, frozen data, first values, schedule, metrics."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image
from vision_builders import LENGTH, LOUD, SIZE, TRIGGER, WIDTH, captions, ids_of, states_of, write_pictures

from engram_core import ConceptRecord, InputError, StreamSpec, build_registry
from engram_core.torch import TrainableStream, add_delta
from engram_core.training.schedule import rate_factor
from engram_vision.dataset import CaptionedImage, read_dataset
from engram_vision.families import SD15
from engram_vision.loading import pipeline_tokenizers
from engram_vision.training.batches import draw_batch, fixed_batches
from engram_vision.training.frozen import FrozenData, FrozenTexts, TextReader, freeze, vary_caption
from engram_vision.training.initial import describe_vectors, random_vectors
from engram_vision.training.objectives import Diffusion
from engram_vision.training.pictures import encode_pictures

CPU = torch.device("cpu")
STEPS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# Objective


class GuessingUnet:
    """Guesses a constant, and keeps what it was given."""

    dtype = torch.float32

    def __call__(self, noisy, times, *, encoder_hidden_states):
        self.noisy, self.states = noisy, encoder_hidden_states
        return SimpleNamespace(sample=torch.full_like(noisy, 0.25))


def scheduler(prediction, *, zero_snr=False):
    return DDPMScheduler(**STEPS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)


def cumulative(zero_snr):
    """Return alpha-bar of each time in float64: the schedule of SD1.x, and as arXiv:2305.08891 rescales it."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_mean_square_of_what_the_model_predicts(prediction, zero_snr):
    unet = GuessingUnet()
    diffusion = Diffusion(unet, scheduler(prediction, zero_snr=zero_snr))
    times = torch.tensor([0, 1, 500, 999])
    latents, noise = torch.randn(2, 4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    losses = diffusion.losses(latents, noise, times, {"encoder_hidden_states": torch.zeros(4, LENGTH, WIDTH)})
    share = torch.tensor(cumulative(zero_snr))[times].float()[:, None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    target = noise if prediction == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * latents
    assert torch.allclose(unet.noisy, noisy, atol=1e-4)
    assert torch.allclose(losses, (0.25 - target).square().mean(dim=(1, 2, 3)), rtol=1e-3)
    assert (losses.shape, losses.dtype) == ((4,), torch.float32)
    assert diffusion.n_times == 1000


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction, zero_snr, gamma):
    times = torch.arange(1000)
    latents, noise = torch.randn(2, 1000, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    conditions = {"encoder_hidden_states": torch.zeros(1000, 1, WIDTH)}
    plain, weighted = (
        Diffusion(GuessingUnet(), scheduler(prediction, zero_snr=zero_snr), min_snr=value).losses(
            latents, noise, times, conditions
        )
        for value in (None, gamma)
    )
    share = cumulative(zero_snr)
    with np.errstate(divide="ignore", invalid="ignore"):
        snr = share / (1 - share)
        # arXiv:2303.09556, section 3.4: min(SNR, gamma) for x0, over SNR for the noise, over SNR + 1 for v.
        expected = np.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
    if zero_snr:
        assert snr[-1] == 0
        expected[-1] = 1 if prediction == "epsilon" else 0  # the limits
    np.testing.assert_allclose((weighted / plain).numpy(), expected, rtol=2e-3, atol=1e-6)


def test_other_predictions_are_refused():
    with pytest.raises(InputError, match="predicts 'sample', expected epsilon or v_prediction"):
        Diffusion(GuessingUnet(), scheduler("sample"))


# Batches


def toy_data(n_views, forms):
    """Return data in which each view's latents tell which it is."""
    mean = torch.arange(n_views, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 2, 2)
    texts = FrozenTexts(ids=torch.zeros(9, 1, dtype=torch.int64), states=torch.zeros(9, 1, 1), pooled=None)
    return FrozenData(mean=mean, std=torch.zeros_like(mean), texts={"clip_l": texts}, captions=forms, origin={})


DIFFUSION = Diffusion(GuessingUnet(), scheduler("epsilon"))


def test_a_batch_depends_on_seed_and_number_alone():
    data = toy_data(5, ((0, 1),) * 5)

    def parts(**options):
        batch = draw_batch(data, DIFFUSION, **{"size": 4, "number": 3, "seed": 0} | options)
        return [part.numpy().tobytes() for part in (batch.latents, batch.noise, batch.times, batch.texts)]

    before = parts()
    torch.manual_seed(1)
    assert parts() == before
    assert parts(number=4)[1] != before[1] != parts(seed=1)[1]


def test_every_view_comes_equally_often_in_another_order_each_time():
    data = toy_data(5, ((0,),) * 5)
    batches = [draw_batch(data, DIFFUSION, size=3, number=number, seed=0) for number in range(10)]
    views = torch.cat([batch.latents[:, 0, 0, 0] for batch in batches]).int().tolist()
    epochs = [tuple(views[first : first + 5]) for first in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_latents_are_drawn_from_their_distribution():
    mean = torch.full((1, 4, 8, 8), 3.0)
    std = torch.full_like(mean, 0.5)
    data = FrozenData(mean=mean, std=std, texts={}, captions=((0,),), origin={})
    latents = torch.cat([draw_batch(data, DIFFUSION, size=4, number=n, seed=0).latents for n in range(8)])
    assert latents.mean().item() == pytest.approx(3, abs=0.05)
    assert latents.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_times_of_a_batch_cover_all_noise_levels():
    seen = set()
    for number in range(50):
        times = DIFFUSION.spread_times(4, torch.Generator().manual_seed(number)).tolist()
        assert sorted(time // 250 for time in times) == [0, 1, 2, 3]
        seen.add(tuple(time // 250 for time in times))
    assert len(seen) > 10  # in any order
    assert min(DIFFUSION.spread_times(1000, torch.Generator()).tolist()) == 0
    assert max(DIFFUSION.spread_times(1000, torch.Generator()).tolist()) == 999


def test_captions_come_in_other_forms_now_and_then():
    data = toy_data(2, ((0, 1, 2), (3,)))
    rows = torch.cat([draw_batch(data, DIFFUSION, size=10, number=n, seed=0).texts for n in range(100)]).tolist()
    counts = Counter(rows)
    assert counts[3] == 500
    assert 0.7 < counts[0] / 500 < 0.9
    assert abs(counts[1] - counts[2]) < 50
    assert counts.keys() == {0, 1, 2, 3}


def test_validation_sees_each_view_equally_often_with_its_caption_as_written():
    data = toy_data(3, ((0, 1), (2,), (3, 4)))
    batches = fixed_batches(data, DIFFUSION, draws=4, size=5, seed=0)
    assert [len(batch.times) for batch in batches] == [5, 5, 2]
    views = torch.cat([batch.latents[:, 0, 0, 0] for batch in batches]).int().tolist()
    assert views == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.cat([batch.texts for batch in batches]).tolist() == [0] * 4 + [2] * 4 + [3] * 4
    times = torch.cat([batch.times for batch in batches]).tolist()
    assert all(sorted(time // 250 for time in times[first : first + 4]) == [0, 1, 2, 3] for first in (0, 4, 8))
    again = fixed_batches(data, DIFFUSION, draws=4, size=12, seed=0)
    assert torch.equal(torch.cat([batch.noise for batch in batches]), again[0].noise)
    assert not torch.equal(fixed_batches(data, DIFFUSION, draws=4, size=12, seed=1)[0].noise, again[0].noise)


# Frozen data


@pytest.fixture
def pictures(tmp_path):
    return read_dataset(write_pictures(tmp_path / "pictures", captions()), TRIGGER)


def freeze_all(base, items, trigger=TRIGGER, **options):
    reader = read_with(base)
    registries = {"clip_l": build_registry(trigger, reader.tokenizer)}
    given = {"resolution": SIZE, "flip": False, "crops": 1, "seed": 0, "device": CPU, "advance": lambda done: None}
    return freeze({"clip_l": reader}, items, registries, lambda: encode_pictures(base.vae, items, **given | options))


def read_with(base):
    return TextReader(SD15, base, "clip_l", pipeline_tokenizers(base)["clip_l"], CPU)


@pytest.mark.parametrize(("flip", "crops", "n_views"), [(False, 1, 3), (True, 1, 6), (False, 4, 12), (True, 4, 24)])
def test_every_picture_gives_its_crops_and_their_mirror_images(base, pictures, flip, crops, n_views):
    done = []
    data = freeze_all(base, pictures, flip=flip, crops=crops, advance=done.append)
    assert data.mean.shape == data.std.shape == (n_views, 4, SIZE // 4, SIZE // 4)
    assert data.mean.dtype == data.std.dtype == torch.float32
    assert done[-1] == n_views == len(data.captions)
    each = n_views // 3
    assert data.captions == tuple((number,) for number in range(3) for _ in range(each))
    # A picture of 44 x 36 pixels leaves little room for crops, so some are alike; a mirror image is another picture.
    assert len({mean.numpy().tobytes() for mean in data.mean}) >= (n_views if crops == 1 else n_views // 3)


def test_latents_are_the_encoders_scaled(base, pictures):
    data = freeze_all(base, pictures, flip=True)
    image = Image.open(pictures[1].path).convert("RGB").resize((39, 32), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32)[:, 4:36] / 127.5 - 1
    for number, view in enumerate((pixels, pixels[:, ::-1])):
        with torch.no_grad():
            found = base.vae.encode(torch.from_numpy(view.transpose(2, 0, 1).copy())[None]).latent_dist
        assert torch.allclose(data.mean[2 + number], found.mean[0] * 0.18215, atol=0.02)
        assert torch.allclose(data.std[2 + number], found.std[0] * 0.18215, rtol=0.05, atol=1e-3)


def test_crops_depend_on_the_seed(base, pictures):
    one, same, other = (freeze_all(base, pictures, crops=2, seed=seed).mean for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_captions_are_encoded_once_each_as_the_pipeline_reads_them(base, pictures):
    items = [*pictures, CaptionedImage(path=pictures[0].path, caption=pictures[0].caption)]
    data = freeze_all(base, items)
    texts = data.texts["clip_l"]
    assert data.captions == ((0,), (1,), (2,), (0,))
    assert torch.equal(texts.ids, ids_of(base, *captions()))
    np.testing.assert_allclose(texts.states.numpy(), states_of(base, *captions()), atol=1e-5)


def test_every_variant_of_the_trigger_is_shown(base, tmp_path):
    items = read_dataset(write_pictures(tmp_path / "pictures", captions(LOUD)), LOUD)
    registry = build_registry(LOUD, pipeline_tokenizers(base)["clip_l"])
    assert len({len(variant.ids) for variant in registry.variants}) == 2
    data = freeze_all(base, items, LOUD)
    ids = data.texts["clip_l"].ids.tolist()
    for forms in data.captions:
        for row, variant in zip(forms, registry.variants, strict=True):
            assert holds(ids[row], variant.ids)


def holds(ids, part):
    return any(tuple(ids[first : first + len(part)]) == part for first in range(len(ids)))


def test_another_form_of_a_caption_keeps_its_words_where_it_can(base):
    words = pipeline_tokenizers(base)["clip_l"]
    registry = build_registry(LOUD, words)
    others = registry.variants[1:]
    texts = vary_caption(f"a red ball and {LOUD} at night", registry, words)
    for text, variant in zip(texts, others, strict=True):
        assert text.startswith(f"a red ball and {LOUD}")
        assert text.endswith(" at night")
        assert holds(words.encode(text), variant.ids)
    # The bare trigger is a variant too. Where the words around it cut it otherwise, the variant's example stands in.
    assert vary_caption(f"a red ball and {LOUD}, at night", registry, words) == [LOUD, others[1].example]
    # What the encoder would not read is not shown: longer forms do not fit here.
    long = "ball " * 25 + LOUD
    assert len(words.encode(long)) == 30
    assert vary_caption(long, registry, words) == [variant.example for variant in others]


def test_a_caption_whose_trigger_is_cut_off_is_refused_by_file(base, pictures):
    path = pictures[0].path
    caption = "a red ball " * 10 + TRIGGER
    with pytest.raises(InputError) as caught:
        freeze_all(base, [CaptionedImage(path=path, caption=caption)])
    told = f"{path}: the caption has 34 tokens and clip_l reads 30, which cuts the trigger {TRIGGER!r} off"
    assert str(caught.value).startswith(told)


def test_a_caption_in_which_the_tokenizer_cuts_the_trigger_otherwise_is_refused_by_file(base, pictures):
    path = pictures[0].path
    with pytest.raises(InputError, match="put spaces around it") as caught:
        freeze_all(base, [CaptionedImage(path=path, caption=f"a {LOUD}% ball")], LOUD)
    assert str(caught.value).startswith(f"{path}: the tokenizer of clip_l cuts the trigger {LOUD!r}")


def test_the_origin_tells_pictures_and_captions_apart(base, pictures):
    own = freeze_all(base, pictures).origin
    assert freeze_all(base, pictures).origin == own
    told = [CaptionedImage(path=item.path, caption=f"{item.caption} at night") for item in pictures]
    assert freeze_all(base, told).origin["pictures"] == own["pictures"]
    assert freeze_all(base, told).origin["captions"] != own["captions"]
    shown = [CaptionedImage(path=pictures[0].path, caption=item.caption) for item in pictures]
    assert freeze_all(base, shown).origin["pictures"] != own["pictures"]
    assert freeze_all(base, shown).origin["captions"] == own["captions"]


# First values


def test_random_vectors_have_their_spread_and_seed(base):
    registry = build_registry(TRIGGER, pipeline_tokenizers(base)["clip_l"])
    vectors = random_vectors(registry, 5000, std=0.02, seed=3)
    assert vectors.shape == (registry.n_slots, 5000)
    assert vectors.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(vectors, random_vectors(registry, 5000, std=0.02, seed=3))
    assert not torch.equal(vectors, random_vectors(registry, 5000, std=0.02, seed=4))


def described(base, trigger, words, *, rule, overlap, scale, max_ngram=7):
    """Return a stream that begins as some words."""
    reader = read_with(base)
    registry = build_registry(trigger, reader.tokenizer, max_ngram=max_ngram)
    vectors = describe_vectors(reader, registry, words, rule=rule, overlap=overlap, scale=scale)
    record = ConceptRecord(name="x", trigger=trigger, rule=rule, overlap=overlap, max_ngram=max_ngram)
    spec = StreamSpec(width=WIDTH, site="last_hidden_state", tokenizer=reader.tokenizer.spec)
    return TrainableStream(record, registry, spec, vectors, torch.full((WIDTH,), scale))


def stretch(states, length):
    return states[np.linspace(0, len(states) - 1, length).round().astype(int)]


WORDS = "a tiny green house"
RULES = ["absolute", "absolute-tanh", "relative"]


@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trigger", [TRIGGER, LOUD, "mira voss", "zor quell zor quell"])
def test_a_trigger_begins_near_the_words_that_describe_it(base, trigger, rule, overlap):
    # Under the relative rule scale and number of entries alone tell how far the states move; a little helps.
    scale = {"sum": 0.01, "mean": 0.2}[overlap] if rule == "relative" else 0.5
    stream = described(base, trigger, WORDS, rule=rule, overlap=overlap, scale=scale)
    length, n_words = len(stream.registry.variants[0].ids), 4
    for before in ("", "a photo of "):
        first = 1 + len(before.split())
        own = torch.from_numpy(states_of(base, before + trigger))
        theirs = stretch(states_of(base, before + WORDS)[0, first : first + n_words], length)
        with torch.no_grad():
            edited = add_delta(own, stream(own, ids_of(base, before + trigger)))
        span = slice(first, first + length)
        far, near = (float(np.linalg.norm(states[0, span].numpy() - theirs)) for states in (own, edited))
        assert near < (0.98 if rule == "relative" else 0.75) * far


@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh"])
@pytest.mark.parametrize(("trigger", "max_ngram"), [(TRIGGER, 7), ("mira voss", 7), ("mira voss", 2)])
def test_the_residual_is_the_mean_difference_between_words_and_trigger(base, trigger, max_ngram, rule, overlap):
    stream = described(base, trigger, WORDS, rule=rule, overlap=overlap, scale=-0.3, max_ngram=max_ngram)
    length = len(stream.registry.variants[0].ids)
    differences = []
    for before in ("", "a photo of ", "a picture of "):
        own, theirs = states_of(base, before + trigger, before + WORDS)
        first = 1 + len(before.split())
        differences.append(stretch(theirs[first : first + 4], length) - own[first : first + length])
    hidden = torch.zeros(1, LENGTH, WIDTH)
    with torch.no_grad():
        residual = add_delta(hidden, stream(hidden, ids_of(base, trigger)))[0, 1 : 1 + length].numpy()
    expected = np.mean(differences, axis=0)
    if max_ngram == 2:  # with spans of two alone some differences cannot be made
        assert np.linalg.norm(residual - expected) < 0.6 * np.linalg.norm(expected)
    else:
        np.testing.assert_allclose(residual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "scale", "told"),
    [
        (WORDS, 0.0, "init_scale is 0"),
        ("  ", 0.5, "gives no token"),
        ("a red ball " * 11, 0.5, "has 33 tokens, the encoder reads 30; use fewer words"),
    ],
)
def test_a_description_without_effect_is_refused(base, words, scale, told):
    with pytest.raises(InputError, match=told):
        described(base, TRIGGER, words, rule="absolute", overlap="sum", scale=scale)


def test_a_trigger_that_fills_the_encoder_is_described_without_more_words_around_it(base):
    trigger = "zorbit " * 14 + "quell"
    stream = described(base, trigger, WORDS, rule="absolute", overlap="sum", scale=0.5)
    assert len(stream.registry.variants[0].ids) == LENGTH - 2
    assert bool(stream.vectors.isfinite().all())


# Schedule


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_rates_follow_diffusers_after_a_rise_that_does_not_begin_at_zero(schedule, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"num_warmup_steps": 5, "num_training_steps": 20}
    expected = get_scheduler(theirs, optimizer, **options).lr_lambdas[0]
    factors = [rate_factor(step, steps=20, warm_up=5, schedule=schedule) for step in range(20)]
    assert factors[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert factors[5:] == pytest.approx([expected(step) for step in range(5, 20)])
    assert factors[5] == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert rate_factor(0, steps=3, warm_up=500, schedule=schedule) == pytest.approx(1 / 4)
    assert rate_factor(0, steps=1, warm_up=0, schedule=schedule) == 1
