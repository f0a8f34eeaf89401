"""The model families of diffusers that are known here: their parts, and what their denoisers read; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram_core import InputError

__all__ = [
    "FAMILIES",
    "LAST",
    "SD15",
    "SD35",
    "SDXL",
    "Family",
    "TextPart",
    "family_of",
    "known_families",
    "register_family",
]

LAST, PENULTIMATE = "last_hidden_state", "penultimate_hidden_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """The parts of a pipeline that make up one stream.

    Attributes:
        tokenizer, encoder: what diffusers calls them.
        encoder_class: the encoder's class in transformers.
        model_type: transformers' name for its kind.
        site: which of its states the denoiser reads.
        max_length: token ids it reads at most, special ones included.
        optional: whether the pipeline works without it.
        reads_padding: whether the denoiser reads the states of padding, too.
        follows: whether its positions follow those of the other streams; else its channels do.
    """

    tokenizer: str
    encoder: str
    encoder_class: str
    model_type: str
    site: str
    max_length: int
    optional: bool = False
    reads_padding: bool = True
    follows: bool = False

    def read_length(self, tokenizer: Any, encoder: Any) -> int:
        """Return how many ids a pipeline with these two gives its encoder."""
        limits = [self.max_length, tokenizer.model_max_length]
        limits.append(getattr(encoder.config, "max_position_embeddings", self.max_length))
        return int(min(limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        name: of its backbone.
        title: in words.
        default_model: hub id used when no model is named.
        pipeline_class: its text-to-image pipeline in diffusers.
        denoiser: what the pipeline calls the model that learns nothing here and draws everything.
        denoiser_class: its class in diffusers.
        streams: stream to the parts that make it up, in the order in which the denoiser reads them.
        pooled: whether the denoiser also reads pooled text states.
        vae_class: of the autoencoder, in diffusers.
        latent_field: where the autoencoder's configuration has the number of latent channels.
        text_field: where the denoiser's configuration has the width of the text states it reads.
        vae_in_fp32: whether the autoencoder is to compute in float32, whatever the precision.
        readers: pattern of the names of the denoiser's modules that read text states, one in each block.
        projection: the denoiser's module that text states pass before the blocks read them.
        passes_on: whether a block passes the text states on to the next one changed (joint attention).
        second_denoiser: what the pipeline calls another denoiser that some models have, for the later steps.
        package: whose folder `tiny` holds the checkpoint that ships, if one does.
    """

    name: str
    title: str
    default_model: str
    pipeline_class: str
    denoiser: str
    denoiser_class: str
    streams: Mapping[str, TextPart]
    pooled: bool
    vae_class: str = "AutoencoderKL"
    latent_field: str = "latent_channels"
    text_field: str = "cross_attention_dim"
    vae_in_fp32: bool = False
    readers: str = r".+\.attn2"
    projection: str | None = None
    passes_on: bool = False
    second_denoiser: str | None = None
    package: str = "engram_vision"

    def modules(self) -> dict[str, tuple[str, str]]:
        """Return the library and class of every module with weights, by the pipeline's name for it."""
        encoders = {part.encoder: ("transformers", part.encoder_class) for part in self.streams.values()}
        denoisers = [self.denoiser, *([self.second_denoiser] if self.second_denoiser else [])]
        return {
            **dict.fromkeys(denoisers, ("diffusers", self.denoiser_class)),
            "vae": ("diffusers", self.vae_class),
            **encoders,
        }

    def denoisers(self, pipeline: Any) -> dict[str, Any]:
        """Return a pipeline's denoisers by its names for them: one, or two for early and late steps."""
        names = [self.denoiser, *([self.second_denoiser] if self.second_denoiser else [])]
        found = {name: getattr(pipeline, name, None) for name in names}
        return {name: getattr(each, "_orig_mod", each) for name, each in found.items() if each is not None}

    def encoders(self, pipeline: Any) -> dict[str, Any]:
        """Return a pipeline's text encoders by stream; optional ones that it lacks are left out.

        Raises:
            InputError: it lacks another one, or one is of another kind.
        """
        found = {}
        for stream, part in self.streams.items():
            tokenizer, encoder = (getattr(pipeline, name, None) for name in (part.tokenizer, part.encoder))
            if part.optional and (tokenizer is None or encoder is None):
                continue
            if tokenizer is None or encoder is None:
                raise InputError(
                    f"{type(pipeline).__name__} has no {part.tokenizer} and {part.encoder}; "
                    f"expected a pipeline of {self.title} with its text encoders"
                )
            kind = getattr(getattr(encoder, "config", None), "model_type", None)
            if kind != part.model_type:
                raise InputError(
                    f"{type(pipeline).__name__} has {kind} as its {part.encoder}, expected {part.model_type} "
                    f"as in {self.title}"
                )
            # What `torch.compile` wraps around a module comes and goes; the module stays.
            found[stream] = getattr(encoder, "_orig_mod", encoder)
        return found


