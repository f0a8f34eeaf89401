"""What users would pick instead, by diffusers and PEFT: textual inversion, LoRA, DreamBooth.

Only the loop around them is written here: steps, batches, noise, times, clipping, warm-up, decay and the choice of the
best validated step are an engram's.

Shapes: B samples, N pictures of the class, L positions, d width.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from lessons import Conditions, Lessons, Task, open_model
from quiet import Others
from safetensors.torch import load_file, save_file
from torch import Tensor

from engram_core.training.schedule import rate_factor
from engram_vision.drawing import Drawing, draw
from engram_vision.quiet import quiet_libraries
from engram_vision.training.batches import Batch
from engram_vision.training.pictures import encode_views

_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
LORA_PARTS: Mapping[str, tuple[str, ...]] = {  # those of diffusers' scripts
    "unet": _ATTENTION,
    "transformer": (*_ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
CLASS = "monster"
PRIOR_EACH = 10  # pictures of the class in each scene
PRIOR_LOOK: Mapping[str, Any] = {"steps": 20, "guidance": 4.0, "batch_size": 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What learning took.

    Attributes:
        values: how many were learned.
        seconds: of the steps, with the validations among them.
        others: processors that other programs kept busy meanwhile.
        size: of what is kept, in bytes.
    """

    values: int
    seconds: float
    others: float
    size: int


