"""A stream with sites holds a residual for each of them, and every law holds site by site."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from core_builders import (
    OVERLAPS,
    RULES,
    WIDTHS,
    adapters,
    apart,
    bits,
    law,
    make_adapter,
    make_concept,
    make_manifest,
    make_spec,
    only_site,
    prompts,
    stored,
    vectors,
    with_sites,
)
from core_hostile import SITES, Pieces, several, sited
from core_refusals import OPENING, expect_refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_core import (
    Adapter,
    AdapterFormatError,
    Concept,
    ConceptRecord,
    ConceptStream,
    IncompatibleAdaptersError,
    InputError,
    Manifest,
    Matcher,
    Residual,
    extract_concepts,
    extract_file,
    find_conflicts,
    merge_adapters,
    merge_files,
    open_adapter,
)

ONE_STREAM = {"clip_l": 3}
few = settings(law, max_examples=25)


def edited(adapter, stream, rows, hidden, **options):
    return Residual(adapter, stream).apply(hidden, Matcher(adapter, stream).match(rows), **options)


def replace_sites(adapter, sites):
    """The adapter's stream `clip_l` with sites, or as it is."""
    return with_sites(adapter, {"clip_l": sites})


# Each site is an adapter of its own


@pytest.mark.parametrize("rule", RULES)
@few
@given(data=st.data(), rows=prompts(), strength=st.sampled_from([1.0, 0.3, -2.0]))
def test_a_site_is_edited_as_by_an_adapter_that_holds_it_alone(rule, data, rows, strength):
    adapter = data.draw(adapters(widths=ONE_STREAM, rules=[rule], sites=SITES), label="adapter")
    hidden = data.draw(vectors((len(rows), 1 + max(1, *map(len, rows)), 3)), label="hidden")
    hidden = hidden.astype(data.draw(st.sampled_from(["f4", "f2"]), label="states"))
    lengths = data.draw(
        st.none() | st.lists(st.integers(1, hidden.shape[1]), min_size=len(rows), max_size=len(rows)), label="lengths"
    )
    for number, site in enumerate(SITES):
        expected = edited(only_site(adapter, number), "clip_l", rows, hidden, strength=strength, lengths=lengths)
        found = edited(adapter, "clip_l", rows, hidden, strength=strength, lengths=lengths, site=site)
        assert bits(found) == bits(expected)
        assert (found is hidden) == (expected is hidden)


@few
@given(data=st.data(), rows=prompts())
def test_rules_mix_at_every_site(data, rows):
    adapter = data.draw(adapters(widths=ONE_STREAM, sites=SITES), label="adapter")
    hidden = data.draw(vectors((len(rows), 12, 3)), label="hidden")
    for number, site in enumerate(SITES):
        expected = edited(only_site(adapter, number), "clip_l", rows, hidden)
        assert bits(edited(adapter, "clip_l", rows, hidden, site=site)) == bits(expected)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_at_a_width_where_sums_are_done_in_parts(rule, overlap, dtype):
    width, sites = 300, tuple(f"block.{number}" for number in range(5))
    noise = np.random.default_rng(0)
    entries = [(1, 2), (2, 3), (1, 2, 3)]
    stream = ConceptStream(
        triggers=((1, 2, 3),),
        entries=tuple(entries),
        vectors=noise.normal(size=(3, 5, width)).astype(np.float32),
        scales=noise.normal(size=(5, width)).astype(np.float32),
    )
    record = ConceptRecord(name="cat", trigger="the cat", rule=rule, overlap=overlap, dtype=dtype)
    manifest = make_manifest({"clip_l": width}, sites)
    adapter = make_adapter(Concept(record=record, streams={"clip_l": stream}), manifest=manifest)
    rows = [[0, 1, 2, 3, 1, 2, 3]]
    hidden = noise.normal(size=(1, 7, width)).astype(np.float32)
    for number, site in enumerate(sites):
        expected = edited(only_site(adapter, number), "clip_l", rows, hidden)
        assert bits(edited(adapter, "clip_l", rows, hidden, site=site)) == bits(expected)


