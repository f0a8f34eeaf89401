"""Model cards: what they say, and that no text of a file breaks out of its place."""

import ast
import shlex

import pytest
from core_builders import law, make_adapter, make_concept, make_manifest, with_sites
from hypothesis import example, given
from hypothesis import strategies as st

from engram_core.card import CARD_MARK, is_repo_id, render_card
from engram_core.manifest import is_printable_name

REPO = "someone/a_thing"

HOSTILE = [
    "a | b | c",
    "`code` ``more`` ```",
    "``` ~~~ # --- ===",
    "<script>alert(1)</script> <!-- x --> </code></td>",
    "[link](javascript:x) ![i](y) <http://z> &amp; &#124;",
    "*one* _two_ __three__ ~~four~~ $x^2$ \\| \\",
    "'; rm -rf / ; $(x) \"\"\" '''",
    "--- : # yaml: {a: [b]} %TAG !!python",
    "日本 🙂 é  two  spaces",
]
signs = st.sampled_from([*"|`<>[]()*_#&;:\"'\\!~$^{}%@=+-. ax9é", "日", "🙂", "---", "```", "</code>", "&#124;"])
texts = st.lists(signs, max_size=12).map("".join)
names = texts.filter(is_printable_name)
any_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    texts,
    st.lists(st.sampled_from([*"\n\r\t\v\x00\x1b\x85|-#`"]), max_size=8).map("".join),
)


def card_of(*concepts, backbone="sd15", base_model="owner/base", **options):
    manifest = make_manifest(backbone=backbone, base_model=base_model)
    return render_card(make_adapter(*concepts, manifest=manifest), repo_id=REPO, **options)


def ant(**record):
    return make_concept("ant", (1, 2, 3), **record)


def front_of(card):
    yaml = pytest.importorskip("yaml")
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front)


def blocks_of(card):
    """The fenced code of a card by its language."""
    found = {}
    parts = card.split("\n```")
    for part in parts[1::2]:
        language, _, code = part.partition("\n")
        found[language] = code
    return found


def test_it_holds_what_a_user_needs():
    concept = ant(trigger="Zorbit Quell", license="CC0-1.0", training={"steps": 300, "init": None})
    adapter = make_adapter(concept, manifest=make_manifest(backbone="sd35", base_model="owner/base"))
    card = render_card(adapter, repo_id=REPO, preview="preview.png", description="A small *robot*.")
    for part in (
        "# a_thing\n",
        CARD_MARK,
        "A small *robot*.",
        "![Preview](preview.png)",
        "| ant | <code>Zorbit Quell</code> | absolute | anchored | 3 |",
        "| clip_l | 3 | last_hidden_state | ToyTokenizer | 1,000 |",
        "[owner/base](https://huggingface.co/owner/base)",
        "cd" * 32,
        "| init | null |\n| steps | 300 |",
        "Stated in the file: CC0-1.0\n",
        f"`{adapter.identity()}`",
        f"{adapter.nbytes():,} bytes",
    ):
        assert part in card
    assert front_of(card) == {
        "license": "cc0-1.0",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "engram",
        "pipeline_tag": "text-to-image",
        "instance_prompt": "Zorbit Quell",
        "tags": ["engram", "concept-table", "sd35", "text-to-image"],
    }