def teach(
    lessons: Lessons,
    parameters: Sequence[Tensor],
    rate: float,
    conditions: Callable[[Tensor], Conditions],
    *,
    more: Callable[[int], Tensor] | None = None,
    limit: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Let parameters learn, and leave them as they were at the best validated step.

    Args:
        lessons: what is learned.
        parameters: what learns.
        rate: peak learning rate of AdamW.
        conditions: what the denoiser reads of rows of the frozen texts.
        more: a further loss of a step.
        limit: called between gradients and step.

    Returns:
        Seconds that it took, and processors that other programs kept busy meanwhile.
    """
    settings = lessons.settings
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay)
    checks, least, best = lessons.checks(), float("inf"), [value.detach().clone() for value in parameters]
    started, others = monotonic(), Others()
    for step in range(settings.steps):
        factor = rate_factor(step, steps=settings.steps, warm_up=settings.warm_up, schedule=settings.schedule)
        optimizer.param_groups[0]["lr"] = rate * factor
        batch = lessons.batch(step)
        loss = lessons.losses(batch, conditions(batch.texts)).mean()
        torch.autograd.backward(loss if more is None else loss + more(step))
        if limit is not None:
            limit()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done == settings.steps or done % settings.validate_every == 0:
            with torch.no_grad():
                found = float(torch.cat([lessons.losses(check, conditions(check.texts)) for check in checks]).mean())
            if found < least:
                least, best = found, [value.detach().clone() for value in parameters]
    with torch.no_grad():  # where no loss was finite, the first values: it learned nothing
        for value, kept in zip(parameters, best, strict=True):
            value.copy_(kept)
    return monotonic() - started, others.share()


def invented_word(trigger: str) -> str:
    """Return the word that textual inversion adds to the vocabulary for a name."""
    return f"<{trigger.casefold().replace(' ', '-')}>"


def learn_inversion(task: Task, options: Mapping[str, Any]) -> Learned:
    """Learn the embeddings of a new word, or of several that stand for it, begun as the class's word."""
    lessons, word, count = Lessons(task), invented_word(task.trigger), options["vectors"]
    tokenizer, encoder = lessons.pipeline.tokenizer, lessons.pipeline.text_encoder
    first = tokenizer(CLASS, add_special_tokens=False)["input_ids"]
    tokens = [word, *(f"{word}_{number}" for number in range(1, count))]
    tokenizer.add_tokens(tokens)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings().weight
    own = torch.tensor(tokenizer.convert_tokens_to_ids(tokens), device=table.device)
    with torch.no_grad():
        table[own] = table[first].mean(dim=0)
    table.requires_grad_(True)
    ids = lessons.retell(
        lambda caption: lessons.pipeline.maybe_convert_prompt(caption.replace(task.trigger, word), tokenizer)
    ).to(lessons.device)
    others = torch.ones(len(table), dtype=torch.bool, device=table.device)
    others[own] = False

    def keep_others() -> None:
        if table.grad is not None:
            table.grad[others] = 0

    seconds, busy = teach(
        lessons,
        [table],
        options["rate"],
        lambda rows: lessons.condition_on(encoder(ids[rows])[0]),
        limit=keep_others,
    )
    file = task.output.with_suffix(".word.safetensors")
    save_file({word: table.detach()[own].cpu().contiguous()}, file)
    return Learned(values=count * table.shape[1], seconds=seconds, others=busy, size=file.stat().st_size)


def load_inversion(pipeline: Any, trigger: str, output: Path) -> None:
    """Add a learned word to a pipeline."""
    with quiet_libraries():
        pipeline.load_textual_inversion(str(output.with_suffix(".word.safetensors")), token=invented_word(trigger))


def learn_lora(task: Task, options: Mapping[str, Any]) -> Learned:
    """Learn LoRA on the attention of the denoiser or of a single text encoder, saved by diffusers."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    lessons, part, rank = Lessons(task), options["part"], options["rank"]
    model = getattr(lessons.pipeline, part)
    targets = list(LORA_PARTS[part])
    torch.manual_seed(_first_seed(task))
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    read = lessons.conditions
    if part == "text_encoder":

        def read(rows: Tensor) -> Conditions:
            return lessons.condition_on(model(lessons.ids(rows))[0])

    seconds, busy = teach(lessons, parameters, options["rate"], read)
    layers = get_peft_model_state_dict(model, save_embedding_layers=False)
    if part != "transformer":  # of which it would rename some layers and not others
        layers = convert_state_dict_to_diffusers(layers)
    folder = lora_folder(task.output)
    lessons.pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": layers})
    return Learned(
        values=sum(parameter.numel() for parameter in parameters),
        seconds=seconds,
        others=busy,
        size=sum(file.stat().st_size for file in folder.iterdir()),
    )


def _first_seed(task: Task) -> int:
    """Return a seed of first values that no other character has: LoRAs that begin alike add up when merged."""
    return int.from_bytes(hashlib.sha256(f"{task.seed} {task.trigger}".encode()).digest()[:4], "big")


def lora_folder(output: Path) -> Path:
    """Return where a LoRA is kept."""
    return output.with_suffix(".lora")


def load_lora(pipeline: Any, trigger: str, output: Path) -> None:
    """Load a LoRA into a pipeline, beside those that are loaded already, each with weight 1."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the others, which are meant to be there
        warnings.filterwarnings("error", "While injecting the PEFT adapters")  # a part of what was learned is not found
        pipeline.load_lora_weights(lora_folder(output), adapter_name=trigger.casefold().replace(" ", "_"))
        names = sorted({name for names in pipeline.get_list_adapters().values() for name in names})
        pipeline.set_adapters(names, [1.0] * len(names))


def learn_whole(task: Task, options: Mapping[str, Any]) -> Learned:
    """Let the whole U-Net learn, as DreamBooth does; with `prior` also from pictures that it drew of the class."""
    lessons = Lessons(task)
    unet = lessons.pipeline.unet
    prior = Prior(lessons, task.cache, options["phrases"], options["each"]) if options["prior"] else None
    unet.requires_grad_(True)
    parameters = list(unet.parameters())
    more = None if prior is None else prior.loss
    seconds, busy = teach(lessons, parameters, options["rate"], lessons.conditions, more=more)
    folder = whole_folder(task.output)
    unet.save_pretrained(folder)
    return Learned(
        values=sum(parameter.numel() for parameter in parameters),
        seconds=seconds,
        others=busy,
        size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def whole_folder(output: Path) -> Path:
    """Return where a whole U-Net is kept."""
    return output.with_suffix(".unet")


def load_whole(pipeline: Any, trigger: str, output: Path) -> None:  # noqa: ARG001
    """Put another U-Net into a pipeline."""
    from diffusers import UNet2DConditionModel

    with quiet_libraries():
        pipeline.unet = UNet2DConditionModel.from_pretrained(whole_folder(output)).to(pipeline.device)


class Prior:
    """Pictures that the base model drew of the class, from which DreamBooth learns what is to stay."""

    def __init__(self, lessons: Lessons, cache: Path, phrases: Sequence[str], each: int) -> None:
        """Draw and encode them, unless they are kept.

        Args:
            lessons: whose noise schedule and conditions they share.
            cache: folder to keep them in.
            phrases: of the scenes.
            each: how many in each scene.
        """
        self._lessons = lessons
        prompts = [f"a {CLASS} {phrase}" for phrase in phrases for _ in range(each)]
        file = cache / f"prior-{len(phrases)}-{each}.safetensors"
        if not file.exists():
            pipeline = open_model(str(lessons.device))
            drawings = [Drawing(prompt=prompt, seed=10**6 + number) for number, prompt in enumerate(prompts)]
            mean, std = encode_views(pipeline.vae, draw(pipeline, drawings, **PRIOR_LOOK), lessons.device)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")  # other rows may need them too, at the same time
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, partial)
            partial.replace(file)
        kept = load_file(file)
        self._mean, self._std = kept["mean"], kept["std"]
        with torch.no_grad():
            ids = lessons.tokenize([f"a {CLASS} {phrase}" for phrase in phrases]).to(lessons.device)
            self._states = lessons.pipeline.text_encoder(ids)[0].repeat_interleave(each, dim=0)

    def loss(self, step: int) -> Tensor:
        """Return the mean loss of as many pictures of the class as a batch has others."""
        lessons = self._lessons
        size = lessons.settings.batch_size
        random = torch.Generator().manual_seed(1000 * lessons.settings.seed + step)
        chosen = torch.randint(len(self._mean), (size,), generator=random)
        noise, spread = (torch.randn((size, *self._mean.shape[1:]), generator=random) for _ in range(2))
        latents = self._mean[chosen] + self._std[chosen] * spread
        times = lessons.objective.spread_times(size, random)
        batch = Batch(latents=latents, noise=noise, times=times, texts=chosen)
        return lessons.losses(batch, lessons.condition_on(self._states[chosen])).mean()
