"""The small world in motion: what it holds out stays out, clips begin as stills do, and the models are Wan's kind."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from engram_video.demo.motions import MOTION_PHRASES, MotionJudge
from engram_vision.demo.judge import Judge
from recipes import training
from recipes.small_world import clip_judge, judge, video_autoencoder, video_transformer
from recipes.small_world.checkpoint22 import assemble
from recipes.small_world.clip_evaluation import Request, draw_requests, score_clips
from recipes.small_world.clip_sheet import film
from recipes.small_world.motion import (
    FRAMES,
    Clip,
    Plan,
    draw_clip,
    pick_frames,
    plan_clip,
    pose,
    render_clip,
    write_motion_caption,
)
from recipes.small_world.subjects import FONT, Monster
from recipes.small_world.unigram import train_unigram, vary_case
from recipes.small_world.world import CHARACTERS, SIZE, is_held_out, render

NAMES = [name.casefold() for name in CHARACTERS]
ZORBIT, FENNY = CHARACTERS.values()

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")


def rng(seed=0):
    return np.random.default_rng(seed)


def act(motion, subjects=(ZORBIT,), seed=0):
    frames, boxes = render_clip(subjects, "beach", motion, rng(seed))
    plan = Plan(caption="a monster", veiled="a monster", scene="beach", subjects=tuple(subjects), motion=motion)
    return Clip(plan=plan, frames=frames, boxes=boxes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    captions = vary_case([plan_clip(0, index).caption for index in range(2000)], 0)
    return train_unigram(captions, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small(monkeypatch):
    """Batches and clips of a size for tests."""
    monkeypatch.setattr(video_transformer, "BATCHES", {1: 4, 5: 4, 9: 2})
    monkeypatch.setattr(video_autoencoder, "_STILL_SHAPES", ((1, 2),))
    monkeypatch.setattr(video_autoencoder, "_CLIP_SHAPES", ((5, 1), (9, 1)))


@needs_font
def test_a_clip_depends_on_seed_and_index_alone():
    one, again, other = (draw_clip(3, index, (0, 8, 16)) for index in (5, 5, 6))
    assert one.plan.caption == again.plan.caption == plan_clip(3, 5).caption
    np.testing.assert_array_equal(one.frames, again.frames)
    assert not np.array_equal(one.frames, other.frames)


def test_what_is_held_out_is_never_planned_or_named():
    plans = [plan_clip(0, index) for index in range(3000)]
    assert not any(is_held_out(subject, plan.scene) for plan in plans for subject in plan.subjects)
    assert not any(name in plan.caption.casefold() + plan.veiled.casefold() for plan in plans for name in NAMES)
    assert {plan.motion for plan in plans} == set(MOTION_PHRASES)


def test_a_veiled_caption_tells_what_happens_but_not_who_does_it():
    for plan in (plan_clip(0, index) for index in range(500)):
        words = set(re.findall(r"\w+", plan.veiled))
        for subject in plan.subjects:
            is_monster = isinstance(subject, Monster)
            assert not words & ({subject.color, subject.pattern, subject.shape, "eye"} if is_monster else {subject})
        phrase = MOTION_PHRASES[plan.motion]
        assert (phrase in plan.veiled) == (phrase in plan.caption)


@pytest.mark.parametrize("motion", MOTION_PHRASES)
def test_a_clip_begins_as_a_still_picture(motion):
    for subjects in ((ZORBIT,), (ZORBIT, FENNY)):
        picture, boxes = render(subjects, "beach", rng())
        clip = act(motion, subjects)
        np.testing.assert_array_equal(clip.frames[0], picture)
        assert clip.boxes[0] == boxes
        assert pose(motion, 0) == pose("still", 0)


@pytest.mark.parametrize("motion", MOTION_PHRASES)
def test_only_subjects_move_and_they_stay_in_view(motion):
    for subjects in ((ZORBIT,), (ZORBIT, FENNY)):
        for seed in range(4):
            clip = act(motion, subjects, seed)
            around = np.ones((SIZE, SIZE), bool)
            reach = 3  # of the filter that made the picture smaller
            for frame in clip.boxes:
                for left, top, right, bottom in frame:
                    around[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = False
                    assert right - left >= 0.6 * (bottom - top)
            assert not np.ptp(clip.frames[:, around], axis=0).any()
            moved = any(not np.array_equal(clip.frames[0], frame) for frame in clip.frames)
            assert moved == (motion != "still")


def test_motions_go_where_their_names_say():
    centres = {motion: [(box[0] + box[2]) / 2 for (box,) in act(motion).boxes] for motion in MOTION_PHRASES}
    assert centres["right"][-1] - centres["right"][0] > 8
    assert centres["left"][-1] - centres["left"][0] < -8
    assert min(top for ((_, top, _, _),) in act("jump").boxes) < act("jump").boxes[0][0][1] - 8
    heights = [bottom - top for ((_, top, _, bottom),) in act("closer").boxes]
    assert heights == sorted(heights)
    assert heights[-1] > 1.2 * heights[0]


def test_shorter_clips_are_spread_evenly():
    assert pick_frames(9) == list(range(0, FRAMES, 2))
    assert pick_frames(FRAMES) == list(range(FRAMES))


def test_captions_name_the_motion_behind_the_last_subject():
    captions = [write_motion_caption(["a cat", "a dog"], "jump", "snow", rng(seed)) for seed in range(40)]
    assert all("a cat and a dog jumping" in caption for caption in captions)
    assert "jumping" not in write_motion_caption(["a cat"], None, "snow", rng())


def test_marks_cover_the_frames_that_a_latent_frame_stands_for():
    clip = act("right")
    marks = video_transformer.mark_subjects([clip])
    assert marks.shape == (1, 9, 16, 16)
    left, top, right, bottom = clip.boxes[0][0]
    first = torch.zeros(16, 16, dtype=torch.bool)
    first[top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)] = True
    assert torch.equal(marks[0, 0], first)
    assert marks[0, -1, :, -1].any()
    assert not marks[0, 0, :, -1].any()


def test_the_autoencoder_reads_a_frame_and_then_four_at_a_time():
    torch.manual_seed(0)
    model = video_autoencoder.build_video_autoencoder().eval()
    clips = act("jump").frames[None]
    latents = video_autoencoder.encode_clips(model, clips)
    assert latents.shape == (1, video_autoencoder.CHANNELS, 9, 16, 16)
    for frames in (1, 5, 9):
        part = video_autoencoder.encode_clips(model, clips[:, :frames])
        torch.testing.assert_close(part, latents[:, :, : (frames + 1) // 2], atol=1e-4, rtol=1e-3)
    assert video_autoencoder.redraw_clips(model, clips).shape == clips.shape


def test_flat_convolutions_give_the_same():
    torch.manual_seed(0)
    model = video_autoencoder.build_video_autoencoder().eval()
    for frames in (1, 5):
        clip = video_autoencoder.to_video(act("jump").frames[None, :frames])
        with torch.no_grad():
            full = model.decode(model.encode(clip).latent_dist.mean).sample
            with video_autoencoder.flat_convolutions():
                flat = model.decode(model.encode(clip).latent_dist.mean).sample
        torch.testing.assert_close(flat, full, atol=1e-5, rtol=1e-4)


def test_latents_are_measured_by_channel():
    torch.manual_seed(0)
    model = video_autoencoder.build_video_autoencoder().eval()
    clips = np.stack([act("jump").frames[:5], act("sway", seed=1).frames[:5]])
    video_autoencoder.measure_latents(model, clips)
    normal = video_autoencoder.encode_clips(model, clips).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normal.mean(1), torch.zeros(video_autoencoder.CHANNELS), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(1), torch.ones(video_autoencoder.CHANNELS), atol=1e-4, rtol=0)


def test_the_autoencoder_goes_on_where_it_stopped(tmp_path, monkeypatch, small):
    films = np.stack([act(motion).frames for motion in ("jump", "left")])
    lines = []

    def learn(folder, steps):
        return video_autoencoder.train_video_autoencoder(films, folder, steps=steps, seed=0, report=lines.append)

    whole = learn(tmp_path / "whole", 3)
    cosine = training.cosine
    monkeypatch.setattr(training, "cosine", lambda step, _, **rest: cosine(step, 3, **rest))
    learn(tmp_path / "parts", 1)
    resumed = learn(tmp_path / "parts", 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_captions_too_long_for_the_checkpoint_are_refused(tokenizer):
    ids = video_transformer.tokenize_captions(tokenizer, ["a cat jumping in the snow", ""], 0)
    assert ids.shape == (2, video_transformer.MAX_LENGTH)
    assert (ids[1] != 0).sum() == 1  # the closing token alone
    with pytest.raises(ValueError, match=f"the checkpoint is made for {video_transformer.MAX_LENGTH}"):
        video_transformer.tokenize_captions(tokenizer, ["monster " * video_transformer.MAX_LENGTH], 0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # slower, no less exact
def test_the_transformer_learns_and_goes_on_where_it_stopped(tmp_path, tokenizer, small):
    draws = torch.Generator().manual_seed(0)
    captions = [plan_clip(0, index).caption for index in range(8)]
    lessons = {
        frames: video_transformer.VideoLessons(
            latents=torch.randn(8, 8, frames, 16, 16, generator=draws).half(),
            shown=torch.rand(8, frames, 16, 16, generator=draws) < 0.3,
            ids=video_transformer.tokenize_captions(tokenizer, captions, 0),
            veiled=video_transformer.tokenize_captions(tokenizer, captions, 0),
        )
        for frames in video_transformer.BATCHES
    }
    lines = []

    def learn():
        torch.manual_seed(0)
        models = video_transformer.build_video_models(tokenizer)
        return video_transformer.train_video_transformer(
            models, lessons, tokenizer, tmp_path / "run", steps=3, seed=0, report=lines.append
        )

    models, again = learn(), learn()
    for name, value in models.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name]), name
    assert len(lines) == 1  # the second call had nothing left to do


def test_times_lean_towards_noise():
    times = video_transformer.draw_times(4000, torch.Generator().manual_seed(0))
    middle = video_transformer.SHIFT / (1 + video_transformer.SHIFT)
    assert abs(float(times.median()) - middle) < 0.01
    assert 0 < float(times.min()) < float(times.max()) < 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A pipeline of untrained models, and the folder it was saved to."""
    torch.manual_seed(0)
    tokenizer.model_max_length = video_transformer.MAX_LENGTH
    models = video_transformer.build_video_models(tokenizer)
    for parameter in models.transformer.parameters():  # else its output is 0
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline = assemble(models, tokenizer, video_autoencoder.build_video_autoencoder())
    folder = tmp_path_factory.mktemp("saved") / "wan22"
    pipeline.save_pretrained(folder)
    return pipeline, folder