def _clip(number: int, encoder_class: str, site: str) -> TextPart:
    suffix = "" if number == 1 else f"_{number}"
    return TextPart(
        tokenizer=f"tokenizer{suffix}",
        encoder=f"text_encoder{suffix}",
        encoder_class=encoder_class,
        model_type="clip_text_model",
        site=site,
        max_length=77,
    )


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    default_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    pipeline_class="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    # After the final layer norm: the states the U-Net's cross-attention reads (report, section 2.7).
    streams={"clip_l": _clip(1, "CLIPTextModel", LAST)},
    pooled=False,
)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    default_model="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline_class="StableDiffusionXLPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    streams={
        "clip_l": _clip(1, "CLIPTextModel", PENULTIMATE),
        "clip_g": _clip(2, "CLIPTextModelWithProjection", PENULTIMATE),
    },
    pooled=True,
)

SD35 = Family(
    name="sd35",
    title="Stable Diffusion 3.5",
    default_model="stabilityai/stable-diffusion-3.5-medium",
    pipeline_class="StableDiffusion3Pipeline",
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    # The states the prompt embedding is made of (report, section 2.7).
    streams={
        "clip_l": _clip(1, "CLIPTextModelWithProjection", PENULTIMATE),
        "clip_g": _clip(2, "CLIPTextModelWithProjection", PENULTIMATE),
        "t5": TextPart(
            tokenizer="tokenizer_3",
            encoder="text_encoder_3",
            encoder_class="T5EncoderModel",
            model_type="t5",
            site=LAST,
            max_length=256,  # the pipeline's max_sequence_length
            optional=True,
            follows=True,
        ),
    },
    pooled=True,
    text_field="joint_attention_dim",
    readers=r"transformer_blocks\.\d+",
    projection="context_embedder",
    passes_on=True,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (SD15, SDXL, SD35)}
"""The families of image generators."""

_others: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family of another package known, so that adapters can be loaded into its pipelines."""
    _others[family.name] = family


def known_families() -> Mapping[str, Family]:
    """Return all families that are known, by name."""
    return {**FAMILIES, **_others}


def family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline, by its parts rather than its class: many pipelines share them.

    Raises:
        InputError: it is of none that is known.
    """
    count = 3 if hasattr(pipeline, "text_encoder_3") else 2 if hasattr(pipeline, "text_encoder_2") else 1
    candidates = [family for family in known_families().values() if len(family.streams) == count]
    kind = getattr(getattr(getattr(pipeline, "text_encoder", None), "config", None), "model_type", None)
    firsts = {next(iter(family.streams.values())).model_type: family for family in reversed(candidates)}
    family = firsts.get(str(kind), candidates[0])
    try:
        family.encoders(pipeline)
    except InputError as error:
        known = ", ".join(each.title for each in known_families().values())
        raise InputError(f"{error}; known families: {known}") from None
    return family
