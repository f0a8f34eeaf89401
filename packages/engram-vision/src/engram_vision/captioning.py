"""Captions written by an image-to-text model of transformers, one picture after the other.

Any model that `AutoModelForImageTextToText` loads will do: chat models with a picture in the question, captioners that
write on their own (BLIP, GIT), encoder and decoder pairs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from engram_core import InputError, Watcher
from engram_core.errors import one_line, show_text
from engram_vision.caption_files import CLIP_SUFFIXES, CaptionFolder, Form
from engram_vision.images import is_animated, load_picture, show_path
from engram_vision.models import DTYPES, pick_device
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import Device, Precision

__all__ = ["PROMPT", "CaptionReport", "CaptionSettings", "Captioner", "Heard", "caption_folder", "load_captioner"]

PROMPT = "Describe this picture in one sentence."
"""What a chat model is asked unless the user says otherwise."""

Heard = Callable[[str, str], None]
"""Takes the name of a picture or clip and its caption, as soon as there is one and, if asked for, it is written."""

# Their prompt is how the caption begins; for all others it is a question or a command.
_CONTINUING = ("blip", "blip-2", "git")
_PAIRED = "vision-encoder-decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSettings:
    """How to write captions.

    Attributes:
        folder: pictures or clips.
        captioner: the model: hub id, or folder in transformers layout.
        prompt: the question or command; for BLIP and GIT the words that captions begin with. None asks chat models
            `PROMPT` and others nothing.
        max_new_tokens: tokens of a caption at most, beside the prompt.
        batch_size: pictures at once. As many captions are lost when a run is killed.
        precision: number type of the weights.
        device: where to compute.
        overwrite: also write captions for pictures that have one.
        write: write captions to the folder; else they are only told.
    """

    folder: Path
    captioner: str
    prompt: str | None = None
    max_new_tokens: int = 100
    batch_size: int = 1
    precision: Precision = "fp32"
    device: Device = "auto"
    overwrite: bool = False
    write: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionReport:
    """What became of a folder.

    Attributes:
        form: how its captions are kept.
        captions: what was made, by the name of the picture or clip.
        kept: pictures and clips that had a caption already.
        silent: those for which the captioner said nothing; they have no caption, or the one they had.
        written: the files that were written.
        seconds: time it took.
    """

    form: Form
    captions: Mapping[str, str]
    kept: tuple[str, ...]
    silent: tuple[str, ...]
    written: tuple[Path, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captioner:
    """A model that describes pictures; see `load_captioner`.

    Attributes:
        name: as the user calls it.
        model: the frozen model, on its device.
        processor: makes its inputs; of encoder and decoder pairs, only makes pixels.
        tokenizer: reads its outputs.
        prompt: the question or command, in the model's own form; None where there is none.
        opening: the words with which captions begin, of a model that goes on from them.
        is_chat: whether the prompt went through a chat template.
    """

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    prompt: str | None
    opening: str | None
    is_chat: bool

    def describe(self, images: Sequence[Image.Image], max_new_tokens: int = 100) -> list[str]:
        """Return a caption for each picture, on one line; empty where the model says nothing.

        The likeliest token is taken at each step, so equal pictures get equal captions.

        Args:
            images: RGB pictures.
            max_new_tokens: tokens of a caption at most, beside the prompt.

        Raises:
            InputError: the model cannot use the pictures or the prompt.
        """
        try:
            with quiet_libraries(), warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # of settings for sampling, which is not done
                inputs = self._encode(images).to(self.model.device, dtype=self.model.dtype)
                ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{self.name}: the device has not enough memory for {len(images)} pictures at once; "
                "lower the batch size or the precision"
            ) from None
        except Exception as error:
            hint = "" if self.prompt else "; some models need a prompt (--prompt)"
            raise InputError(f"{self.name}: cannot describe pictures: {_reason(error)}{hint}") from error
        given = inputs.get("input_ids")
        if given is not None and ids.shape[1] >= given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [self._finish(" ".join(text.split())) for text in texts]

    def _encode(self, images: Sequence[Image.Image]) -> Any:
        """Return the model's inputs."""
        if self.model.config.model_type == _PAIRED:
            return self.processor(images=list(images), return_tensors="pt")
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.prompt is not None:
            options |= {"text": [self.prompt] * len(images), "padding": True}
        if self.is_chat:
            begin = self.tokenizer.bos_token
            if begin and str(self.prompt).startswith(begin):
                options["add_special_tokens"] = False  # the template wrote them
            return self.processor(images=[[image] for image in images], **options)
        inputs = self.processor(images=list(images), **options)
        if self.model.config.model_type == "git" and self.opening:
            # The tokenizer closes the text; BLIP's own code opens it again, GIT's does not.
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        return inputs

    def _finish(self, text: str) -> str:
        """Return a caption with its opening, which some models repeat as their tokenizer spells it."""
        if not self.opening:
            return text
        echo = self.tokenizer.decode(self.tokenizer(self.opening)["input_ids"], skip_special_tokens=True)
        rest = text.removeprefix(" ".join(echo.split())).strip()
        return f"{self.opening} {rest}" if rest else ""


