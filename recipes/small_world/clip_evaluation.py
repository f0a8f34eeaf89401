"""Does the tiny video checkpoint obey? Subjects, scenes and motions as the judges name them, held-out ones apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from engram_video.demo.motions import MOTION_PHRASES, MotionJudge
from engram_vision.demo.judge import Judge
from recipes.small_world.captions import SCENE_PHRASES
from recipes.small_world.clip_sheet import film, save_rows
from recipes.small_world.evaluate import is_right
from recipes.small_world.motion import FRAMES, SHORT, Frames, pick_frames, render_clip
from recipes.small_world.subjects import ATTRIBUTES, EMOJI, Monster, random_monster
from recipes.small_world.video_autoencoder import measure_psnr, redraw_clips
from recipes.small_world.world import CHARACTERS, Subject, describe, is_held_out, render

_SCENES, _MOTIONS = tuple(SCENE_PHRASES), tuple(MOTION_PHRASES)
_STREAM, _AT_ONCE, _SHOWN = 22, 10, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a clip shall show."""

    subject: Subject
    scene: str
    motion: str

    @property
    def prompt(self) -> str:
        """The request in words."""
        return self.name(describe(self.subject))

    def name(self, who: str) -> str:
        """Return the request in words with another name for its subject."""
        return f"{who} {MOTION_PHRASES[self.motion]} {SCENE_PHRASES[self.scene][0]}"


def evaluate_clips(out: Path, work: Path, *, seed: int, count: int = 60) -> dict[str, Any]:
    """Return all figures of the checkpoint in `out`; what was filmed goes to `work`, to be looked at.

    Args:
        out: folder with `wan22` and `judge`.
        work: folder for contact sheets.
        seed: chooses requests and noise.
        count: clips of each kind.
    """
    judge, motions = Judge.load(out / "judge"), MotionJudge.load(out / "judge" / "motion")
    pipeline = WanPipeline.from_pretrained(out / "wan22", torch_dtype=torch.float32)
    animator = WanImageToVideoPipeline.from_pretrained(out / "wan22", torch_dtype=torch.float32)
    kinds = draw_requests(seed, count)
    figures: dict[str, Any] = {"seed": seed, "count": count}
    figures["autoencoder"] = evaluate_autoencoder(pipeline.vae, kinds["monsters, held out"], seed)
    figures["judge"] = evaluate_judges(judge, motions, kinds, seed)
    figures["text to video"] = {
        name: score_clips(judge, motions, requests, film_requests(pipeline, requests, seed, work / f"{name}.png"))
        for name, requests in kinds.items()
    }
    name = "monsters, held out"
    full = film_requests(pipeline, kinds[name], seed, work / f"{name}, {FRAMES} frames.png", frames=FRAMES)
    figures[f"text to video, {FRAMES} frames"] = {name: score_clips(judge, motions, kinds[name], full)}
    figures["picture to video"] = evaluate_pictures(animator, judge, motions, work, seed=seed, count=count)
    return figures


def draw_requests(seed: int, count: int) -> dict[str, list[Request]]:
    """Return requests of each kind: things and monsters, shown in training and held out."""
    rng = np.random.default_rng([seed, _STREAM, 1])
    kinds = {
        "things, shown": (True, False),
        "things, held-out scenes": (True, True),
        "monsters, shown": (False, False),
        "monsters, held out": (False, True),
    }
    return {
        name: [_draw_request(rng, thing=thing, held_out=held) for _ in range(count)]
        for name, (thing, held) in kinds.items()
    }


def evaluate_autoencoder(model: AutoencoderKLWan, requests: Sequence[Request], seed: int) -> dict[str, float]:
    """Return peak signal-to-noise ratios in decibels of clips never shown, of 1, 9 and 17 frames."""
    rng = np.random.default_rng([seed, _STREAM, 2])
    clips = np.stack([render_clip((r.subject,), r.scene, r.motion, rng)[0] for r in requests])
    parts = {"1": clips[:, :1], "9": clips[:, pick_frames(SHORT)], "17": clips}
    return {name: round(measure_psnr(part, redraw_clips(model, part)), 2) for name, part in parts.items()}


def evaluate_judges(
    judge: Judge, motions: MotionJudge, kinds: Mapping[str, Sequence[Request]], seed: int
) -> dict[str, dict[str, float]]:
    """Return the judges' own accuracies on drawn clips they never saw: of single frames, and of motions."""
    rng = np.random.default_rng([seed, _STREAM, 3])
    characters = {name: [_about(monster, rng) for _ in range(20)] for name, monster in CHARACTERS.items()}
    result = {}
    for name, requests in {**kinds, **characters}.items():
        clips = np.stack([render_clip((r.subject,), r.scene, r.motion, rng)[0] for r in requests])
        images = [Image.fromarray(frame) for clip in clips for frame in clip]
        wanted = [request for request in requests for _ in range(FRAMES)]
        named, scenes = judge.name_subjects(images), judge.name_scenes(images)
        result[name] = {
            "subject": _share(is_right(n, r.subject) for n, r in zip(named, wanted, strict=True)),
            "scene": _share(scene == r.scene for scene, r in zip(scenes, wanted, strict=True)),
            "motion": _share(m == r.motion for m, r in zip(motions.name_motions(list(clips)), requests, strict=True)),
        }
    return result


