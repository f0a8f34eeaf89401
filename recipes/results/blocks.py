"""The blocks of the page: each makes Markdown, and perhaps a plot, of what the benchmarks kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from recipes.results.clips import tell_clip_losses, tell_clips
from recipes.results.figures import NOT_YET, Comparison, Spread, read_results, show_machine
from recipes.results.plots import plot_bars, plot_curves, plot_trade

_KB, _MB = 1e3, 1e6

# What is compared: (what it is called, the counts it is a share of, whether more is better).
NAMED = ("scenes shown", "new scenes", "other wordings")
QUIET = ("other subjects", "words of the class", "single words of the name")
MEASURES: Sequence[tuple[str, tuple[str, ...], bool]] = (  # the first five are of the character alone
    ("identity in the scenes of the pictures", ("scenes shown: identity",), True),
    ("identity in new scenes", ("new scenes: identity",), True),
    ("identity in prompts worded differently", ("other wordings: identity",), True),
    ("attributes right", tuple(f"{group}: attributes" for group in NAMED), True),
    ("scene of the prompt", tuple(f"{group}: scene" for group in NAMED), True),
    ("identity beside another subject", ("beside another subject: identity",), True),
    ("a thing beside the character right", ("beside another subject: thing right",), True),
    ("a monster beside the character right", ("beside another subject: monster right",), True),
    ("two characters, both right", ("two characters: both",), True),
    ("two characters, each right", ("two characters: each",), True),
    ("attributes borrowed by a monster beside the character", ("beside another subject: borrowed",), False),
    ("pictures without the name unchanged to the byte", tuple(f"{group}: identical" for group in QUIET), True),
    ("difference of pictures without the name", tuple(f"{group}: difference" for group in QUIET), False),
    ("distance of pictures without the name", tuple(f"{group}: distance" for group in QUIET), False),
    (
        "pictures without the name that show the character",
        tuple(f"{group}: shows the character" for group in QUIET),
        False,
    ),
    ("other subjects as the prompt says", ("other subjects: obeyed",), True),
)
COSTS: Sequence[tuple[str, str, Callable[[float], str]]] = (  # what it is called, where it is kept, how it is shown
    ("size of the file", "size", lambda value: _show_size(value)),
    ("seconds of training", "seconds", lambda value: f"{value:,.0f} s"),
    ("peak memory", "peak", lambda value: f"{value / 2**20:,.0f} MiB"),
    ("seconds of loading", "load_seconds", lambda value: f"{1000 * value:,.0f} ms"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where figures come from, and plots go to.

    Attributes:
        vision, video: `results.json` of the packages' benchmarks.
        grids: folder in which benchmarks have a folder each, with one for each checkpoint, where their pictures are.
        plots: folder beside the page.
    """

    vision: Path
    video: Path
    grids: Path
    plots: Path

    def comparison(self, name: str) -> Comparison | None:
        """Return the rows of a benchmark of pictures."""
        content = read_results(self.vision, name)
        return None if content is None else Comparison(content)


def tell_losses(found: Comparison) -> str:
    """List every measure and cost in which a method of others does better than the engram of full training."""
    ours = _pick_ours(found)
    if ours is None:
        return NOT_YET
    lines = []
    for what, names, more_is_better in MEASURES:
        own, sign = found.share(ours, *names), 1 if more_is_better else -1
        if own is None:
            continue
        others = {method: found.share(method, *names) for method in _others(found)}
        better = {method: one for method, one in others.items() if one and sign * one.mean > sign * own.mean}
        for method, spread in sorted(better.items(), key=lambda item: -sign * item[1].mean):
            doubt = "; the seeds of both overlap" if spread.overlaps(own) else ""
            lines.append(f"- **{what}**: {method} has {spread.show()}, the engram {own.show()}{doubt}.")
    for what, name, show in COSTS:
        costs = {method: found.cost(method, name) for method in (ours, *_others(found))}
        paid = costs.pop(ours)
        less = {method: cost for method, cost in costs.items() if paid and cost is not None and cost < paid}
        for method, cost in sorted(less.items(), key=lambda item: item[1]):
            lines.append(f"- **{what}**: {method} has {show(cost)}, the engram {show(paid or 0.0)}.")
    head = f"*The engram* is here *{ours}*, which learned as long as the others."
    return "\n".join([head, "", *(lines or ["In none of the measures and costs does another method do better."])])


