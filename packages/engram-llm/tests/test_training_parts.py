"""The parts of training, each by its own law: the optimizer, clipping, padding, silence."""

import logging
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from llm_training_builders import train_settings
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging as transformers_logging

from engram_llm.quiet import quiet_libraries
from engram_llm.training.loss import padding_token, token_loss
from engram_llm.training.optimizer import (
    DenseAndSparse,
    clip_gradients,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)

TABLE = "engram_memory.layers.1.multi_head_embedding.embedding.weight"


class Toy(nn.Module):
    """A table, a matrix and a bias."""

    def __init__(self, *, sparse):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 4, sparse=sparse)
            self.linear = nn.Linear(4, 3)

    def named(self):
        return [(TABLE, self.table.weight), ("a.weight", self.linear.weight), ("a.bias", self.linear.bias)]

    def add_gradients(self, seed):
        rows = torch.randint(0, 20, (30,), generator=torch.Generator().manual_seed(seed))
        (self.linear(self.table(rows)) ** 2).sum().backward()


def settings(tmp_path, **values):
    return train_settings(tmp_path, "none", **values)


def test_each_kind_of_weight_has_its_rate_and_decay(tmp_path):
    named = [
        (TABLE, nn.Parameter(torch.zeros(5, 2))),
        ("engram_memory.layers.1.value_proj.weight", nn.Parameter(torch.zeros(2, 2))),
        ("engram_memory.layers.1.value_proj.bias", nn.Parameter(torch.zeros(2))),
        ("engram_memory.layers.1.norm1.0.weight", nn.Parameter(torch.zeros(2))),
        ("engram_memory.layers.1.short_conv.conv.weight", nn.Parameter(torch.zeros(2, 1, 4))),
        ("model.q_proj.lora_A.default.weight", nn.Parameter(torch.zeros(3, 2))),
    ]
    optimizer = make_optimizer(named, settings(tmp_path, learning_rate=0.01, weight_decay=0.2), sparse=False)
    found = [
        (
            group["lr"],
            group["weight_decay"],
            [name for name, weight in named if any(weight is one for one in group["params"])],
        )
        for group in optimizer.param_groups
    ]
    assert found == [
        (0.01, 0.2, [named[1][0], named[5][0]]),
        (0.01, 0.0, [named[2][0], named[3][0], named[4][0]]),
        (0.05, 0.0, [TABLE]),
    ]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    optimizer = make_optimizer(named, settings(tmp_path, table_rate=0.0), sparse=True)
    assert isinstance(optimizer, DenseAndSparse)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]
    assert isinstance(make_optimizer(named[1:], settings(tmp_path), sparse=True), AdamW)


def test_the_first_sparse_step_is_the_dense_one(tmp_path):
    found = []
    for sparse in (False, True):
        toy = Toy(sparse=sparse)
        optimizer = make_optimizer(toy.named(), settings(tmp_path), sparse=sparse)
        toy.add_gradients(1)
        toy.add_gradients(2)
        norm = clip_gradients(toy.parameters(), 1.0)
        assert toy.table.weight.grad.is_sparse is sparse
        optimizer.step()
        found.append([norm, *(weight.detach() for _, weight in toy.named())])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=5e-5)


def test_sparse_moments_of_untouched_rows_rest(tmp_path):
    toy = Toy(sparse=True)
    optimizer = make_optimizer(toy.named(), settings(tmp_path), sparse=True)
    toy.table.weight.grad = torch.sparse_coo_tensor([[3, 3, 7]], torch.ones(3, 4), (20, 4), check_invariants=True)
    before = toy.table.weight.detach().clone()
    optimizer.step()
    moved = (toy.table.weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [3, 7]
    optimizer.zero_grad()
    toy.table.weight.grad = torch.sparse_coo_tensor([[7]], torch.ones(1, 4), (20, 4), check_invariants=True)
    before = toy.table.weight.detach().clone()
    optimizer.step()
    assert (toy.table.weight != before).any(dim=1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("largest", [0.01, 1e9, math.inf])
def test_gradients_are_clipped_as_by_torch(sparse, largest):
    ours, theirs = Toy(sparse=sparse), Toy(sparse=False)
    for toy in (ours, theirs):
        toy.add_gradients(1)
        toy.add_gradients(2)
    norm = clip_gradients(ours.parameters(), largest)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), largest)
    torch.testing.assert_close(norm, expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), other.grad, rtol=1e-5, atol=1e-7)
    assert float(clip_gradients([nn.Parameter(torch.zeros(1))], 1.0)) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, sparse):
    def begin():
        toy = Toy(sparse=sparse)
        optimizer = make_optimizer(toy.named(), settings(tmp_path), sparse=sparse)
        return toy, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def go(toy, optimizer, scheduler, steps):
        for step in steps:
            toy.add_gradients(step)
            clip_gradients(toy.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    whole = begin()
    go(*whole, range(6))
    part = begin()
    go(*part, range(3))
    weights = {name: value.clone() for name, value in part[0].state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer_tensors(part[1]).items()}
    rest = begin()
    rest[0].load_state_dict(weights)
    restore_optimizer(rest[1], moments)
    rest[2].load_state_dict(part[2].state_dict())
    for group, rate in zip(rest[1].param_groups, rest[2].get_last_lr(), strict=True):
        group["lr"] = rate
    go(*rest, range(3, 6))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(rest[0].state_dict()[name], value)


def test_moments_of_something_else_are_refused(tmp_path):
    toy = Toy(sparse=False)
    optimizer = make_optimizer(toy.named(), settings(tmp_path), sparse=False)
    toy.add_gradients(1)
    optimizer.step()
    moments = optimizer_tensors(optimizer)
    for wrong in ({}, moments | {"0/exp_avg": torch.zeros(1)}, moments | {"9/step": torch.zeros(())}):
        with pytest.raises(ValueError, match="moments are not those of what learns"):
            restore_optimizer(optimizer, wrong)
    restore_optimizer(optimizer, moments)


def test_the_loss_is_that_of_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 30, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (2, 9), generator=generator)
    labels[0, :4] = -100
    for count in (None, torch.tensor(40)):
        ours = token_loss(SimpleNamespace(logits=logits), labels, count)
        theirs = ForCausalLMLoss(logits, labels, 30, num_items_in_batch=count)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*torch.autograd.grad(ours, logits), *torch.autograd.grad(theirs, logits))


def test_what_pads_is_found_in_every_tokenizer():
    tokens = [(3, 4), (None, 4), (None, None)]
    assert [padding_token(SimpleNamespace(pad_token_id=a, eos_token_id=b)) for a, b in tokens] == [3, 4, 0]


def test_libraries_are_quiet_and_as_before_afterwards(capsys):
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    with quiet_libraries():
        logger.error("not now")
        warnings.warn("nor this", stacklevel=1)
        assert not transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""
    assert (logger.level, transformers_logging.is_progress_bar_enabled()) == (level, bars)