def load_captioner(
    name: str, *, prompt: str | None = None, precision: Precision = "fp32", device: torch.device | None = None
) -> Captioner:
    """Return a model that describes pictures.

    Code that comes with a model is not run.

    Args:
        name: hub id, or folder in transformers layout.
        prompt: see `CaptionSettings`.
        precision: number type of the weights.
        device: where to put it; None means the CPU.

    Raises:
        InputError: it cannot be found or read, is no image-to-text model, lacks weights, or takes no prompt.
    """
    path = Path(name).expanduser()
    remedy = "; there is no such folder here, and a hub id needs the network or the hub's cache"
    if path.is_dir():
        remedy = ""
    elif path.exists():
        raise InputError(f"{name}: is a file; give a hub id, or a folder in transformers layout")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: does not exist; give a hub id, or a folder in transformers layout")
    source = str(path) if path.is_dir() else name

    def load(loader: Any, **options: Any) -> Any:
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return loader.from_pretrained(source, trust_remote_code=False, **options)
        except Exception as error:
            raise InputError(f"{name}: cannot be loaded as an image-to-text model: {_reason(error)}{remedy}") from error

    model, report = load(AutoModelForImageTextToText, dtype=DTYPES[precision], output_loading_info=True)
    missing = report["missing_keys"]
    if missing:  # transformers would make them up at random
        raise InputError(
            f"{name}: cannot be loaded: {len(missing)} of its weights are missing, e.g. {min(missing)}; "
            "download it again"
        )
    kind = model.config.model_type
    if kind == _PAIRED:
        if prompt:
            raise InputError(f"{name}: is an encoder and a decoder ({kind}), which take no prompt; leave --prompt out")
        processor, tokenizer = load(AutoImageProcessor), load(AutoTokenizer)
    else:
        processor = load(AutoProcessor)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise InputError(f"{name}: has no processor for pictures and texts; download it again, with all its files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not model.config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # captions begin where prompts end
    is_chat = getattr(processor, "chat_template", None) is not None
    text = " ".join(prompt.split()) if prompt else None
    opening = text if kind in _CONTINUING and not is_chat else None
    if is_chat:
        try:
            text = _render(processor, text or PROMPT)
        except Exception as error:
            raise InputError(f"{name}: its chat template cannot be used: {_reason(error)}") from error
    model.requires_grad_(False).eval()
    return Captioner(
        name=name,
        model=model if device is None else model.to(device),
        processor=processor,
        tokenizer=tokenizer,
        prompt=text,
        opening=opening,
        is_chat=is_chat,
    )


def caption_folder(
    settings: CaptionSettings, *, watcher: Watcher | None = None, heard: Heard | None = None
) -> CaptionReport:
    """Write captions for the pictures and clips of a folder; of a clip, its middle frame is described.

    They are written where the folder has its captions, in `.txt` files beside the pictures where it has none. Each
    batch is written before the next is begun, and what has a caption is passed over, so that a run that was stopped
    goes on where it was.

    Args:
        settings: what to do.
        watcher: hears how it goes.
        heard: told of each caption.

    Raises:
        InputError: a setting is wrong, a picture, clip or caption file cannot be read, or the model does not fit.
        AdapterWriteError: a caption cannot be written.
    """
    began = time.monotonic()
    watcher = watcher or Watcher()
    for name, number in (("max_new_tokens", settings.max_new_tokens), ("batch_size", settings.batch_size)):
        if number < 1:
            raise InputError(f"{name} is {number}, expected at least 1")
    device = pick_device(settings.device, settings.precision)
    place = CaptionFolder(settings.folder, incomplete=True, note=watcher.note)
    present = place.captions
    kept = tuple(name for name, text in present.items() if text and not settings.overwrite)
    wanted = [name for name in present if name not in kept]
    frames = _check_media(place, wanted, watcher)
    captions: dict[str, str] = {}
    silent: list[str] = []
    written: dict[Path, None] = {}
    if wanted:
        watcher.begin(f"loading {settings.captioner}")
        captioner = load_captioner(
            settings.captioner, prompt=settings.prompt, precision=settings.precision, device=device
        )
        watcher.begin("captioning", len(wanted))
        for start in range(0, len(wanted), settings.batch_size):
            names = wanted[start : start + settings.batch_size]
            images = [_load_image(place.locate(name), frames.get(name)) for name in names]
            made = dict(zip(names, captioner.describe(images, settings.max_new_tokens), strict=True))
            silent += [name for name, text in made.items() if not text]
            made = {name: text for name, text in made.items() if text}
            if settings.write:
                written |= dict.fromkeys(place.write(made))
            captions |= made
            if heard is not None:
                for name, text in made.items():
                    heard(name, text)
            watcher.advance(start + len(names))
        watcher.end()
    return CaptionReport(
        form=place.form,
        captions=captions,
        kept=kept,
        silent=tuple(silent),
        written=tuple(written),
        seconds=time.monotonic() - began,
    )


def _check_media(place: CaptionFolder, names: Sequence[str], watcher: Watcher) -> dict[str, int]:
    """Decode every picture and clip once, so that a damaged one is noticed before hours of work.

    Returns:
        The number of the middle frame of each clip.
    """
    middle = {}
    watcher.begin("checking", len(names))
    for done, name in enumerate(names, start=1):
        path = place.locate(name)
        if _is_clip(path):
            middle[name] = _probe(path) // 2
        else:
            load_picture(path)
        watcher.advance(done)
    watcher.end()
    return middle


def _is_clip(path: Path) -> bool:
    return is_animated(path) if path.suffix.lower() == ".gif" else path.suffix.lower() in CLIP_SUFFIXES


def _probe(path: Path) -> int:
    """Return how many frames a clip has."""
    if find_spec("engram_video") is None:
        raise InputError(
            f"{show_path(path)}: is a clip, which only engram-video can read; install it from this repository, "
            "or take the clip out of the folder"
        )
    from engram_video.clips import probe_clip

    return probe_clip(path).frames


def _load_image(path: Path, frame: int | None) -> Image.Image:
    """Return a picture, or a frame of a clip."""
    if frame is None:
        return load_picture(path)
    from engram_video.clips import read_clip

    return Image.fromarray(read_clip(path, frames=[frame]).frames[0])


def _render(processor: Any, prompt: str) -> str:
    """Return a question about a picture as a chat model reads it, up to where the answer begins."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    with quiet_libraries():
        # Models that can think aloud are asked not to; templates of others do not know the name.
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    return str(text)


def _reason(error: BaseException) -> str:
    return show_text(f"{type(error).__name__}: {one_line(error, 300)}")
