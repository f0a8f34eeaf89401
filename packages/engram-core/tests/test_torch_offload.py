"""Blocks that take turns compute what they computed before, to the bit, and no two are ever on the device at once.

The CPU stands in for the device: what is copied there is followed until it is freed, and weights that have no business
being read hold NaN.
"""

import weakref

import numpy as np
import pytest

from engram_core import InputError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from engram_core.torch import offload  # noqa: E402
from engram_core.torch.offload import BlockOffload  # noqa: E402

WIDTH = 8


class Block(nn.Module):
    """Uses its weights in all ways that matter: as they are, transposed, and through a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, states, shift=None):
        self.calls += 1
        changed = torch.tanh(self.linear(self.norm(states))) * self.gain
        return states + (changed if shift is None else changed + shift)


class Model(nn.Module):
    def __init__(self, n_blocks=3, visits=1):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))
        self.visits = visits

    def forward(self, states):
        shift = states.mean(dim=-1, keepdim=True)
        states = self.first(states)
        for block in self.blocks:
            for _ in range(self.visits):
                states = block(states, shift=shift)
        return states


def make_model(**options):
    torch.manual_seed(0)
    return Model(**options).requires_grad_(False)


def make_states(seed=1):
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(model, states):
    """The output, and the gradient with respect to the input."""
    result = model(states)
    (found,) = torch.autograd.grad(result.square().sum(), states)
    return result.detach(), found


def weight_bytes(module):
    return sum(weight.nbytes for weight in module.parameters())


def same(found, expected):
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class Device:
    """Copies that are followed: how many bytes are alive, and were alive at most."""

    def __init__(self):
        self.true = {}
        self.now = self.peak = self.copies = 0

    def pin(self, tensor, device):
        """Take a weight into host memory that must not be read: NaN stands there."""
        home = torch.full_like(tensor, torch.nan)
        self.true[home.data_ptr()] = tensor
        return home

    def copy(self, tensor, device):
        array = np.copy(self.true.get(tensor.data_ptr(), tensor).numpy())
        self.now += array.nbytes
        self.copies += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(array, self._freed, array.nbytes)
        return torch.from_numpy(array)

    def _freed(self, size):
        self.now -= size


@pytest.fixture
def device(monkeypatch):
    """A device whose evicted copies turn to NaN as well, so that nobody can go on with them."""
    followed, unload = Device(), BlockOffload._unload

    def spoil(self, index):
        for weight in self._weights[index].values():
            weight.data.fill_(torch.nan)
        unload(self, index)

    monkeypatch.setattr(offload, "_pinned", followed.pin)
    monkeypatch.setattr(offload, "_copy", followed.copy)
    monkeypatch.setattr(BlockOffload, "_unload", spoil)
    return followed


@pytest.mark.parametrize("visits", [1, 2])
def test_outputs_and_gradients_are_the_plain_models_to_the_bit(device, visits):
    model = make_model(visits=visits)
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu"):
        same(gradient(model, make_states()), expected)


def test_one_block_is_on_the_device_at_a_time(device):
    model = make_model(n_blocks=4)
    with BlockOffload(model.blocks, "cpu") as offloaded:
        buffers = device.now
        for step in range(3):
            gradient(model, make_states(step))
            assert offloaded.resident == 0  # whose backward pass was the last
            assert device.now == buffers + weight_bytes(model.blocks[0])
        assert device.peak == buffers + weight_bytes(model.blocks[0])
        offloaded.evict()
        assert device.now == buffers
        assert offloaded.resident is None


def test_a_block_that_runs_twice_in_a_row_is_copied_once(device):
    model = make_model(n_blocks=2, visits=3)
    with BlockOffload(model.blocks, "cpu") as offloaded, torch.no_grad():
        before = device.copies
        model(make_states())
        assert device.copies - before == sum(len(list(block.parameters())) for block in model.blocks)
        assert offloaded.resident == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_the_same_and_can_train_afterwards(device, mode):
    model = make_model()
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu"):
        with mode():
            assert torch.equal(model(make_states()), expected[0])
        same(gradient(model, make_states()), expected)


def test_copies_made_in_inference_mode_can_be_saved_for_backward():
    weight = torch.ones(2)
    with torch.inference_mode():
        assert weight.to("meta").is_inference()
        assert not offload._copy(weight, torch.device("meta")).is_inference()


def test_the_checks_would_notice_a_missing_checkpoint(device, monkeypatch):
    # Were the blocks no checkpoints, autograd would go on with what was taken away.
    monkeypatch.setattr(offload, "checkpoint", lambda visit, *args, use_reentrant, **kwargs: visit(*args, **kwargs))
    model = make_model()
    with BlockOffload(model.blocks, "cpu"):
        assert gradient(model, make_states())[1].isnan().any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_the_models_own_may_be_around_it(device, reentrant):
    model = make_model()
    expected = gradient(model, make_states())

    def run(states):
        shift = states.mean(dim=-1, keepdim=True)
        states = model.first(states)
        for block in model.blocks:
            states = checkpoint(block, states, shift, use_reentrant=reentrant)
        return states

    with BlockOffload(model.blocks, "cpu"):
        for _ in range(2):
            states = make_states()
            result = run(states)
            result.square().sum().backward()
            same((result, states.grad), expected)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert device.peak == buffers + weight_bytes(model.blocks[0])


def test_saved_tensors_may_be_packed_by_others(device):
    model = make_model()
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu"), torch.autograd.graph.save_on_cpu():
        same(gradient(model, make_states()), expected)


def test_a_graph_may_be_used_twice(device):
    model = make_model()
    states = make_states()
    expected = gradient(model, states)[1]
    with BlockOffload(model.blocks, "cpu"):
        loss = model(states).square().sum()
        for _ in range(2):
            (found,) = torch.autograd.grad(loss, states, retain_graph=True)
            assert torch.equal(found, expected)


def test_random_numbers_are_drawn_again_as_they_were(device):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(3))
    model = nn.Sequential(*blocks).requires_grad_(False)
    torch.manual_seed(5)
    expected = gradient(model, make_states())
    with BlockOffload(blocks, "cpu"):
        torch.manual_seed(5)
        same(gradient(model, make_states()), expected)


def test_everything_is_as_it_was_after_detaching():
    model = make_model()

    def facts():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        hooks = [(block._forward_hooks, block._forward_pre_hooks, vars(block).get("forward")) for block in model.blocks]
        return [(name, id(tensor), tensor.data_ptr()) for name, tensor in tensors], [str(hook) for hook in hooks]

    before = facts()
    expected = gradient(model, make_states())
    offloaded = BlockOffload(model.blocks, "cpu", model=model)
    for _ in range(2):
        with offloaded:
            assert facts() != before
            gradient(model, make_states())
        assert facts() == before
        assert offloaded.resident is None
    same(gradient(model, make_states()), expected)


def test_what_a_forward_pass_writes_into_buffers_stays(monkeypatch):
    followed = Device()
    monkeypatch.setattr(offload, "_copy", followed.copy)
    model = make_model()
    with BlockOffload(model.blocks, "cpu"), torch.no_grad():
        model(make_states())
        model(make_states())
    assert [float(block.calls) for block in model.blocks] == [2.0, 2.0, 2.0]


def test_the_rest_of_the_model_goes_to_the_device_on_request(device):
    model = make_model()
    home = model.first.weight.data_ptr()
    with BlockOffload(model.blocks, "cpu", model=model):
        assert model.first.weight.data_ptr() != home
        gradient(model, make_states())
        rest = weight_bytes(model.first) + sum(buffer.nbytes for buffer in model.buffers())
        assert device.peak == rest + weight_bytes(model.blocks[0])
    assert model.first.weight.data_ptr() == home


def test_weights_may_be_shared_between_blocks(device):
    model = make_model()
    model.blocks[2].linear = model.blocks[0].linear
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu"):
        same(gradient(model, make_states()), expected)


def test_an_error_in_a_block_leaves_it_usable(device):
    model = make_model()
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu") as offloaded:
        with pytest.raises(RuntimeError):
            model.blocks[1](torch.zeros(2, WIDTH + 1))
        assert offloaded.resident == 1
        same(gradient(model, make_states()), expected)


def test_a_full_device_leaves_no_half_of_a_block_there(device, monkeypatch):
    model = make_model()
    expected = gradient(model, make_states())
    with BlockOffload(model.blocks, "cpu") as offloaded:
        buffers, left = device.now, 3

        def fail(tensor, where):
            nonlocal left
            left -= 1
            if left == 0:
                raise torch.OutOfMemoryError("full")
            return device.copy(tensor, where)

        with monkeypatch.context() as patch:
            patch.setattr(offload, "_copy", fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(make_states())
        assert offloaded.resident is None
        assert device.now == buffers
        same(gradient(model, make_states()), expected)


def test_attaching_to_a_full_device_changes_nothing(device, monkeypatch):
    model = make_model()
    monkeypatch.setattr(offload, "_copy", lambda tensor, where: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    first = model.first.weight.data_ptr()
    with pytest.raises(torch.OutOfMemoryError):
        BlockOffload(model.blocks, "cpu", model=model).attach()
    assert model.first.weight.data_ptr() == first
    assert not any("forward" in vars(block) for block in model.blocks)


def test_detaching_before_the_backward_pass_is_an_error(device):
    model, states = make_model(), make_states()
    with BlockOffload(model.blocks, "cpu"):
        loss = model(states).sum()
    with pytest.raises(InputError, match="block 2 was detached before the backward pass"):
        loss.backward()


def test_trainable_weights_are_refused():
    model = make_model()
    model.blocks[1].gain.requires_grad_(True)
    with pytest.raises(InputError, match=r"gain of block 1 is trainable.*requires_grad_\(False\)"):
        BlockOffload(model.blocks, "cpu")
    model = make_model()
    model.first.bias.requires_grad_(True)
    with pytest.raises(InputError, match=r"first\.bias is trainable"):
        BlockOffload(model.blocks, "cpu", model=model)


def test_weights_shared_with_the_rest_are_refused():
    model = make_model()
    model.first.weight = model.blocks[1].linear.weight
    with pytest.raises(InputError, match=r"first\.weight is also linear\.weight of block 1"):
        BlockOffload(model.blocks, "cpu", model=model)


def test_weights_that_are_no_plain_tensors_are_refused():
    class Packed(torch.Tensor):
        pass

    model = make_model()
    model.blocks[0].gain = nn.Parameter(torch.ones(WIDTH).as_subclass(Packed), requires_grad=False)
    with pytest.raises(InputError, match="gain of block 0 is a Packed"):
        BlockOffload(model.blocks, "cpu")


def test_blocks_must_be_there_and_apart():
    model = make_model()
    with pytest.raises(InputError, match="no block"):
        BlockOffload([], "cpu")
    with pytest.raises(InputError, match="block 1 holds block 0"):
        BlockOffload([model.blocks[0].linear, model.blocks[0]], "cpu")
    with pytest.raises(InputError, match="block 0 holds block 1"):
        BlockOffload([model.blocks[0], model.blocks[0]], "cpu")


def test_attaching_twice_is_refused():
    model = make_model()
    with BlockOffload(model.blocks, "cpu") as offloaded:
        with pytest.raises(InputError, match=r"block 0 \(Block\) has a forward that something else put there"):
            offloaded.attach()
        with pytest.raises(InputError, match=r"block 0 \(Block\) has a forward"):
            BlockOffload(model.blocks, "cpu").attach()
        gradient(model, make_states())


def test_a_forward_replaced_since_is_not_thrown_away():
    model = make_model()
    offloaded = BlockOffload(model.blocks, "cpu")
    offloaded.attach()
    model.blocks[1].forward = mine = lambda states, shift=None: states
    with pytest.raises(InputError, match=r"block 1 \(Block\) has a forward that something else put there since"):
        offloaded.detach()
    assert vars(model.blocks[1])["forward"] is mine
    del model.blocks[1].forward
    offloaded.detach()
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("own", ["none", "diffusers", "reentrant"])
def test_stable_diffusion_3_learns_the_same(device, own):
    pytest.importorskip("diffusers")
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).requires_grad_(False)
    latents, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    words = torch.randn(2, 5, 16)

    def run():
        states = words.clone().requires_grad_()
        found = model(latents, states, pooled, torch.tensor([3, 700]), return_dict=False)[0]
        found.square().mean().backward()
        return found.detach(), states.grad

    expected = run()
    assert expected[1].abs().sum() > 0
    if own == "diffusers":
        model.enable_gradient_checkpointing()
    elif own == "reentrant":
        model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=True))
    with BlockOffload(model.transformer_blocks, "cpu"):
        for _ in range(2):
            same(run(), expected)
        assert device.peak == max(map(weight_bytes, model.transformer_blocks))
    assert run()[1].isnan().all()  # the stand-in for host memory holds nothing else


@pytest.mark.gpu
def test_a_gpu_holds_one_block_and_the_gradients_agree():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(1024, 4096), nn.Linear(4096, 1024)

        def forward(self, states):
            return states + self.down(torch.tanh(self.up(states)))

    device = torch.device("cuda")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), *(Wide() for _ in range(8))).requires_grad_(False)
    blocks = list(model)[1:]
    states = torch.randn(16, 1024, device=device).requires_grad_()
    first = model[0].weight
    with BlockOffload(blocks, device, model=model) as offloaded:
        gradient(model, states)  # what the libraries keep for themselves is counted before
        offloaded.evict()
        assert blocks[0].up.weight.is_pinned()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result, found = gradient(model, states)
        peak = torch.cuda.max_memory_allocated() - before
        assert offloaded.resident == 0
        assert first.device.type == "cuda"
    assert first.device.type == "cpu"
    assert weight_bytes(blocks[0]) <= peak < 1.5 * weight_bytes(blocks[0])
    assert all(weight.device.type == "cpu" for weight in model.parameters())
    same((result, found), gradient(model.to(device), states))