def film_requests(
    pipeline: WanPipeline, requests: Sequence[Request], seed: int, sheet: Path, *, frames: int = SHORT
) -> Frames:
    """Return a clip for each request, uint8 [N, F, 64, 64, 3]; some of them are written to `sheet` too."""
    prompts = [request.prompt for request in requests]
    parts = []
    for first in range(0, len(prompts), _AT_ONCE):
        part = prompts[first : first + _AT_ONCE]
        parts.append(film(pipeline, part, range(seed + first, seed + first + len(part)), frames=frames))
    clips: Frames = np.concatenate(parts)
    save_rows(clips[:_SHOWN], sheet)
    return clips


def evaluate_pictures(
    animator: WanImageToVideoPipeline, judge: Judge, motions: MotionJudge, work: Path, *, seed: int, count: int
) -> dict[str, dict[str, float]]:
    """Return figures of clips that begin with a given picture, which is made to do every motion.

    The subject is right when the clip's last frame shows it. The demo's characters go by their names, which tell the
    checkpoint nothing: what it shows, it has from the picture.
    """
    rng = np.random.default_rng([seed, _STREAM, 4])
    each = count // len(_MOTIONS)
    kinds: dict[str, list[tuple[Subject, str, str]]] = {
        "things, held-out scenes": _draw_stills(rng, each, thing=True),
        "monsters, held out": _draw_stills(rng, each, thing=False),
        "characters, by name": [
            (monster, _SCENES[n % len(_SCENES)], name)
            for n, (name, monster) in enumerate(list(CHARACTERS.items()) * -(-each // 2))
        ],
    }
    result = {}
    for kind, stills in kinds.items():
        requests, clips = [], []
        for subject, scene, who in stills:
            asked = [Request(subject=subject, scene=scene, motion=motion) for motion in _MOTIONS]
            picture = Image.fromarray(render((subject,), scene, rng)[0])
            prompts = [request.name(who) for request in asked]
            clips.append(film(animator, prompts, range(seed, seed + len(asked)), image=picture))
            requests += asked
        filmed = np.concatenate(clips)
        save_rows(filmed[:_SHOWN], work / f"picture, {kind}.png")
        result[kind] = score_clips(judge, motions, requests, filmed, last=True)
    return result


def score_clips(
    judge: Judge, motions: MotionJudge, requests: Sequence[Request], clips: Frames, *, last: bool = False
) -> dict[str, float]:
    """Return the shares of clips with the right subject, scene and motion, and with each attribute right.

    Args:
        judge: of frames.
        motions: of clips.
        requests: what the clips shall show.
        clips: uint8 [N, F, 64, 64, 3].
        last: whether the last frame counts, and not the majority of frames.
    """
    subjects, scenes = [], []
    for clip in clips:
        images = [Image.fromarray(frame) for frame in (clip[-1:] if last else clip)]
        subjects.append(_vote_subject(judge.name_subjects(images)))
        scenes.append(Counter(judge.name_scenes(images)).most_common(1)[0][0])
    pairs = list(zip(subjects, requests, strict=True))
    result = {
        "subject": _share(is_right(named, request.subject) for named, request in pairs),
        "scene": _share(scene == request.scene for scene, request in zip(scenes, requests, strict=True)),
        "motion": _share(m == r.motion for m, r in zip(motions.name_motions(list(clips)), requests, strict=True)),
    }
    monsters = [(named, request.subject) for named, request in pairs if isinstance(request.subject, Monster)]
    for name in ATTRIBUTES if monsters else ():
        result[name] = _share(named.get(name) == getattr(subject, name) for named, subject in monsters)
    return result


def _vote_subject(named: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what most frames show, each attribute by itself."""
    kind = Counter(each["kind"] for each in named).most_common(1)[0][0]
    alike = [each for each in named if each["kind"] == kind]
    return {name: Counter(each[name] for each in alike).most_common(1)[0][0] for name in alike[0]}


def _draw_request(rng: np.random.Generator, *, thing: bool, held_out: bool) -> Request:
    while True:
        scene = _pick(_SCENES, rng)
        subject: Subject = _pick(tuple(EMOJI), rng) if thing else random_monster(rng)
        if is_held_out(subject, scene) == held_out and subject not in CHARACTERS.values():
            return Request(subject=subject, scene=scene, motion=_pick(_MOTIONS, rng))


def _draw_stills(rng: np.random.Generator, count: int, *, thing: bool) -> list[tuple[Subject, str, str]]:
    requests = [_draw_request(rng, thing=thing, held_out=True) for _ in range(count)]
    return [(request.subject, request.scene, describe(request.subject)) for request in requests]


def _about(subject: Subject, rng: np.random.Generator) -> Request:
    return Request(subject=subject, scene=_pick(_SCENES, rng), motion=_pick(_MOTIONS, rng))


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _share(values: Iterable[bool]) -> float:
    flags = list(values)
    return round(float(sum(flags)) / len(flags), 4)