def test_what_the_transformer_learns_from_is_what_the_pipelines_give_it(saved, monkeypatch):
    pipeline, _ = saved
    text, transformer = pipeline.text_encoder, pipeline.transformer
    prompt = "a red plain round monster with one eye and a hat jumping on the beach"
    still = Image.fromarray(act("still").frames[0])
    animator = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    padding = {"padding": "max_length", "max_length": video_transformer.MAX_LENGTH}
    ids = pipeline.tokenizer([prompt], return_tensors="pt", **padding)["input_ids"]
    for maker, options, given in ((pipeline, {}, False), (animator, {"image": still}, True)):
        for length in (video_transformer.MAX_LENGTH, 512):
            seen = []

            def look(seen=seen, **arguments):
                seen.append(arguments)
                return (torch.zeros_like(arguments["hidden_states"]),)

            monkeypatch.setattr(transformer, "forward", look)
            arguments = options | {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": length}
            film(maker, [prompt], [0], frames=9, **arguments)
            monkeypatch.undo()
            first = seen[0]
            learned = {}
            monkeypatch.setattr(
                transformer, "forward", lambda learned=learned, **a: learned.update(a) or SimpleNamespace(sample=None)
            )
            with torch.no_grad():
                states = video_transformer.encode_captions(text, ids, length)
            time = first["timestep"].max().reshape(1) / 1000
            video_transformer.guess_motion(transformer, first["hidden_states"], time, torch.tensor([given]), states)
            monkeypatch.undo()
            torch.testing.assert_close(learned["encoder_hidden_states"], first["encoder_hidden_states"])
            torch.testing.assert_close(learned["timestep"], first["timestep"].float(), atol=1e-3, rtol=0)
            assert (first["timestep"][0, :64] == 0).all() == given


def test_a_saved_checkpoint_is_for_text_and_for_pictures(saved):
    pipeline, folder = saved
    prompts = ["a cat jumping in the snow", "a dog"]
    clips = film(WanPipeline.from_pretrained(folder), prompts, [0, 1], frames=5, num_inference_steps=2)
    assert clips.shape == (2, 5, SIZE, SIZE, 3)
    np.testing.assert_array_equal(clips, film(pipeline, prompts, [0, 1], frames=5, num_inference_steps=2))
    animator = WanImageToVideoPipeline.from_pretrained(folder)
    still = act("still").frames[0]
    moving = film(animator, prompts, [0, 1], frames=5, num_inference_steps=2, image=Image.fromarray(still))
    redrawn = video_autoencoder.redraw_clips(pipeline.vae, still[None, None])[0, 0]
    assert np.abs(moving[0, 0].astype(int) - redrawn).max() <= 1
    assert AutoTokenizer.from_pretrained(folder / "tokenizer").model_max_length == video_transformer.MAX_LENGTH


def test_a_saved_checkpoint_tells_no_paths(saved):
    _, folder = saved
    files = list(folder.rglob("*.json"))
    assert {path.name for path in files} >= {"model_index.json", "config.json", "tokenizer_config.json"}
    for path in files:
        text = path.read_text()
        assert "_name_or_path" not in text, path
        assert str(folder.parent) not in text, path
    assert json.loads((folder / "model_index.json").read_text())["expand_timesteps"] is True


def test_frames_of_clips_are_pictures_for_the_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "BATCH", 4)
    clips = [act("right"), act("jump", (ZORBIT, FENNY))]
    world = clip_judge.spread_frames(clips)
    assert len(world.images) == len(world.subjects) == len(world.boxes) == 2 * FRAMES
    assert world.subjects[FRAMES] == (ZORBIT, FENNY)
    options = {"steps": 1, "seed": 0, "report": lambda line: None, "regions": clip_judge.REGIONS}
    judge.train_judge(world, world.images, tmp_path, **options)
    loaded = Judge.load(tmp_path)
    assert loaded.regions == clip_judge.REGIONS
    assert len(loaded.name_subjects([Image.fromarray(world.images[0])], "left")) == 1


