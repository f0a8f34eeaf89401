"""What a growing cache carries: whatever was read, cropped, chosen and repeated, the newest tokens are at hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_llm import state
from engram_llm.reading import PAD, Neighbours, Positions

REACH, CHANNELS = 5, 2


class Reference:
    """Keeps all positions and looks for the newest tokens among all of them."""

    def __init__(self, rows):
        self.ids = torch.zeros(rows, 0, dtype=torch.int64)
        self.starts = torch.zeros(rows, 0, dtype=torch.bool)
        self.inputs = torch.zeros(rows, 0, CHANNELS)

    def change(self, change):
        self.ids, self.starts, self.inputs = change(self.ids), change(self.starts), change(self.inputs)

    def newest(self):
        positions = Positions(ids=self.ids, starts=self.starts, plain=False)
        neighbours = Neighbours(positions, 0, REACH)
        return neighbours.newest(self.ids, REACH, PAD), neighbours.newest(self.inputs, REACH, 0)


def read(history, ids, starts, inputs):
    """Let a history go on, as the hooks do."""
    plain = bool((ids != PAD).all()) and not bool(starts.any())
    whole = history.positions().then(Positions(ids=ids, starts=starts, plain=plain))
    neighbours = Neighbours(whole, ids.shape[1], REACH)
    history.advance(whole, torch.cat((history.inputs(), inputs), dim=1), neighbours, ids.shape[1])


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_newest_tokens_are_those_of_everything_read(data):
    rows = data.draw(st.integers(1, 3), "rows")
    holes = data.draw(st.sampled_from([0.0, 0.0, 0.3]), "holes")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    history = state.GrowingHistory(torch.zeros(rows, 0, CHANNELS), REACH)
    reference = Reference(rows)
    for action in data.draw(
        st.lists(st.sampled_from(["read", "read", "step", "crop", "select", "repeat"]), max_size=9)
    ):
        count, total = len(reference.ids), reference.ids.shape[1]
        if action in ("read", "step"):
            length = 1 if action == "step" else data.draw(st.integers(1, 90), "length")
            ids = torch.randint(1, 50, (count, length), generator=generator)
            ids = torch.where(torch.rand(ids.shape, generator=generator) < holes, PAD, ids)
            starts = (torch.rand(ids.shape, generator=generator) < holes / 5) & (ids != PAD)
            inputs = torch.rand(count, length, CHANNELS, generator=generator)
            read(history, ids, starts, inputs)
            new = iter((ids, starts, inputs))
            reference.change(lambda values, new=new: torch.cat((values, next(new)), dim=1))
        elif action == "crop":
            dropped = data.draw(st.integers(0, total), "dropped")
            history.crop(dropped)
            reference.change(lambda values, kept=total - dropped: values[:, :kept])
        elif action == "select":
            chosen = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3), "rows"))
            history.select(chosen)
            reference.change(lambda values, chosen=chosen: values[chosen])
        elif count < 8:
            history.repeat(2)
            reference.change(lambda values: values.repeat_interleave(2, dim=0))
        ids, inputs = reference.newest()
        assert history.length() == reference.ids.shape[1]
        assert torch.equal(history.positions().ids, ids)
        known = (ids != PAD).unsqueeze(-1)
        assert torch.equal(history.inputs() * known, inputs * known)
        assert not (history.inputs() * ~known).any()


@pytest.mark.parametrize("dropped", [1, 40, 100, 199])
def test_a_long_text_can_be_cropped_to_any_length(dropped):
    history = state.GrowingHistory(torch.zeros(1, 0, CHANNELS), REACH)
    ids = torch.arange(1, 201).unsqueeze(0)
    inputs = ids.unsqueeze(-1).float().expand(-1, -1, CHANNELS)
    for first, stop in ((0, 150), (150, 160), *((place, place + 1) for place in range(160, 200))):
        starts = torch.zeros(1, stop - first, dtype=torch.bool)
        read(history, ids[:, first:stop], starts, inputs[:, first:stop])
    history.crop(dropped)
    kept = 200 - dropped
    expected = [0] * max(0, REACH - kept) + list(range(max(1, kept - REACH + 1), kept + 1))
    assert history.inputs()[0, :, 0].tolist() == expected
    assert history.length() == kept