def test_one_named_site_is_not_no_site():
    plain = make_adapter(make_concept("cat", (1, 2, 3)), label="plain.safetensors")
    named = replace_sites(plain, ("mid_block",))
    assert named.to_bytes() != plain.to_bytes()
    assert named.streams["clip_l"].vectors.shape == (3, 1, 3)
    assert named.streams["clip_l"].scales.shape == (1, 1, 3)
    assert bits(named.streams["clip_l"].vectors) == bits(plain.streams["clip_l"].vectors)
    hidden = np.ones((1, 4, 3), np.float32)
    expected = edited(plain, "clip_l", [[0, 1, 2, 3]], hidden)
    assert bits(edited(named, "clip_l", [[0, 1, 2, 3]], hidden, site="mid_block")) == bits(expected)
    with pytest.raises(IncompatibleAdaptersError, match=r"clip_l\.sites is 'text' in the first and '1 block"):
        merge_adapters([plain, named])


def test_files_without_sites_do_not_mention_them():
    manifest = make_manifest()
    assert "sites" not in manifest.to_json()["streams"]["t5"]
    assert Manifest.from_json(manifest.to_json()).streams["t5"].sites is None
    assert b"sites" not in several().to_bytes()


# Round trips


@few
@given(adapter=adapters(sites=SITES))
def test_what_is_built_is_what_is_read(adapter):
    again = Adapter.from_bytes(adapter.to_bytes())
    assert again.manifest == adapter.manifest
    assert {spec.sites for spec in again.manifest.streams.values()} == {SITES}
    again.check()
    for name, table in again.streams.items():
        assert table.vectors.shape[1:] == table.scales.shape[1:] == (3, WIDTHS[name])
    assert [stored(concept) for concept in again.concepts()] == [stored(concept) for concept in adapter.concepts()]
    assert Adapter.build(again.manifest, again.concepts()).to_bytes() == adapter.to_bytes()


def test_a_file_holds_the_same(tmp_path):
    adapter = sited()
    adapter.save(tmp_path / "a.safetensors")
    opened = open_adapter(tmp_path / "a.safetensors")
    opened.check()
    assert opened.to_bytes() == adapter.to_bytes()
    assert (opened.manifest.streams["clip_l"].sites, opened.manifest.streams["t5"].sites) == (None, SITES)
    assert Manifest.from_json(opened.manifest.to_json()) == adapter.manifest
    assert opened.concept("ant").digest() == adapter.concept("ant").digest()


def test_the_order_of_sites_is_kept():
    names = ("up", "down", "mid")
    assert Manifest.from_json(make_manifest(sites=names).to_json()).streams["t5"].sites == names


# Merging


@few
@given(data=st.data(), parts=apart(3, sites=SITES), stream=st.sampled_from(sorted(WIDTHS)))
def test_a_merge_never_changes_what_a_concept_does_at_any_site(data, parts, stream):
    a, b, c = parts
    if stream not in a.streams:
        return
    triggers = [ids for one in a.concepts() if stream in one.streams for ids in one.streams[stream].triggers]
    rows = [sum(data.draw(st.lists(st.sampled_from(triggers), max_size=3)), ())]
    hidden = data.draw(vectors((1, 1 + len(rows[0]), WIDTHS[stream])))
    for merge in (merge_adapters([a, b]), merge_adapters([b, a]), merge_adapters([merge_adapters([a, c]), b])):
        for site in SITES:
            alone, found = (edited(one, stream, rows, hidden, site=site) for one in (a, merge))
            assert bits(found) == bits(alone)
            assert (found is hidden) == (alone is hidden)