@pytest.mark.parametrize(
    ("backbone", "pipeline"),
    [
        ("sd15", "StableDiffusionPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
        ("sd35", "StableDiffusion3Pipeline"),
    ],
)
def test_it_shows_how_to_load(backbone, pipeline):
    blocks = blocks_of(card_of(ant(trigger="Zorbit Quell"), backbone=backbone))
    assert f"from diffusers import {pipeline}\n" in blocks["python"]
    assert f'{pipeline}.from_pretrained("owner/base")' in blocks["python"]
    assert f'load_engram(pipeline, "{REPO}")' in blocks["python"]
    ast.parse(blocks["python"])
    words = ["engram", "generate", "--backbone", backbone, "--adapter", REPO, "--prompt", "Zorbit Quell"]
    assert shlex.split(blocks["sh"]) == words


def test_an_unknown_backbone_gets_the_command_line_alone():
    card = card_of(ant(), backbone="other")
    assert list(blocks_of(card)) == ["sh"]
    front = front_of(card)
    assert front["tags"] == ["engram", "concept-table", "other"]
    assert "pipeline_tag" not in front
    assert "instance_prompt" not in front


def test_blocks_with_residuals_of_their_own_are_counted():
    adapter = with_sites(make_adapter(ant()), {"clip_l": ("down", "mid", "up")})
    assert "| clip_l | 3 | last_hidden_state, 3 blocks | ToyTokenizer | 1,000 |" in render_card(adapter, repo_id=REPO)


@pytest.mark.parametrize("base", ["tiny", "./owner/base", "/data/models/base", "a b", "x/y/z", "folder/m.safetensors"])
def test_a_base_model_that_is_no_repository_is_named_and_not_linked(base):
    card = card_of(ant(), base_model=base)
    assert "base_model" not in front_of(card)
    assert "https://huggingface.co/" not in card
    assert f"trained on {base}," in card
    assert '.from_pretrained("path/to/the/base/model")' in card


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("CC BY-SA 4.0", {"license": "cc-by-sa-4.0"}),
        ("OpenRAIL++", {"license": "openrail++"}),
        ("My own, 1.0", {"license": "other", "license_name": "my-own-1.0"}),
        ("日本", {"license": "other", "license_name": "custom"}),
    ],
)
def test_a_licence_is_spelled_as_the_hub_does(licence, fields):
    for card in (card_of(ant(), license=licence), card_of(ant(license=licence))):
        front = front_of(card)
        assert {name: front[name] for name in front if name.startswith("license")} == fields
        assert licence in card


def test_without_a_licence_the_card_says_so():
    for stated in (None, "", " \n"):
        card = card_of(ant(license=stated))
        assert "license" not in front_of(card)
        assert "No licence was stated." in card


def test_different_licences_are_listed():
    bees = [make_concept(f"bee{n}", (4 + n, 5), license="CC0-1.0") for n in range(2)]
    card = card_of(ant(license="mit"), *bees)
    assert front_of(card)["license_name"] == "mixed"
    assert "- 2 concepts: CC0-1.0\n- 1 concept: mit\n" in card
    card = card_of(ant(), *bees)
    assert "license" not in front_of(card)  # it would claim something for the ant
    assert "- 1 concept: none stated\n" in card
    card = card_of(ant(license="mit"), *bees, license="gpl-3.0")
    assert front_of(card)["license"] == "gpl-3.0"
    assert "Stated by the publisher: gpl-3.0\n" in card
    assert "- 1 concept: mit\n" in card


def test_long_lists_are_cut_and_say_so():
    bees = [make_concept(f"bee{n:02}", (n, 99), training={"seed": n}) for n in range(52)]
    card = card_of(*bees)
    assert "| bee49 |" in card
    assert "| bee50 |" not in card
    assert "and 2 more; `engram inspect --limit 0` lists all." in card
    assert card.count("| seed |") == 5
    assert "`engram inspect --json` shows the settings of every concept." in card
    assert "instance_prompt" not in front_of(card)
    many = card_of(ant(training={f"s{n:03}": "x" * 500 for n in range(60)}))
    assert "and 20 more in the file." in many
    assert "x" * 200 not in many


def test_concepts_that_were_trained_alike_share_a_table():
    bees = [make_concept(f"bee{n}", (4 + n, 5), training={"steps": 7}) for n in range(7)]
    card = card_of(ant(training={"steps": 9}), *bees)
    assert "Settings of ant:\n\n| setting | value |\n| --- | --- |\n| steps | 9 |" in card
    assert (
        "Settings of bee0, bee1, bee2, bee3, bee4 and 2 more:\n\n| setting | value |\n| --- | --- |\n| steps | 7 |"
        in card
    )