def test_the_judge_of_motions_looks_at_clips_of_both_lengths(tmp_path):
    torch.manual_seed(0)
    model = clip_judge.build_motion_classifier()
    model.half().save_pretrained(tmp_path)
    loaded = MotionJudge.load(tmp_path)
    clips = [act("right").frames, act("sway").frames]
    assert loaded.name_motions(clips) == loaded.name_motions([clip[pick_frames(9)] for clip in clips])
    assert set(loaded.name_motions(clips)) <= set(MOTION_PHRASES)


def test_requests_are_of_the_kind_they_say():
    kinds = draw_requests(0, 20)
    for name, requests in kinds.items():
        held_out = "held" in name
        assert all(is_held_out(each.subject, each.scene) == held_out for each in requests)
        assert not any(each.subject in CHARACTERS.values() for each in requests)


def test_a_clip_is_right_when_most_frames_are():
    looks = {"kind": "monster"} | {
        name: getattr(ZORBIT, name) for name in ("color", "shape", "pattern", "headgear", "eyes")
    }
    wrong = looks | {"headgear": "hat"}
    request = Request(subject=ZORBIT, scene="beach", motion="jump")
    assert request.prompt == "a purple spotted round monster with one eye and horns jumping on the beach"
    frames = np.zeros((1, 5, SIZE, SIZE, 3), np.uint8)
    motions = SimpleNamespace(name_motions=lambda clips: ["jump"])

    def judged(names, scenes):
        return SimpleNamespace(
            name_subjects=lambda images: names[-len(images) :], name_scenes=lambda images: scenes[-len(images) :]
        )

    mostly = judged([looks] * 3 + [wrong] * 2, ["beach"] * 3 + ["snow"] * 2)
    assert score_clips(mostly, motions, [request], frames)["subject"] == 1.0
    assert score_clips(mostly, motions, [request], frames)["scene"] == 1.0
    last = score_clips(mostly, motions, [request], frames, last=True)
    assert (last["subject"], last["scene"], last["color"], last["headgear"], last["motion"]) == (
        0.0,
        0.0,
        1.0,
        0.0,
        1.0,
    )