@few
@given(apart(3, sites=SITES))
def test_the_laws_of_merging_hold(parts):
    a, b, c = parts
    whole = merge_adapters([a, b, c])
    whole.check()
    for order in ([c, b, a], [merge_adapters([a, b]), c], [a, merge_adapters([c, b])]):
        assert merge_adapters(order).to_bytes() == whole.to_bytes()
    assert merge_adapters([whole, whole, b]).to_bytes() == whole.to_bytes()
    assert merge_adapters([a]).to_bytes() == a.to_bytes()
    for part in parts:
        assert extract_concepts(whole, part.names()).to_bytes() == part.to_bytes()


@few
@given(apart(2, sites=SITES))
def test_files_merge_to_the_same_bytes_and_come_apart_again(parts):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.safetensors") for number in range(2)]
        for path, part in zip(paths, parts, strict=True):
            part.save(path)
        merged = Path(folder, "merged.safetensors")
        merge_files(paths, merged)
        assert merged.read_bytes() == merge_adapters(parts).to_bytes()
        for number, part in enumerate(parts):
            target = Path(folder, f"extracted{number}.safetensors")
            extract_file(merged, part.names(), target)
            assert target.read_bytes() == paths[number].read_bytes()


@pytest.mark.parametrize("one", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("other", ["f32", "f16", "bf16"])
def test_vectors_of_different_types_live_together_and_come_apart(one, other):
    a = replace_sites(make_adapter(make_concept("ant", (1, 2), dtype=one)), SITES)
    b = replace_sites(make_adapter(make_concept("bee", (3, 4), dtype=other, seed=2)), SITES)
    merge = merge_adapters([a, b])
    merge.check()
    assert merge.streams["clip_l"].dtype == (one if one == other else "f32")
    assert merge_adapters([b, a]).to_bytes() == merge.to_bytes()
    assert extract_concepts(merge, ["ant"]).to_bytes() == a.to_bytes()
    assert extract_concepts(merge, ["bee"]).to_bytes() == b.to_bytes()


def test_a_stream_that_only_one_side_has_may_have_sites():
    a = make_adapter(make_concept("ant", (1, 2), streams=("clip_l",)))
    b = with_sites(make_adapter(make_concept("bee", (3, 4), streams=("t5",))), {"t5": SITES})
    merge = merge_adapters([a, b])
    merge.check()
    assert {name: spec.sites for name, spec in merge.manifest.streams.items()} == {"clip_l": None, "t5": SITES}
    assert merge.streams["t5"].scales.shape == (2, 3, 5)
    assert not merge.streams["t5"].scales[0].any()
    assert extract_concepts(merge, ["ant"]).to_bytes() == a.to_bytes()
    assert extract_concepts(merge, ["bee"]).to_bytes() == b.to_bytes()


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (None, SITES, "'text' in the first and '3 blocks' in the second"),
        (SITES, None, "'3 blocks' in the first and 'text' in the second"),
        (SITES, SITES[:2], "'3 blocks' in the first and '2 blocks' in the second"),
        (SITES, (*SITES[:2], "up_blocks.2"), "'up_blocks.1' in the first and 'up_blocks.2' in the second"),
        (SITES, SITES[::-1], "'down_blocks.0' in the first and 'up_blocks.1' in the second"),
    ],
)
def test_other_sites_do_not_merge(tmp_path, one, other, said):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, name, sites in zip(paths, ("ant", "bee"), (one, other), strict=True):
        replace_sites(make_adapter(make_concept(name, (ord(name[0]), 2))), sites).save(path)
    opened = [open_adapter(path) for path in paths]
    for refused in (
        lambda: merge_adapters(opened),
        lambda: merge_adapters(opened, on_conflict="both"),
        lambda: find_conflicts(opened),
        lambda: merge_files(paths, tmp_path / "merged"),
    ):
        with pytest.raises(IncompatibleAdaptersError) as caught:
            refused()
        assert str(caught.value) == f"{paths[0]} and {paths[1]} do not merge: clip_l.sites is {said}"
    assert not (tmp_path / "merged").exists()


# Files that break a rule


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


