"""From the states of the text encoders to what the denoiser reads, as the pipelines of diffusers do it.

Shapes: B samples, L positions, d width, p width of pooled states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram_vision.families import SD35, SDXL, Family, family_of

__all__ = ["Conditioner", "encode_prompts", "prompt_length"]


def prompt_length(pipeline: Any) -> int:
    """Return how many positions the T5 states of a Stable Diffusion 3 pipeline have, also where it lacks T5."""
    part, tokenizer = SD35.streams["t5"], pipeline.tokenizer_3
    return part.max_length if tokenizer is None else min(part.max_length, int(tokenizer.model_max_length))


def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Return all that a pipeline's denoiser would read of some prompts: states [B, L, d], pooled states [B, p].

    Args:
        pipeline: with whatever is loaded into it.
        prompts: B texts.
    """
    family = family_of(pipeline)
    options: dict[str, Any] = {"prompt": list(prompts), "do_classifier_free_guidance": False}
    options |= {"device": pipeline.device, "num_images_per_prompt": 1}
    if family is SD35:
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": prompt_length(pipeline)}
    # The others are those of negative prompts, which were not asked for.
    found = pipeline.encode_prompt(**options)
    return [found[0], found[2]] if family.pooled else [found[0]]


class Conditioner:
    """Puts together what a family's denoiser reads beside latents and times."""

    def __init__(self, family: Family, pipeline: Any, resolution: int) -> None:
        """Keep what of the pipeline counts: nothing of it is needed later.

        Args:
            family: of the pipeline.
            pipeline: whole, before encoders leave it.
            resolution: pixels a side of the pictures.
        """
        self._family, self._resolution = family, resolution
        if family is SD35:
            self._width = int(pipeline.transformer.config.joint_attention_dim)
            self._length = prompt_length(pipeline)

    def __call__(self, states: Mapping[str, Tensor], pooled: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the denoiser's keyword arguments.

        Args:
            states: stream to text states [B, L, d].
            pooled: stream to pooled states [B, p], of the streams that have them.
        """
        if self._family is SDXL:
            side = float(self._resolution)
            # Original size, corner of the crop, target size: a whole picture (arXiv:2307.01952, section 2.2).
            sizes = states["clip_l"].new_tensor([side, side, 0, 0, side, side])
            return {
                "encoder_hidden_states": torch.cat([states["clip_l"], states["clip_g"]], dim=-1),
                "added_cond_kwargs": {
                    "text_embeds": pooled["clip_g"],
                    "time_ids": sizes.expand(len(states["clip_l"]), -1),
                },
            }
        if self._family is SD35:
            return {
                "encoder_hidden_states": self._join(states),
                "pooled_projections": torch.cat([pooled["clip_l"], pooled["clip_g"]], dim=-1),
            }
        (alone,) = states.values()
        return {"encoder_hidden_states": alone}

    def _join(self, states: Mapping[str, Tensor]) -> Tensor:
        """Return Stable Diffusion 3's prompt embedding, [B, 333, 4096] (report, section 2.7).

        The two CLIPs' [B, 77, 768] and [B, 77, 1280] beside each other, filled with zeros, before T5's [B, 256, 4096].
        """
        clip = torch.cat([states["clip_l"], states["clip_g"]], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self._width - clip.shape[-1]))
        t5 = states.get("t5")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self._length, self._width)
        return torch.cat([clip, t5], dim=1)
