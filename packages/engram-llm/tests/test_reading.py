"""Where each position's earlier tokens lie, against a walk in plain Python; and what masks say of positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_builders import KNOWN, make_ids
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from engram_core import InputError
from engram_llm.masks import read_layout
from engram_llm.reading import PAD, Neighbours, Positions, find_starts

law = settings(deadline=None, max_examples=60)


def walk(ids, starts, at, back):
    """The place of the token `back` tokens before a place, or None; a document's first token has none before it."""
    for _ in range(back):
        if at < len(ids) and starts[at]:
            return None
        at -= 1
        while at >= 0 and ids[at] == PAD:
            at -= 1
        if at < 0:
            return None
    return at


@st.composite
def texts(draw):
    """Rows with padding anywhere and documents that begin anywhere, and how many positions are new."""
    total = draw(st.integers(1, 14))
    rows = draw(st.integers(1, 3))
    kinds = st.sampled_from([PAD, 0, 0, 0, 1])  # padding, a token, a token that begins a document
    drawn = [draw(st.lists(kinds, min_size=total, max_size=total)) for _ in range(rows)]
    ids = [[PAD if kind == PAD else 10 * row + at for at, kind in enumerate(kinds)] for row, kinds in enumerate(drawn)]
    starts = [[kind == 1 for kind in kinds] for kinds in drawn]
    return torch.tensor(ids), torch.tensor(starts), draw(st.integers(1, total)), draw(st.integers(1, 6))


@law
@given(texts())
def test_neighbours_are_those_of_a_walk(drawn):
    ids, starts, length, reach = drawn
    total = ids.shape[1]
    neighbours = Neighbours(Positions(ids=ids, starts=starts, plain=False), length, reach)
    vectors = torch.stack([ids, ids * 2], dim=-1).float()
    for back in range(1, reach + 1):
        found, wide = neighbours.before(ids, back, PAD), neighbours.before(vectors, back, 0)
        assert (found.shape, wide.shape) == ((len(ids), length), (len(ids), length, 2))
        for row in range(len(ids)):
            for place in range(total - length, total):
                if ids[row, place] == PAD:
                    continue
                at = walk(ids[row].tolist(), starts[row].tolist(), place, back)
                assert found[row, place - total + length] == (PAD if at is None else ids[row, at])
                assert wide[row, place - total + length].tolist() == (
                    [0, 0] if at is None else vectors[row, at].tolist()
                )
    for count in range(1, reach + 1):
        newest = neighbours.newest(ids, count, PAD)
        for row in range(len(ids)):
            expected = [walk(ids[row].tolist(), starts[row].tolist(), total, back) for back in range(count, 0, -1)]
            assert newest[row].tolist() == [PAD if at is None else ids[row, at] for at in expected]


@law
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_plain_text_needs_no_pointers(before, length, reach):
    ids = torch.arange(2 * (before + length)).reshape(2, -1)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    plain = Neighbours(Positions(ids=ids, starts=starts, plain=True), length, reach)
    careful = Neighbours(Positions(ids=ids, starts=starts, plain=False), length, reach)
    for back in range(1, reach + 1):
        assert torch.equal(plain.before(ids, back, PAD), careful.before(ids, back, PAD))
        assert torch.equal(plain.newest(ids, back, PAD), careful.newest(ids, back, PAD))


def test_positions_are_joined():
    one = Positions(ids=torch.tensor([[1, 2]]), starts=torch.tensor([[False, True]]), plain=True)
    other = Positions(ids=torch.tensor([[3]]), starts=torch.tensor([[False]]), plain=False)
    both = one.then(other)
    assert (both.ids.tolist(), both.starts.tolist(), both.plain) == ([[1, 2, 3]], [[False, True, False]], False)
    assert (len(one), len(both)) == (2, 3)
    assert one.then(one).plain


@pytest.mark.parametrize(
    ("positions", "valid", "gaps", "expected"),
    [
        ([0, 1, 2, 0, 1], [1, 1, 1, 1, 1], False, [3]),
        ([0, 1, 2, 2, 3], [1, 1, 1, 1, 1], False, [3]),
        ([0, 1, 2, 5, 6], [1, 1, 1, 1, 1], False, []),
        ([0, 1, 2, 5, 6], [1, 1, 1, 1, 1], True, [3]),
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False, []),
        ([9, 9, 0, 1, 0], [0, 0, 1, 1, 1], False, [4]),
        ([0, 1, 9, 2, 0], [1, 1, 0, 1, 1], False, [4]),
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1], True, []),
    ],
)
def test_a_document_begins_where_the_position_does_not_go_on(positions, valid, gaps, expected):
    found = find_starts(torch.tensor([valid], dtype=torch.bool), torch.tensor([positions]), gaps=gaps)
    assert found[0].nonzero().flatten().tolist() == expected


# Masks

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()


def layout(ids, mask=None, position_ids=None, cache=None):
    found = read_layout(ids, mask, position_ids, cache, KNOWN)
    return tuple(None if part is None else part.int().tolist() for part in (found.valid, found.starts))


