"""The loop that every stage of the recipe shares: AdamW, a moving average of the weights, a state to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.state import Average, cosine, load_state, save_state

Report = Callable[[str], None]
Weights = Mapping[str, Mapping[str, Tensor]]


def fit(
    name: str,
    modules: Mapping[str, nn.Module],
    loss_of: Callable[[int], Tensor],
    *,
    folder: Path,
    steps: int,
    peak_rate: float,
    decay: float = 0.9995,
    weight_decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    warm_up: int = 200,
    save_every: int = 200,
    report: Report,
    preview: Callable[[Weights, int], None] | None = None,
    preview_every: int = 400,
) -> Weights:
    """Train modules together and return their averaged weights; goes on where an earlier call stopped.

    Args:
        name: of the stage and of its state's file.
        modules: what learns.
        loss_of: the loss of a step, a function of its number alone.
        folder: for the state.
        steps: in all.
        peak_rate: the learning rate after warm-up; a cosine follows.
        decay: of the moving average.
        weight_decay: of AdamW.
        betas: of AdamW.
        warm_up: steps of linear rise.
        save_every: steps between states and reports.
        report: called with a line now and then.
        preview: called with the averaged weights now and then.
        preview_every: steps between previews.
    """
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, peak_rate, betas=betas, weight_decay=weight_decay)
    average = {key: Average(module, decay) for key, module in modules.items()}
    state = folder / f"{name}.safetensors"
    begin = load_state(state, modules, optimizer, average)
    started, total = time.monotonic(), 0.0
    for step in range(begin, steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak=peak_rate, warm_up=warm_up)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, module in modules.items():
            average[key].update(module, step)
        total += float(loss.detach())
        done = step + 1
        if done % save_every == 0 or done == steps:
            save_state(state, done, modules, optimizer, average)
            spent = time.monotonic() - started
            left = spent / (done - begin) * (steps - done)
            mean = total / (min(done - begin, save_every) if done % save_every == 0 else done % save_every)
            report(f"{name} {done}/{steps}: loss {mean:.4f}, {spent:.0f} s, {left:.0f} s to go")
            total = 0.0
        if preview is not None and done % preview_every == 0:
            preview({key: each.values for key, each in average.items()}, done)
    return {key: each.values for key, each in average.items()}