def tell_goal(found: Comparison) -> str:
    """Hold the engram of full training against the best LoRA: identity, size, leak."""
    ours = _best(found, filter(None, [_pick_ours(found)]))
    theirs = _best(found, (m for m in found.methods if m.startswith("LoRA")))
    if ours is None or theirs is None:
        return NOT_YET
    lines = []
    for method, spread in (ours, theirs):
        size = found.cost(method, "size") or 0.0
        same = found.share(method, *(f"{group}: identical" for group in QUIET))
        lines.append(
            f"- **{method}**: identity in new scenes {spread.show()}, {_show_size(size)}, "
            f"{'?' if same is None else same.show()} of the pictures without the name unchanged."
        )
    gap = ours[1].mean - theirs[1].mean
    share = (found.cost(ours[0], "size") or 0.0) / (found.cost(theirs[0], "size") or 1.0)
    doubt = ", and the seeds of both overlap" if ours[1].overlaps(theirs[1]) else ""
    if abs(gap) < 0.005:
        verdict = "Their means are equal"
    else:
        verdict = f"The engram's mean is {abs(gap):.2f} {'above' if gap > 0 else 'below'} LoRA's"
    return "\n".join([*lines, "", f"{verdict}{doubt}, at {share:.2f} of its size."])


def draw_identity(found: Comparison, plots: Path) -> str:
    """Draw identity in new scenes, and tabulate all of identity."""
    figures = dict(_known(found, "new scenes: identity"))
    plot_bars(plots / "identity.svg", "Identity in new scenes; dots are seeds", figures, limit=1.1)
    columns = [(what, names, 2) for what, names, _ in MEASURES[:5]]
    return f"{_picture(plots, 'identity.svg', 'Identity in new scenes by method')}\n\n{_table(found, columns)}"


def draw_leak(found: Comparison, plots: Path) -> str:
    """Draw how far prompts without the name move, and tabulate."""
    figures = dict(_known(found, *(f"{group}: distance" for group in QUIET)))
    title = "Distance of pictures without the name from the base model's; dots are seeds"
    plot_bars(plots / "leak.svg", title, figures)
    columns = [
        ("identical bytes", tuple(f"{group}: identical" for group in QUIET), 2),
        ("difference of pixels", tuple(f"{group}: difference" for group in QUIET), 3),
        *((f"distance, {group}", (f"{group}: distance",), 3) for group in QUIET),
        ("the character shows up", tuple(f"{group}: shows the character" for group in QUIET), 2),
        ("other subjects obeyed", ("other subjects: obeyed",), 2),
    ]
    return f"{_picture(plots, 'leak.svg', 'Leak by method')}\n\n{_table(found, columns)}"


def tell_company(found: Comparison) -> str:
    """Tabulate prompts with two subjects."""
    columns = [(what, names, 2) for what, names, _ in MEASURES[5:11]]
    return _table(found, columns)


def draw_trade(found: Comparison, plots: Path) -> str:
    """Draw identity over the size of the file, and tabulate what learning takes."""
    points, rows = {}, []
    for method, spread in _known(found, "new scenes: identity"):
        size = found.cost(method, "size")
        if size is None:
            continue
        points[method] = (size / _KB, spread)
        cells = (
            f"{found.cost(method, 'values') or 0:,.0f}",
            _show_size(size),
            f"{found.cost(method, 'seconds') or 0:,.0f} s",
            f"{(found.cost(method, 'peak') or 0) / 2**20:,.0f} MiB",
            f"{1000 * (found.cost(method, 'load_seconds') or 0):,.0f} ms",
        )
        rows.append(f"| {method} | {' | '.join(cells)} |")
    plot_trade(
        plots / "trade.svg",
        "Identity in new scenes and the size of the file; bars span the seeds",
        points,
        ("size of the file, kB", "identity in new scenes"),
    )
    head = "| method | values | file | training | peak memory | loading |\n| --- | --- | --- | --- | --- | --- |"
    return "\n".join([_picture(plots, "trade.svg", "Identity over file size"), "", head, *rows])