def filled(length, cache=None):
    """A cache of one layer that holds some positions."""
    cache = cache or DynamicCache()
    cache.update(torch.zeros(2, 1, length, 2), torch.zeros(2, 1, length, 2), 0)
    return cache


def static():
    from transformers import Qwen3Config

    return StaticCache(config=Qwen3Config(num_hidden_layers=1), max_cache_len=12)


def test_without_mask_there_are_tokens_everywhere():
    assert layout(make_ids(2, 9)) == (None, None)
    assert layout(make_ids(2, 9), position_ids=torch.arange(4, 13)[None]) == (None, None)
    assert layout(make_ids(2, 9), torch.ones(2, 9)) == (None, None)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_a_flat_mask_says_where_tokens_are(kind):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert layout(make_ids(2, 4), mask.to(kind)) == (mask.tolist(), None)


@pytest.mark.parametrize("make", [lambda: filled(4), lambda: filled(4, static())])
def test_a_flat_mask_covers_the_cache_as_well(make):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert layout(make_ids(2, 2), mask, cache=make()) == ([[1, 1], [1, 0]], None)
    # Longer than what is read so far, as masks for static caches may be: places count from the left.
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=mask.dtype)], dim=1)
    assert layout(make_ids(2, 2), longer, cache=make()) == ([[1, 1], [1, 0]], None)


def test_a_flat_mask_that_is_too_short_is_refused():
    with pytest.raises(InputError, match="mask has length 2, expected 6: 4 positions in the cache and 2 new ones"):
        layout(make_ids(2, 2), torch.ones(2, 2), cache=filled(4))


@pytest.mark.parametrize("as_scores", [False, True])
def test_a_square_mask_says_where_tokens_are(as_scores):
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    mask = (CAUSAL & valid.bool()[:, None])[:, None]
    if as_scores:  # with a bias, which hides nothing
        mask = torch.where(mask, -3.5, torch.finfo(torch.float32).min)
    assert layout(make_ids(2, 9), mask)[0] == valid.tolist()


@pytest.mark.parametrize("window", [2, 3, 20])
def test_a_square_mask_with_a_window_is_plain(window):
    near = torch.arange(9)[:, None] - torch.arange(9) < window
    assert layout(make_ids(2, 9), (CAUSAL & near)[None, None]) == (None, None)


def test_a_square_mask_covers_what_a_sliding_cache_still_holds():
    layer = DynamicSlidingWindowLayer(7)
    cache = DynamicCache()
    cache.layers.append(layer)
    filled(10, cache)
    # Six positions are left of ten; three are new, and the first of the second row is padding.
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool).tril(6)
    mask[1, :, :, :7] = False
    assert layout(make_ids(2, 3), mask, cache=cache)[0] == [[1, 1, 1], [0, 1, 1]]


def test_the_mask_that_hides_least_is_read():
    sliding, whole = torch.zeros(1, 1, 9, 9, dtype=torch.bool), CAUSAL[None, None]
    assert layout(make_ids(2, 9), {"sliding_attention": sliding, "full_attention": whole}) == (None, None)
    assert layout(make_ids(2, 9), {"chunked_attention": sliding, "full_attention": None}) == (None, None)
    assert layout(make_ids(2, 9), {"sliding_attention": whole}) == (None, None)
    assert layout(make_ids(2, 9), {}) == (None, None)


def test_documents_that_do_not_see_each_other_are_apart():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    mask = (CAUSAL & (documents[:, :, None] == documents[:, None]))[:, None]
    expected = torch.diff(documents, prepend=documents[:, :1]).clamp_max(1).tolist()
    assert layout(make_ids(2, 9), mask) == (None, expected)


def test_a_document_may_begin_with_a_chunk():
    documents = torch.tensor([0, 0, 0, 1, 1])
    mask = (CAUSAL[:5, :5] & (documents[:, None] == documents))[None, None]
    assert layout(make_ids(2, 2), mask[:, :, 3:], cache=filled(3))[1] == [[1, 0], [1, 0]]
    assert layout(make_ids(2, 2), CAUSAL[None, None, 3:5, :5], cache=filled(3)) == (None, None)


def test_texts_that_branch_are_refused():
    tree = CAUSAL.clone()
    tree[3, 2] = False  # two tokens after the second one
    with pytest.raises(InputError, match="hides from a token the one before it, but not all before"):
        layout(make_ids(1, 9), tree[None, None])


@pytest.mark.parametrize("mask", ["x", torch.ones(2, 9, 9), torch.ones(9)])
def test_other_masks_are_refused(mask):
    with pytest.raises(InputError, match=rf"the attention mask is a {type(mask).__name__}, from which a memory cannot"):
        layout(make_ids(2, 9), mask)


@pytest.mark.parametrize("token", [-1, KNOWN, 10**6])
@pytest.mark.parametrize("length", [1, 5])
def test_unknown_token_ids_are_refused(token, length):
    ids = make_ids(2, length)
    ids[1, -1] = token
    with pytest.raises(InputError, match=rf"token ids reach from .*; the memory's vocabulary has 0 to {KNOWN - 1}"):
        layout(ids)
    with pytest.raises(InputError, match=rf"{token}"):
        layout(ids, torch.ones(2, length))
