"""A pipeline's weights in the layout of Stable Diffusion's authors (github.com/CompVis/stable-diffusion): one file."""

from pathlib import Path

from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_original(pipeline, path: Path) -> Path:
    """Write a pipeline's weights to one file."""
    names = _unet_names(pipeline.unet.config)
    tensors = {
        f"model.diffusion_model.{_rename_unet(key, names)}": value for key, value in pipeline.unet.state_dict().items()
    }
    n_blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = _rename_vae(key, n_blocks)
        is_projection = "attn_1" in name and ".norm." not in name and name.endswith("weight")
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if is_projection else value
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _unet_names(config) -> dict[str, str]:
    """Return prefixes of diffusers' names and what they are in the original."""
    n_layers = config.layers_per_block
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for block, kind in enumerate(config.up_block_types):
        first = block * (n_layers + 1)
        for layer in range(n_layers):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{first + layer + 1}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{first + layer + 1}.1"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + n_layers + 1}.0.op"
        for layer in range(n_layers + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        place = 2 if kind.startswith("CrossAttn") else 1
        names[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{first + n_layers}.{place}"
    return names


def _rename_unet(key: str, names: dict[str, str]) -> str:
    prefix = next(name for name in names if key.startswith(f"{name}."))
    rest = key.removeprefix(f"{prefix}.")
    if ".resnets." in prefix:
        part, _, rest = rest.partition(".")
        rest = f"{_RESNET[part]}.{rest}"
    return f"{names[prefix]}.{rest}"


def _rename_vae(key: str, n_blocks: int) -> str:
    for block in range(n_blocks):
        key = key.replace(f"down_blocks.{block}.resnets.", f"down.{block}.block.")
        key = key.replace(f"down_blocks.{block}.downsamplers.0.", f"down.{block}.downsample.")
        key = key.replace(f"up_blocks.{block}.resnets.", f"up.{n_blocks - 1 - block}.block.")
        key = key.replace(f"up_blocks.{block}.upsamplers.0.", f"up.{n_blocks - 1 - block}.upsample.")
    for layer in (0, 1):
        key = key.replace(f"mid_block.resnets.{layer}.", f"mid.block_{layer + 1}.")
    if "mid_block.attentions.0." in key:
        for part, name in _ATTENTION.items():
            key = key.replace(f"mid_block.attentions.0.{part}.", f"mid.attn_1.{name}.")
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