def draw_crowd(found: Comparison, plots: Path) -> str:
    """Draw what becomes of a character among others."""
    curves: dict[str, list[tuple[float, Spread | float]]] = {}
    for method in found.methods:
        spread = found.share(method, "new scenes: identity")
        kind, _, rest = method.partition(", ")
        count, _, way = rest.partition(" ")
        number = float(count.replace(",", ""))
        if spread is None:
            continue
        if kind == "engrams":
            curves.setdefault("engrams in one file", []).append((number, spread))
        elif not way:  # a single LoRA begins every way of merging
            curves["LoRA, 1"] = [(number, spread)]
        else:
            curves.setdefault(f"LoRA, {way}", list(curves["LoRA, 1"])).append((number, spread))
    curves.pop("LoRA, 1", None)
    labels = ("adapters merged", "identity in new scenes")
    plot_curves(plots / "crowd.svg", "One character among others; shades span the seeds", curves, labels)
    columns = [
        ("identity in new scenes", ("new scenes: identity",), 2),
        ("pictures as alone", ("as alone",), 2),
        ("without the name: identical", ("other subjects: identical",), 2),
        ("obeyed", ("other subjects: obeyed",), 2),
    ]
    return f"{_picture(plots, 'crowd.svg', 'Identity by number of merged adapters')}\n\n{_table(found, columns)}"


def tell_short(found: Comparison) -> str:
    """Tabulate a comparison in short form."""
    columns = [
        ("identity in new scenes", ("new scenes: identity",), 2),
        ("worded differently", ("other wordings: identity",), 2),
        ("scene of the prompt", tuple(f"{group}: scene" for group in NAMED), 2),
        ("two characters, both right", ("two characters: both",), 2),
        ("without the name: identical", tuple(f"{group}: identical" for group in QUIET), 2),
        ("distance", tuple(f"{group}: distance" for group in QUIET), 3),
    ]
    sizes = {method: found.cost(method, "size") for method in found.methods}
    return _table(found, columns, {method: "" if size is None else _show_size(size) for method, size in sizes.items()})


def tell_strengths(found: Comparison) -> str:
    """Tabulate what other strengths give."""
    columns = [
        ("identity in new scenes", ("new scenes: identity",), 2),
        ("worded differently", ("other wordings: identity",), 2),
        ("scene of the prompt", tuple(f"{group}: scene" for group in NAMED), 2),
    ]
    return _table(found, columns)


def tell_pace(sources: Sources) -> str:
    """Tabulate how fast many concepts are learned."""
    content = read_results(sources.vision, "concepts")
    if content is None:
        return NOT_YET
    figures = content["figures"]
    lines = ["| samples a step of each | concepts at once | concepts an hour |", "| --- | --- | --- |"]
    for batch, sizes in figures["seconds"].items():
        for size, seconds in sizes.items():
            pace = Spread(seeds=tuple(3600 * figures["concepts"] / each for each in seconds))
            lines.append(f"| {batch.removeprefix('batch of ')} | {size} | {pace.show(0)} |")
    return "\n".join(lines)


def show_pictures(sources: Sources, backbone: str) -> str:
    """Show a grid for each character: those that benchmarks drew on this machine, else those that are there."""
    for grid in sorted(sources.grids.glob(f"*/*/{backbone}-*.png"), key=lambda path: path.stat().st_mtime):
        with Image.open(grid) as picture:
            picture.save(sources.plots / f"{grid.stem}.webp", quality=80, method=6)
    grids = sorted(sources.plots.glob(f"{backbone}-*.webp"))
    named = ((grid.name, grid.stem.removeprefix(f"{backbone}-").replace("-", " ").title()) for grid in grids)
    return "\n\n".join(_picture(sources.plots, name, title) for name, title in named) or NOT_YET


def draw_scale(sources: Sources) -> str:
    """Draw what many entries cost."""
    content = read_results(sources.vision, "scale")
    if content is None:
        return NOT_YET
    sizes = content["figures"]["sizes"]
    costs: Mapping[str, tuple[str, float]] = {
        "opening, ms": ("open_seconds", 1000),
        "loading, ms": ("load_seconds", 1000),
        "memory, MB": ("memory", 1 / _MB),
        "file, MB": ("size", 1 / _MB),
    }
    curves = {
        name: [(size["entries"], max(1e-3, size[key] * factor)) for size in sizes]
        for name, (key, factor) in costs.items()
    }
    plot_curves(sources.plots / "scale.svg", "What entries cost", curves, ("entries in the file", ""), log=True)
    columns = ["concepts", "entries", "encoding, nothing fires", "encoding, a trigger fires"]
    columns += ["pictures as alone", "pictures as the base model's", "triggers that fire once"]
    rows = []
    for size in sizes:
        ratios = (size["quiet"]["median"], size["firing"]["median"])
        shares = (f"{right} of {count}" for count, right in (size["alone"], size["base"], size["fired"]))
        cells = (f"{size['concepts']:,}", f"{size['entries']:,}", *(f"{ratio:.3f}" for ratio in ratios), *shares)
        rows.append(f"| {' | '.join(cells)} |")
    head = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([_picture(sources.plots, "scale.svg", "Costs over entries"), "", *head, *rows])


