"""The video models of diffusers that are known here, as data; importing this makes them known to `load_engram`."""

from __future__ import annotations

from engram_vision.families import LAST, Family, TextPart, register_family

__all__ = ["WAN22"]

WAN22 = Family(
    name="wan22",
    title="Wan 2.2",
    default_model="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    pipeline_class="WanPipeline",
    denoiser="transformer",
    denoiser_class="WanTransformer3DModel",
    # The states before the text projection; the pipeline drops those of padding (report, section 2.7).
    streams={
        "umt5": TextPart(
            tokenizer="tokenizer",
            encoder="text_encoder",
            encoder_class="UMT5EncoderModel",
            model_type="umt5",
            site=LAST,
            max_length=512,  # the pipeline's max_sequence_length
            reads_padding=False,
        )
    },
    pooled=False,
    vae_class="AutoencoderKLWan",
    latent_field="z_dim",
    text_field="text_dim",
    vae_in_fp32=True,
    readers=r"blocks\.\d+\.attn2",
    projection="condition_embedder.text_embedder",
    second_denoiser="transformer_2",
    package="engram_video",
)
register_family(WAN22)