def test_concepts_that_fire_on_spans_are_pointed_out():
    assert "`spans`" not in card_of(ant())
    assert "The concept fires with the activation `spans`" in card_of(ant(activation="spans"))
    assert "1 of 2 concepts fire" in card_of(ant(activation="spans"), make_concept("bee", (4, 5)))


def cards_with(name, trigger, licence, key, value, base):
    """The cards of an adapter with one such concept, and of one with a harmless concept after it."""
    concept = make_concept(name, (1, 2, 3), trigger=trigger, license=licence, training={key: value})
    other = make_concept("\U0001f99c", (4, 5), license="harmless", training={"steps": 1})
    return card_of(concept, base_model=base), card_of(concept, other, base_model=base)


@law
@example("a | b", HOSTILE[0], "x\n---\n# y", "`k`\n", "<b>\n\n| z |", "y")
@example("- a", "- b", "- c", "1. d", "> e", "+ f")
@example("cat", HOSTILE[3], HOSTILE[3], HOSTILE[4], HOSTILE[1], HOSTILE[6])
@given(names, names, any_texts.filter(str.strip), any_texts, any_texts, names.filter(lambda base: not is_repo_id(base)))
def test_no_text_of_a_file_breaks_out_of_its_place(name, trigger, licence, key, value, base):
    check_card(name, trigger, licence, key, value, base)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_text(text):
    check_card(text, text, text, text, text, text)


def check_card(name, trigger, licence, key, value, base):
    parser = (
        pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    )
    card, pair = cards_with(name, trigger, licence, key, value, base)
    benign, benign_pair = cards_with("x", "x", "x", "x", "x", "x")
    front, benign_front = front_of(card), front_of(benign)
    assert front["instance_prompt"] == trigger
    assert set(front) - {"license_name"} == set(benign_front) - {"license_name"}
    assert front["tags"] == benign_front["tags"]

    def parsed(text):
        return parser.parse(text.split("---\n", 2)[2])

    def kinds(tokens):
        return [
            (token.type, token.tag, [child.type for child in token.children or () if child.type != "text"])
            for token in tokens
        ]

    tokens = parsed(card)
    assert kinds(tokens) == kinds(parsed(benign))
    assert kinds(parsed(pair)) == kinds(parsed(benign_pair))
    assert set(front_of(pair)) == set(front_of(benign_pair))
    cells = [token for token in tokens if token.type == "inline" and token.content.startswith("<code>")]
    (cell,) = cells
    assert [child.content for child in cell.children if child.type == "html_inline"] == ["<code>", "</code>"]
    shown = "".join(child.content for child in cell.children if child.type != "html_inline")
    assert shown == trigger
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    assert shlex.split(blocks["sh"])[-1] == trigger
    (prompt,) = [
        node.args[0].value
        for node in ast.walk(ast.parse(blocks["python"]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipeline"
    ]
    assert prompt == trigger


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("Owner-1/na_me.v2", True),
        ("name", False),
        ("owner/name/more", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("/name", False),
        ("owner/", False),
        ("owner/na--me", False),
        ("owner/na..me", False),
        ("owner/name.git", False),
        ("owner/name.safetensors", False),
        ("folder/NAME.SafeTensors", False),
        ("owner/name ", False),
        ("owner/na me", False),
        ("ow\nner/name", False),
        ("owner/日本", False),
        ("owner\\name", False),
        ("o/" + "n" * 94, True),
        ("o/" + "n" * 95, False),
        ("", False),
    ],
)
def test_repository_ids(text, expected):
    assert is_repo_id(text) is expected


@law
@given(st.lists(st.sampled_from([*"ab1-_./é "]), max_size=9).map("".join))
def test_the_hubs_library_agrees_on_ids(text):
    utils = pytest.importorskip("huggingface_hub.utils")
    if is_repo_id(text):
        utils.validate_repo_id(text)
