"""The demo's page is one sound HTML file that says what it is told and nothing that a prompt smuggles in."""

import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram_core import InputError
from engram_vision.demo.curve import plot_curve
from engram_vision.demo.page import (
    Character,
    Curve,
    Figure,
    Page,
    Picture,
    Reference,
    Row,
    Section,
    Token,
    render_page,
)

VOID = {"meta", "link", "img"}
HOSTILE = "<script>alert(1)</script>\" onload='x' </title></style>{{ 7 * 7 }} & http://example.com/"
NAN, INF = math.nan, math.inf


class Document(HTMLParser):
    """Collects a page's elements and texts, and insists that every tag is closed by its own end."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.elements if name == tag and wanted.items() <= attrs.items()]

    def classed(self, name):
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def image(seed):
    return Image.new("RGB", (64, 64), (seed % 256, seed // 256, 99))


def character(name="zorbit quell", seed=0, **changes):
    values = {
        "name": name,
        "references": tuple(Reference(image=image(seed + i), caption=f"{name} in place {i}") for i in range(3)),
        "curve": Curve(steps=(1, 2, 3), losses=(0.9, 0.5, 0.4), validation=((0, 0.8), (3, 0.4)), kept_step=3),
        "seconds": 74.2,
        "n_bytes": 18824,
        "identity": "0123456789abcdef" * 4,
        "entries": 7,
    }
    return Character(**values | changes)


def row(prompt="zorbit quell at night", seed=100, **changes):
    values = {
        "prompt": prompt,
        "tokens": {
            "clip_l": (
                Token(text="zor", concept="zorbit quell"),
                Token(text="bit", concept="zorbit quell"),
                Token(text="night"),
            )
        },
        "seed": seed,
        "pictures": (
            Picture(image=image(seed), verdict="another monster"),
            Picture(image=image(seed + 1), verdict="zorbit quell", good=True),
        ),
    }
    return Row(**values | changes)


def page(**changes):
    values = {
        "title": "Two memories",
        "lead": "A model learns two characters.",
        "passed": True,
        "figures": (Figure(label="Shown", value="0.94", bar="at least 0.80", met=True, explanation="A share."),),
        "characters": (character(), character("fenny wumble", seed=50)),
        "sections": (Section(title="Alone", text="Look.\n\nLook again.", columns=("base", "engram"), rows=(row(),)),),
        "facts": {"Seed": "0"},
        "commands": ("engram merge a.safetensors b.safetensors --output c.safetensors",),
    }
    return Page(**values | changes)


def test_the_page_says_everything_it_is_given():
    text = Document(render_page(page())).text
    for words in (
        *("Two memories", "A model learns two characters.", "Every check passed."),
        *("Shown", "0.94", "at least 0.80", "A share."),
        *("fenny wumble", "fenny wumble in place 2", "1 min 14 s", "18,824 bytes, 7 entries", "0123456789ab"),
        *("Alone", "Look again.", "base", "engram", "zorbit quell at night", "seed 100", "another monster"),
        *("Seed", "engram merge"),
    ):
        assert words in text, words


def test_commands_can_be_copied_whole():
    commands = ("engram train --data my-folder", "engram generate \\\n    --prompt 'a  b'")
    html = render_page(page(commands=commands))
    shown = [Document(f"<pre>{inside}</pre>").texts for inside in re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)]
    assert ["".join(texts) for texts in shown] == list(commands)


def test_every_name_and_prompt_is_escaped():
    hostile = page(
        title=HOSTILE,
        lead=HOSTILE,
        passed=False,
        failures=(HOSTILE,),
        figures=(Figure(label=HOSTILE, value=HOSTILE, bar=HOSTILE, met=False, explanation=HOSTILE),),
        characters=(
            character(
                HOSTILE, trigger=HOSTILE, identity=HOSTILE, references=(Reference(image=image(1), caption=HOSTILE),)
            ),
        ),
        sections=(
            Section(
                title=HOSTILE,
                text=HOSTILE,
                columns=(HOSTILE,),
                rows=(
                    row(
                        HOSTILE,
                        tokens={HOSTILE: (Token(text=HOSTILE, concept=HOSTILE), Token(text=HOSTILE))},
                        pictures=(Picture(image=image(2), verdict=HOSTILE, good=False, identical=False),),
                        note=HOSTILE,
                    ),
                ),
            ),
        ),
        facts={HOSTILE: HOSTILE},
        commands=(HOSTILE,),
    )
    document = Document(render_page(hostile))
    assert not document.all("script")
    assert not [name for _, attrs in document.elements for name in attrs if name.startswith("on")]
    assert len(document.all("style")) == 1
    assert "49" not in document.text
    # Shown as written wherever it stands: once for each place, and thrice where a name is repeated.
    assert document.text.count("<script>alert(1)</script>") >= 18


def test_the_page_loads_nothing():
    html = render_page(page())
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    document = Document(html)
    for _, attrs in document.elements:
        for name in ("src", "href", "srcset", "xlink:href", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
    (policy,) = document.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")


def test_links_and_labels_point_at_ids_that_are_there_once():
    document = Document(render_page(page()))
    ids = [attrs["id"] for _, attrs in document.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    targets = {attrs["href"][1:] for attrs in document.all("a")}
    targets |= {attrs["aria-labelledby"] for _, attrs in document.elements if "aria-labelledby" in attrs}
    assert targets <= set(ids)


def test_every_picture_is_there_once_as_png_with_a_text():
    document = Document(render_page(page()))
    pictures = document.all("img")
    colors = []
    for attrs in pictures:
        header, data = attrs["src"].split(",")
        assert header == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as shown:
            assert (shown.format, shown.size) == ("PNG", (64, 64))
            colors.append(shown.getpixel((0, 0)))
        assert (attrs["width"], attrs["height"], attrs["class"]) == ("64", "64", "pixels")
    assert colors == [image(seed).getpixel((0, 0)) for seed in (0, 1, 2, 50, 51, 52, 100, 101)]
    assert [attrs["alt"] for attrs in pictures][-2:] == [
        "zorbit quell at night, base, seed 100",
        "zorbit quell at night, engram, seed 100",
    ]
    assert pictures[0]["alt"] == "Reference for zorbit quell: zorbit quell in place 0"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_pictures_of_any_mode_are_shown(mode):
    (attrs,) = Document(
        render_page(
            page(
                characters=(),
                sections=(
                    Section(
                        title="",
                        text="",
                        columns=("base",),
                        rows=(row(pictures=(Picture(image=Image.new(mode, (64, 64))),)),),
                    ),
                ),
            )
        )
    ).all("img")
    with Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1]))) as shown:
        shown.load()


def test_large_pictures_are_not_shown_as_pixel_art():
    references = (Reference(image=Image.new("RGB", (512, 512)), caption="large"),)
    (attrs,) = Document(render_page(page(characters=(character(references=references),), sections=()))).all("img")
    assert "class" not in attrs


def test_failures_are_shown_loudly():
    failures = ("The crown is missing.", "The bytes differ.")
    document = Document(render_page(page(passed=False, failures=failures)))
    assert document.all("div", role="alert")
    assert "2 checks failed The crown is missing. The bytes differ." in document.text
    assert "Every check passed" not in document.text


@pytest.mark.parametrize(
    ("passed", "failures", "shown"),
    [
        (True, ("One is wrong.",), "One check failed One is wrong."),
        (False, ("One is wrong.",), "One check failed One is wrong."),
        (False, (), "The demo did not pass"),
    ],
)
def test_nothing_less_than_a_pass_is_shown_as_one(passed, failures, shown):
    document = Document(render_page(page(passed=passed, failures=failures)))
    assert shown in document.text
    assert "Every check passed" not in document.text


@pytest.mark.parametrize(
    ("missed", "shown"), [(1, "but 1 figure misses its bar."), (2, "but 2 figures miss their bars.")]
)
def test_a_pass_with_missed_figures_says_so(missed, shown):
    figures = tuple(Figure(label=f"Figure {i}", value="0.5", met=i >= missed) for i in range(3))
    document = Document(render_page(page(figures=figures)))
    assert f"Every check passed, {shown}" in document.text
    assert "Every check passed." not in document.text
    assert not document.classed("passed")


@pytest.mark.parametrize(
    ("met", "bar", "style", "words"),
    [
        (True, "at least 0.80", "met", "at least 0.80"),
        (False, "at least 0.80", "missed", "at least 0.80"),
        (False, "", "missed", "not met"),
        (None, "for comparison", None, "for comparison"),
    ],
)
def test_a_figure_says_whether_its_bar_is_met(met, bar, style, words):
    figure = Figure(label="Shown", value="0.94", bar=bar, met=met)
    document = Document(render_page(page(figures=(figure,), characters=(), sections=())))
    assert words in document.text
    assert [any(name in attrs["class"].split() for attrs in document.classed("bar")) for name in ("met", "missed")] == [
        style == "met",
        style == "missed",
    ]


def test_a_figure_without_a_bar_shows_no_mark():
    document = Document(render_page(page(figures=(Figure(label="Luck", value="0.06"),), characters=(), sections=())))
    assert not document.classed("bar")


def test_marks_have_words_beside_their_color():
    pictures = tuple(
        Picture(image=image(i), verdict=verdict, good=good, identical=identical)
        for i, (verdict, good, identical) in enumerate(
            [
                ("seen", True, None),
                ("unseen", False, None),
                ("other", None, None),
                (None, None, True),
                (None, None, False),
                (None, True, None),
                (None, None, None),
            ]
        )
    )
    columns = tuple("abcdefg")
    section = Section(title="Marks", text="", columns=columns, rows=(row(tokens={}, pictures=pictures),))
    document = Document(render_page(page(figures=(), characters=(), sections=(section,))))
    in_table = document.text.split("seed 100")[1].split("By hand")[0]
    assert "a seen b unseen c other d same bytes as base e other bytes than base f as it should be g" in in_table
    marks = [attrs for attrs in document.classed("mark") if "mark" in attrs["class"]]
    assert all(attrs["aria-label"] for attrs in marks)
    kinds = [attrs["class"].removeprefix("mark ") for attrs in marks]
    assert kinds == ["yes", "yes", "no", "yes", "no", "same", "other", "yes"]  # outcome, legend of two, cells
    assert len(document.all("figure", **{"class": "wrong"})) == 2


def test_a_concept_has_one_color_everywhere_and_a_legend():
    other = Token(text="new", concept="a third")
    section = Section(
        title="Colors",
        text="",
        columns=("base", "engram"),
        rows=(row(tokens={"clip_l": (other, *row().tokens["clip_l"], other)}),),
    )
    document = Document(render_page(page(sections=(section,))))
    fired = [(attrs["class"], attrs["title"]) for attrs in document.classed("fired")]
    third, first = ("fired k2", "a third fires here"), ("fired k0", "zorbit quell fires here")
    assert fired == [third, first, third]
    assert [attrs["class"] for attrs in document.classed("character")] == ["card character k0", "card character k1"]
    assert [attrs["class"] for attrs in document.classed("badge")][2:4] == ["badge k2", "badge k0"]  # the legend
    assert "zorbit quell fires at: zor bit night" in document.text.replace("3 a third", "a third")


def test_the_page_has_a_color_for_each_concept():
    concepts = [f"concept {i}" for i in range(11)]
    tokens = tuple(Token(text="x", concept=concept) for concept in concepts)
    section = Section(title="Many", text="", columns=("base", "engram"), rows=(row(tokens={"clip_l": tokens}),))
    html = render_page(page(characters=(), sections=(section,)))
    used = {name for attrs in Document(html).classed("fired") for name in attrs["class"].split()} - {"fired"}
    assert used == {f"k{i}" for i in range(8)}
    for number in range(8):
        assert f".k{number} {{ --k: var(--k{number}); --f: var(--f{number}); }}" in html
        assert len(re.findall(rf"--k{number}: #[0-9a-f]{{6}};", html)) == 2  # light and dark
        assert len(re.findall(rf"--f{number}: #[0-9a-f]{{6}};", html)) == 2


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme):
    # WCAG 2.1 AA asks for 4.5 to 1.
    html = render_page(page())
    start = html.index(":root", html.index("prefers-color-scheme")) if scheme == "dark" else html.index(":root")
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", html[start : html.index("}", start)]))
    pairs = [(ink, ground) for ink in ("ink", "soft", "good", "bad", "accent") for ground in ("paper", "card")]
    pairs += [("soft", "fill"), ("ink", "bad-fill"), ("bad", "bad-fill"), ("on", "good"), ("on", "bad")]
    pairs += [(f"k{i}", ground) for i in range(8) for ground in ("card", f"f{i}")]
    for ink, ground in pairs:
        low, high = sorted((luminance(colors[ink]), luminance(colors[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_tables_have_scopes_and_roles():
    document = Document(render_page(page()))
    assert [attrs["scope"] for attrs in document.all("th")] == ["col", "col", "col", "row"]
    assert len(document.all("td", role="cell")) == 2


def test_an_empty_page_and_empty_sections_are_sound():
    bare = Page(title="Bare", lead="Nothing yet.", passed=True)
    assert "Nothing yet." in Document(render_page(bare)).text
    empty = Section(title="Empty", text="")
    document = Document(render_page(page(figures=(), characters=(), sections=(empty,), facts={}, commands=())))
    assert not document.all("table")
    assert "Empty" in document.text
    alone = character(references=(), curve=Curve(steps=(), losses=()), n_bytes=1, entries=1, seconds=0.44)
    text = Document(render_page(page(characters=(alone,)))).text
    assert "No loss was recorded." in text
    assert "1 byte, 1 entry" in text
    assert "0.4 s" in text


def test_equal_pages_are_equal_bytes():
    assert render_page(page()) == render_page(page())


def test_rows_must_fill_the_columns():
    with pytest.raises(InputError, match=r"section 'Alone': the row of 'a cat' has 2 pictures for 3 columns"):
        Section(title="Alone", text="", columns=("a", "b", "c"), rows=(row("a cat"),))


def test_a_curve_needs_a_loss_for_each_step():
    with pytest.raises(InputError, match="2 steps and 1 losses"):
        Curve(steps=(1, 2), losses=(0.5,))


def coordinates(html):
    """Return every (x, y) that the curves on a page are drawn with, and the width and height they lie in."""
    document = Document(html)
    points = []
    for tag, attrs in document.elements:
        name = attrs.get("class")
        if tag == "line":
            points += [(attrs["x1"], attrs["y1"]), (attrs["x2"], attrs["y2"])]
        elif tag == "circle" and "cx" in attrs and name in ("validation", "keeper"):
            points.append((attrs["cx"], attrs["cy"]))
        elif tag == "text":
            points.append((attrs["x"], attrs["y"]))
        elif tag == "path" and name in ("training", "validation"):
            points += re.findall(r"[ML]([-\d.]+) ([-\d.]+)", attrs["d"])
    (box,) = {
        attrs["viewbox"] for attrs in document.all("svg") if attrs.get("role") == "img" and "aria-label" not in attrs
    }
    _, _, width, height = map(float, box.split())
    return [(float(x), float(y)) for x, y in points], width, height


losses = st.floats(width=64) | st.floats(1e-4, 2)


@settings(deadline=None)
@given(
    training=st.lists(st.tuples(st.integers(0, 50), losses), max_size=20),
    validation=st.lists(st.tuples(st.integers(0, 1000), losses), max_size=5),
    kept=st.none() | st.integers(0, 2000),
)
def test_curves_stay_inside_their_drawing(training, validation, kept):
    steps = tuple(sum(gap for gap, _ in training[: i + 1]) for i in range(len(training)))
    curve = Curve(
        steps=steps,
        losses=tuple(loss for _, loss in training),
        validation=tuple(sorted(validation, key=lambda pair: pair[0])),
        kept_step=kept,
    )
    alone = character(references=(), curve=curve)
    html = render_page(page(characters=(alone,), sections=()))
    points, width, height = coordinates(html)
    assert points
    for x, y in points:
        assert 0 <= x <= width
        assert 0 <= y <= height
    plot = plot_curve(curve)
    for dot in plot.dots:
        assert plot.left <= dot.x <= plot.right
        assert plot.top - 1e-6 <= dot.y <= plot.bottom + 1e-6
    assert not re.search(r"\b(nan|inf)\b", html)


def test_losses_that_are_no_number_leave_a_gap():
    curve = Curve(steps=(0, 1, 2, 3, 4), losses=(1.0, 0.9, NAN, INF, 0.8))
    plot = plot_curve(curve)
    assert plot.training.count("M") == 2
    assert plot_curve(Curve(steps=(1, 2), losses=(NAN, INF))).training == ""


def test_a_single_loss_is_visible():
    plot = plot_curve(Curve(steps=(10,), losses=(0.5,), validation=((10, 0.5),), kept_step=10))
    (start, end) = re.fullmatch(r"M([\d.]+) [\d.]+L([\d.]+) [\d.]+", plot.training).groups()
    assert float(end) - float(start) == 4
    assert plot.kept_dot == plot.dots[0]
    assert plot.summary == (
        "Training loss 0.5 at step 10 and 0.5 at step 10. Lowest validation loss 0.5 at step 10. Step 10 was kept."
    )


def test_long_curves_are_averaged_and_say_so():
    curve = Curve(steps=tuple(range(1000)), losses=(0.4, 0.6) * 500)
    plot = plot_curve(curve)
    assert plot.mean_of == 5
    assert plot.training.count("L") == 199
    text = Document(render_page(page(characters=(character(curve=curve),)))).text
    assert "training (means of 5)" in text


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    far = plot_curve(Curve(steps=(0, 1, 2), losses=(1.0, 0.1, 0.01)))
    near = plot_curve(Curve(steps=(0, 1, 2), losses=(1.0, 0.9, 0.5)))
    below = plot_curve(Curve(steps=(0, 1, 2), losses=(1.0, 0.1, -0.01)))
    assert [plot.log for plot in (far, near, below)] == [True, False, False]
    assert [tick.label for tick in far.y_ticks] == ["0.01", "0.1", "1"]
    assert [tick.label for tick in near.y_ticks] == ["0.4", "0.6", "0.8", "1.0"]
    ys = [float(y) for y in re.findall(r" ([\d.]+)", far.training)]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


def test_ticks_are_round_and_begin_at_zero():
    plot = plot_curve(Curve(steps=(1, 600), losses=(1.0, 0.5)))
    assert [tick.label for tick in plot.x_ticks] == ["0", "200", "400", "600"]
    assert plot.x_ticks[0].at == plot.left
    assert plot.x_ticks[-1].at == plot.right


def test_the_kept_step_is_marked():
    html = render_page(page(characters=(character(),), sections=()))
    document = Document(html)
    assert "kept: step 3" in document.text
    assert len(document.all("circle", **{"class": "keeper"})) == 2  # on the curve, and in its key
    unkept = character(curve=Curve(steps=(1, 2), losses=(0.5, 0.4)))
    document = Document(render_page(page(characters=(unkept,), sections=())))
    assert "kept: step" not in document.text
    assert not document.classed("kept")
    assert not document.classed("keeper")


def test_importing_the_page_imports_no_torch():
    code = "import sys, engram_vision.demo.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