def with_names(stream, sites):
    pieces = Pieces.of(sited())
    manifest = pieces.manifest
    manifest["streams"][stream]["sites"] = sites
    pieces.manifest = manifest
    return pieces.pack()


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([], ("streams.t5.sites is '0 names', expected 1..1024 names",)),
        ([f"block.{number}" for number in range(1025)], ("streams.t5.sites is '1025 names', expected 1..1024 names",)),
        (["a", "b", "a"], ("streams.t5.sites is ['a', 'b', 'a'], expected each name once",)),
        (["a", "B", "c"], ("streams.t5.sites is 'B', expected names in lower case, with dots",)),
        (["a", "0", "c"], ("streams.t5.sites is '0'",)),
        (["a", ".b", "c"], ("streams.t5.sites is '.b'",)),
        (["a", "b c", "d"], ("streams.t5.sites is 'b c'",)),
        (["a", "b\n", "c"], (r"streams.t5.sites is 'b\n'",)),
        (["a", "\x1b[31m", "c"], (r"streams.t5.sites is '\x1b[31m'",)),
        (["a", "", "c"], ("streams.t5.sites is ''",)),
        (["a", "x" * 129, "c"], ("streams.t5.sites is 'xxx",)),
        (["a", None, "c"], ("streams.t5.sites is None",)),
        ([0, 1, 2], ("streams.t5.sites is 0",)),
        ([["a"], ["b"], ["c"]], ("streams.t5.sites is ['a']",)),
        ([{"a": 1}], ("streams.t5.sites is {'a': 1}",)),
        ("abc", ("streams.t5.sites has the type str",)),
        ({"a": 1}, ("streams.t5.sites has the type dict",)),
        (None, ("streams.t5.sites has the type NoneType",)),
        (3, ("streams.t5.sites has the type int",)),
        (True, ("streams.t5.sites has the type bool",)),
        (list(SITES[:2]), ("t5.vectors: has shape [20, 3, 5], expected 2 (S) on axis 1",)),
        ([*SITES, "more"], ("t5.vectors: has shape [20, 3, 5], expected 4 (S) on axis 1",)),
    ],
)
def test_names_that_are_wrong(path, sites, words):
    expect_refusal(path, with_names("t5", sites), OPENING, words)


def test_as_many_sites_as_there_may_be():
    sites = tuple(f"x.{number}" for number in range(1024))
    adapter = replace_sites(make_adapter(make_concept("cat", (1, 2))), sites)
    assert Adapter.from_bytes(adapter.to_bytes()).manifest.streams["clip_l"].sites == sites
    longest = replace_sites(make_adapter(make_concept("cat", (1, 2))), ("a" * 128,))
    assert longest.manifest.streams["clip_l"].sites == ("a" * 128,)


@pytest.mark.parametrize("name", ["t5.vectors", "t5.scales"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda array: array[:, 0], ("with 3 axes", ", 5], expected")),
        (lambda array: array[..., None], ("with 3 axes", ", 3, 5, 1], expected")),
        (lambda array: array.reshape(len(array), 15), ("with 3 axes", ", 15], expected")),
        (lambda array: array[:, :2], (", 2, 5], expected 3 (S) on axis 1",)),
        (lambda array: array[:, [0, 1, 2, 2]], (", 4, 5], expected 3 (S) on axis 1",)),
        (lambda array: array[:, :0], (", 0, 5], expected 3 (S) on axis 1",)),
        (lambda array: array.swapaxes(1, 2), (", 5, 3], expected 3 (S) on axis 1",)),
        (lambda array: array[..., :4], (", 3, 4], expected 5 (d) on axis 2",)),
    ],
)
def test_a_tensor_of_another_shape(path, name, change, words):
    pieces = Pieces.of(sited())
    pieces.put(name, change(pieces.array(name)))
    expect_refusal(path, pieces.pack(), OPENING, (f"{name}: ", *words))


def test_sites_without_their_axis(path):
    words = "clip_l.vectors: is F32 [", "expected F32 or F16 or BF16 with 3 axes"
    expect_refusal(path, with_names("clip_l", list(SITES)), OPENING, words)


