"""The training objective of Wan: rectified flow, with the model's own layout and shift of times."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from video_builders import LATENTS, WIDTH, build_wan

from engram_core import InputError
from engram_core.torch.offload import BlockOffload
from engram_video.training.flow import ClipFlow
from engram_vision.memory import offload_blocks


@pytest.fixture(params=[True, False], ids=["a time a token", "a time a clip"])
def wan(request):
    return build_wan(expand_timesteps=request.param)


def test_the_loss_is_that_of_the_velocity_the_pipeline_would_follow(wan):
    random = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, LATENTS, 2, 8, 6, generator=random) for _ in range(2))
    times, text = torch.tensor([0.25, 0.75]), torch.randn(2, 7, WIDTH, generator=random)
    with torch.no_grad():
        found = ClipFlow(wan).losses(latents, noise, times, {"encoder_hidden_states": text})
        for row, time in enumerate(times):
            steps = torch.full((1,), float(time) * 1000)
            if wan.config.expand_timesteps:  # as WanPipeline lays them out
                mask = torch.ones(2, 8, 6)
                steps = (mask[:, ::2, ::2] * steps).flatten().unsqueeze(0)
            noisy = (1 - time) * latents[row] + time * noise[row]
            guess = wan.transformer(noisy[None], steps, text[row][None], return_dict=False)[0][0]
            expected = (guess - (noise[row] - latents[row])).square().mean()
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_text_states_alone(wan):
    wan.transformer.requires_grad_(False)
    text = torch.randn(1, 7, WIDTH, requires_grad=True)
    latents = torch.randn(1, LATENTS, 2, 4, 4)
    loss = ClipFlow(wan).losses(
        latents, torch.randn_like(latents), torch.tensor([0.5]), {"encoder_hidden_states": text}
    )
    loss.sum().backward()
    assert float(text.grad.abs().max()) > 0


@pytest.mark.parametrize("way", ["blocks in turn", "checkpoints"])
def test_saving_memory_changes_no_gradient(wan, way):
    wan.transformer.requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, LATENTS, 2, 4, 4, generator=draws) for _ in range(2))
    words = torch.randn(2, 7, WIDTH, generator=draws)

    def gradient():
        states = words.clone().requires_grad_()
        ClipFlow(wan).losses(
            latents, noise, torch.tensor([0.2, 0.7]), {"encoder_hidden_states": states}
        ).sum().backward()
        return states.grad

    expected = gradient()
    blocks = offload_blocks(wan.transformer)
    assert blocks == list(wan.transformer.blocks)
    if way == "checkpoints":
        wan.transformer.train().enable_gradient_checkpointing()
        assert torch.equal(gradient(), expected)
    else:
        with BlockOffload(blocks, "cpu", model=wan.transformer):
            assert torch.equal(gradient(), expected)


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0), 5.0),
    ],
    ids=["euler", "unipc"],
)
def test_times_are_shifted_as_the_sampler_shifts_them(scheduler, shift):
    flow = ClipFlow(SimpleNamespace(transformer=None, scheduler=scheduler, config={}))
    count = 1000
    times = flow.spread_times(count, torch.Generator().manual_seed(0)).sort().values
    assert 0 < times[0] < times[-1] < 1
    even = (torch.arange(count) + 0.5) / count
    torch.testing.assert_close(times, shift * even / (1 + (shift - 1) * even), atol=shift / count, rtol=0)
    scheduler.set_timesteps(10)
    sigmas = torch.as_tensor(scheduler.sigmas)[:-1]
    shares = sigmas / (shift - (shift - 1) * sigmas)  # before the shift
    torch.testing.assert_close(shares.diff(), torch.full((9,), float(shares.diff().mean())), atol=2e-3, rtol=0)


def test_other_models_are_refused():
    with pytest.raises(InputError, match=r"has two transformers .* train with Wan2\.2-TI2V-5B"):
        ClipFlow(build_wan(second=True))
    other = SimpleNamespace(config={"num_train_timesteps": 1000})
    with pytest.raises(InputError, match="scheduler is SimpleNamespace, expected one that matches flows"):
        ClipFlow(SimpleNamespace(transformer=None, scheduler=other, config={}))