def tell_machines(sources: Sources) -> str:
    """List for each benchmark its command, seeds and machine."""
    rows = []
    for package, path, names in (
        (
            "vision",
            sources.vision,
            ("rates", "comparison", "comparison_sd35", "strengths", "accumulation", "scale", "concepts"),
        ),
        ("video", sources.video, ("quality",)),
    ):
        for name in names:
            content = read_results(path, name)
            if content is not None:
                seeds = ", ".join(map(str, content["figures"].get("seeds", ()))) or "none"
                command = f"`uv run nox -s benchmarks -- {package} {name}`"
                rows.append(f"| {command} | {seeds} | {show_machine(content['machine'])} |")
    return "\n".join(["| command | seeds | machine |", "| --- | --- | --- |", *rows]) if rows else NOT_YET


def _of(benchmark: str, make: Callable[[Comparison, Path], str]) -> Callable[[Sources], str]:
    """Return the block that is made of the rows of one benchmark."""

    def block(sources: Sources) -> str:
        found = sources.comparison(benchmark)
        return NOT_YET if found is None else make(found, sources.plots)

    return block


BLOCKS: Mapping[str, Callable[[Sources], str]] = {
    "losses": _of("comparison", lambda found, _: tell_losses(found)),
    "goal": _of("comparison", lambda found, _: tell_goal(found)),
    "pictures": partial(show_pictures, backbone="sd15"),
    "identity": _of("comparison", draw_identity),
    "leak": _of("comparison", draw_leak),
    "company": _of("comparison", lambda found, _: tell_company(found)),
    "trade": _of("comparison", draw_trade),
    "crowd": _of("accumulation", draw_crowd),
    "scale": draw_scale,
    "pace": tell_pace,
    "strengths": _of("strengths", lambda found, _: tell_strengths(found)),
    "sd35_pictures": partial(show_pictures, backbone="sd35"),
    "sd35": _of("comparison_sd35", lambda found, _: tell_short(found)),
    "clip_losses": lambda sources: tell_clip_losses(read_results(sources.video, "quality")),
    "wan22": lambda sources: tell_clips(read_results(sources.video, "quality")),
    "wan22_pictures": partial(show_pictures, backbone="wan22"),
    "machines": tell_machines,
}


def _picture(plots: Path, name: str, title: str) -> str:
    """Return a plot that lies beside the page, in Markdown."""
    return f"![{title}]({plots.name}/{name})"


def _is_ours(method: str) -> bool:
    return method.startswith("engram")


def _pick_ours(found: Comparison) -> str | None:
    """Return the engram with a residual for each block that learned in as many steps as the others."""
    known = [method for method in found.methods if _is_ours(method) and "each block" in method]
    return known[-1] if known else None


def _others(found: Comparison) -> list[str]:
    return [method for method in found.methods if not _is_ours(method) and not method.startswith("the base")]


def _best(found: Comparison, methods: Iterable[str]) -> tuple[str, Spread] | None:
    """Return the method with the highest mean identity in new scenes, and its seeds."""
    known = [(method, spread) for method in methods if (spread := found.share(method, "new scenes: identity"))]
    return max(known, key=lambda one: one[1].mean, default=None)


def _known(found: Comparison, *names: str) -> Iterator[tuple[str, Spread]]:
    for method in found.methods:
        spread = found.share(method, *names)
        if spread is not None:
            yield method, spread


def _table(
    found: Comparison, columns: Sequence[tuple[str, tuple[str, ...], int]], files: Mapping[str, str] | None = None
) -> str:
    """Return a row for each method, and perhaps its file; no best is marked, because spreads overlap."""
    head = ["method", *(what for what, *_ in columns), *(["file"] if files else [])]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method in found.methods:
        spreads = [(found.share(method, *names), digits) for _, names, digits in columns]
        cells = ["" if spread is None else spread.show(digits) for spread, digits in spreads]
        cells += [files[method]] if files else []
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _show_size(size: float) -> str:
    return f"{size / _MB:,.1f} MB" if size >= _MB else f"{size / _KB:,.1f} kB"