def test_an_axis_without_its_sites(path):
    pieces = Pieces.of(sited())
    manifest = pieces.manifest
    del manifest["streams"]["t5"]["sites"]
    pieces.manifest = manifest
    expect_refusal(path, pieces.pack(), OPENING, ("t5.vectors: is F32 [20, 3, 5]", "with 2 axes"))


@pytest.mark.parametrize(
    ("name", "index", "value", "said"),
    [
        ("t5.vectors", (0, 2, 1), np.nan, "t5.vectors: holds NaN"),
        ("t5.vectors", (-1, 1, 4), np.inf, "t5.vectors: holds NaN"),
        ("t5.scales", (0, 2, 4), -np.inf, "t5.scales: holds NaN"),
        ("t5.scales", (3, 1, 0), 1.0, "t5.scales: not zero for a concept without entries"),
        ("t5.scales", (3, 2, 4), -0.0, "t5.scales: not zero for a concept without entries"),
        ("t5.vectors", (5, 1, 0), 0.1, "t5.vectors of concept 1: holds values that are not f16"),
    ],
)
def test_every_site_is_checked(name, index, value, said):
    pieces = Pieces.of(sited())
    pieces.set(name, index, value)
    adapter = Adapter.from_bytes(pieces.pack(), "bad.safetensors")
    for refused in (adapter.check, lambda: merge_adapters([adapter])):
        with pytest.raises(AdapterFormatError, match=rf"^bad\.safetensors: {said}"):
            refused()


# Calls that are wrong


@pytest.mark.parametrize("sites", ["down", ["down", "up"], (), ("a", "a"), ("A",), (1,)])
def test_a_manifest_refuses_what_are_no_names(sites):
    with pytest.raises(InputError, match=r"streams\.t5\.sites is"):
        make_manifest(streams={"t5": make_spec(5, sites)})


@pytest.mark.parametrize(
    ("shape", "scales", "said"),
    [
        ((3, 3), (3, 3), r"vectors have shape \(3, 3\), expected \(3, 3, 3\)"),
        ((3, 2, 3), (3, 3), r"vectors have shape \(3, 2, 3\)"),
        ((3, 3, 3), (3,), r"scales have shape \(3,\), expected \(3, 3\)"),
        ((3, 3, 3), (2, 3), r"scales have shape \(2, 3\)"),
    ],
)
def test_a_concept_must_have_all_sites(shape, scales, said):
    concept = make_concept("cat", (1, 2, 3), vectors=np.ones(shape), scales=np.ones(scales))
    with pytest.raises(InputError, match=f"concept 'cat', stream 'clip_l': {said}"):
        make_adapter(concept, manifest=make_manifest(ONE_STREAM, SITES))


def test_a_site_must_be_one_of_the_streams():
    plain = make_adapter(make_concept("cat", (1, 2)), label="plain")
    named = replace_sites(plain, SITES)
    hidden, rows = np.ones((1, 2, 3), np.float32), [[1, 2]]
    for adapter, site, said in (
        (named, None, r"^plain: site is None, the stream's sites are down_blocks\.0, mid_block, up_blocks\.1$"),
        (named, "mid", r"^plain: site is 'mid', the stream's sites are down_blocks\.0, mid_block"),
        (named, "", "^plain: site is ''"),
        (plain, "mid_block", "^plain: site is 'mid_block', the stream's sites are none$"),
        (plain, "", "^plain: site is '', the stream's sites are none$"),
    ):
        for ids in (rows, [[5, 6]]):  # whether anything fires or not
            with pytest.raises(InputError, match=said):
                edited(adapter, "clip_l", ids, hidden, site=site)


def test_states_have_the_width_of_the_stream_at_every_site():
    adapter = replace_sites(make_adapter(make_concept("cat", (1, 2))), SITES)
    with pytest.raises(InputError, match=r"states have shape \[1, 3, 9\], expected \[B, L, 3\]"):
        edited(adapter, "clip_l", [[1, 2]], np.ones((1, 3, 9), np.float32), site="mid_block")
