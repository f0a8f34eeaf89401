"""The model card of an adapter on the Hugging Face hub: a README in Markdown with YAML front matter.

Whatever comes from the file is a stranger's text. In Markdown each of its signs becomes a character reference,
which a Markdown parser shows and never reads as markup; in YAML, Python and shell lines it is a quoted string.
"""

from __future__ import annotations

import json
import re
import shlex
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_url

import numpy as np

from engram_core.adapter import Adapter
from engram_core.concept import ConceptRecord

__all__ = ["CARD_MARK", "is_repo_id", "render_card"]

CARD_MARK = "<!-- Written by engram push, which replaces it; delete this line to keep a card of your own. -->"
"""Stands in every card written here, so that a card that somebody else wrote is recognised."""

_LISTED = 50  # concepts in the table
_LICENCES = 20
_RECIPES = 5  # groups of concepts that were trained alike
_SETTINGS = 40
_LONGEST = 200  # characters of a free-form text

# Characters that begin no markup where they stand here, in the middle of a line.
_PLAIN = " .,-+'/"
_REFERENCES = {ord(sign): f"&#{ord(sign)};" for sign in string.punctuation if sign not in _PLAIN}
_INNER_UNDERSCORE = re.compile(r"(?<=[A-Za-z0-9])&#95;(?=[A-Za-z0-9])")  # emphasis needs one at the edge of a word

# The hub's rule for names of repositories (huggingface_hub, `validate_repo_id`).
_REPO_ID = re.compile(r"\b[\w\-.]{1,96}\b/\b[\w\-.]{1,96}\b", re.ASCII)
_LONGEST_REPO_ID = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """How the adapters of a backbone are used.

    Attributes:
        task: what the hub calls it.
        pipeline: class in diffusers, or None where the command line is the way.
    """

    task: str
    pipeline: str | None = None


_USES: Mapping[str, _Use] = {
    "sd15": _Use(task="text-to-image", pipeline="StableDiffusionPipeline"),
    "sdxl": _Use(task="text-to-image", pipeline="StableDiffusionXLPipeline"),
    "sd35": _Use(task="text-to-image", pipeline="StableDiffusion3Pipeline"),
    "wan22": _Use(task="text-to-video"),
    "qwen3": _Use(task="text-generation"),
}

# What the hub accepts as `license`; it refuses a card with another one. All others are `other` with a name.
_HUB_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma
gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
_KNOWN = frozenset(_HUB_LICENCES.split())
_SEVERAL = "mixed"


def is_repo_id(text: str) -> bool:
    """Tell whether a text can be the id of a hub repository that an adapter is loaded from, `owner/name`.

    A name that ends in `.safetensors` is the path of a file.
    """
    return (
        len(text) <= _LONGEST_REPO_ID
        and _REPO_ID.fullmatch(text) is not None
        and not any(part in text for part in ("--", ".."))
        and not text.lower().endswith((".git", ".safetensors"))
    )


def render_card(
    adapter: Adapter,
    *,
    repo_id: str,
    license: str | None = None,  # noqa: A002 - as the record and the hub call it
    preview: str | None = None,
    description: str | None = None,
) -> str:
    """Return the model card of an adapter.

    Args:
        adapter: the adapter; all of it is read, for its identity.
        repo_id: where it will be, `owner/name`.
        license: licence of the repository; None means the one that all concepts state. Where they state several,
            or none, the card says so.
        preview: path of a picture in the repository.
        description: Markdown of the publisher, inserted as it is.

    Returns:
        The text of README.md. It holds `CARD_MARK`.
    """
    records: list[ConceptRecord] = []
    stated: Counter[str | None] = Counter()
    n_spans = 0
    for record in adapter.records():
        if len(records) < _LISTED:
            records.append(record)
        stated[_clean(record.license or "").strip() or None] += 1
        n_spans += record.activation == "spans"
    use = _USES.get(adapter.manifest.backbone)
    sections = [
        _front_matter(adapter, records, use, _settle_license(license, stated)),
        CARD_MARK,
        f"# {_text(repo_id.rpartition('/')[2])}",
        *([description.strip()] if description and description.strip() else []),
        *([f"![Preview]({quote_url(preview)})"] if preview else []),
        _describe_kind(adapter),
        "## Triggers",
        _list_triggers(adapter, records),
        "## Without a trigger",
        _describe_locality(len(adapter), n_spans),
        "## Use",
        *_show_use(adapter, repo_id, records[0], use),
        "## Base model",
        _describe_base(adapter),
        "## Training",
        *_list_training(records, len(adapter)),
        "## Licence",
        *_list_licences(license, stated),
        "## File",
        f"- {adapter.nbytes():,} bytes\n- SHA-256, its identity: `{adapter.identity()}`",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(adapter: Adapter, records: Sequence[ConceptRecord], use: _Use | None, license: str | None) -> str:  # noqa: A002
    manifest = adapter.manifest
    fields: dict[str, str | list[str]] = _license_fields(license)
    if is_repo_id(manifest.base_model):  # the hub refuses what cannot be a repository
        fields |= {"base_model": manifest.base_model, "base_model_relation": "adapter"}
    fields["library_name"] = "engram"
    tags = ["engram", "concept-table", manifest.backbone]
    if use is not None:
        fields["pipeline_tag"] = use.task
        tags.append(use.task)
        if len(adapter) == 1 and use.pipeline is not None:  # the hub shows it as the trigger
            fields["instance_prompt"] = _clean(records[0].trigger)
    fields["tags"] = tags
    lines = []
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {_quoted(value)}")
        else:
            lines += [f"{name}:", *(f"  - {_quoted(item)}" for item in value)]
    return "\n".join(["---", *lines, "---"])


def _settle_license(given: str | None, stated: Counter[str | None]) -> str | None:
    """Return the licence of the whole; None when some concept states none."""
    if given is not None:
        return given
    return _SEVERAL if len(stated) > 1 and None not in stated else next(iter(stated)) if len(stated) == 1 else None


def _license_fields(license: str | None) -> dict[str, str | list[str]]:  # noqa: A002
    if license is None:
        return {}
    slug = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-.")
    for spelling in (license.strip().lower(), slug):
        if spelling in _KNOWN:
            return {"license": spelling}
    return {"license": "other", "license_name": slug[:64] or "custom"}


def _describe_kind(adapter: Adapter) -> str:
    what = "one concept" if len(adapter) == 1 else f"{len(adapter):,} concepts"
    return (
        f"An engram adapter with {what} for {_text(adapter.manifest.backbone)}. It teaches a frozen generator "
        "something new without changing its weights: where a trigger stands in the prompt, learned vectors are added "
        "to the text states at those tokens, and nowhere else."
    )


def _list_triggers(adapter: Adapter, records: Sequence[ConceptRecord]) -> str:
    counts = {name: np.bincount(table.concept, minlength=len(adapter)) for name, table in adapter.streams.items()}
    header = ["concept", "trigger", "rule", "activation", *(f"entries in {_text(name)}" for name in counts)]
    rows = [
        [
            _text(record.name),
            _code(record.trigger),
            record.rule,
            record.activation,
            *(f"{int(count[index]):,}" for count in counts.values()),
        ]
        for index, record in enumerate(records)
    ]
    more = len(adapter) - len(records)
    return _table(header, rows) + (f"\n\nand {more:,} more; `engram inspect --limit 0` lists all." if more else "")


def _describe_locality(n_concepts: int, n_spans: int) -> str:
    text = (
        "No weight of the base model is changed. Where nothing of the adapter fires, nothing is added, not even a "
        "zero: a prompt without a trigger gives exactly what the base model alone gives in the same environment, byte "
        "for byte. After unloading, the model is as it was. With a trigger in the prompt the output may change "
        "anywhere, because the model reads the changed states together with all others."
    )
    if n_spans:
        who = "The concept fires" if n_concepts == 1 else f"{n_spans:,} of {n_concepts:,} concepts fire"
        text += (
            f" {who} with the activation `spans`, on any registered piece of a trigger rather than the whole of it, "
            "and so may fire in unrelated text."
        )
    return text


def _show_use(adapter: Adapter, repo_id: str, record: ConceptRecord, use: _Use | None) -> Iterable[str]:
    manifest, prompt = adapter.manifest, _clean(record.trigger)
    if use is not None and use.pipeline is not None:
        known = is_repo_id(manifest.base_model)
        model = manifest.base_model if known else "path/to/the/base/model"
        yield "\n".join(
            [
                "```python",
                f"from diffusers import {use.pipeline}",
                "from engram_vision import load_engram, unload_engrams",
                "",
                f"pipeline = {use.pipeline}.from_pretrained({_quoted(model)})",
                f"load_engram(pipeline, {_quoted(repo_id)})",
                f"result = pipeline({_quoted(prompt)}).images[0]",
                "unload_engrams(pipeline)",
                "```",
            ]
        )
        yield "On the command line:"
    words = ["engram", "generate", "--backbone", manifest.backbone, "--adapter", repo_id, "--prompt", prompt]
    yield "\n".join(["```sh", shlex.join(words), "```"])
    yield (
        "Install engram from a checkout of its repository. Projects named engram, engram-core and engram-cli on the "
        "public package index are unrelated to it."
    )


def _describe_base(adapter: Adapter) -> str:
    manifest = adapter.manifest
    name = _text(manifest.base_model)
    if is_repo_id(manifest.base_model):
        name = f"[{name}](https://huggingface.co/{manifest.base_model})"
    lines = [f"- trained on {name}, backbone {_text(manifest.backbone)}"]
    if manifest.base_fingerprint is not None:
        lines.append(f"- fingerprint of its weights: `{manifest.base_fingerprint}`")
    rows = [
        [
            _text(name),
            str(spec.width),
            _text(spec.site),
            _text(spec.tokenizer.class_name),
            f"{spec.tokenizer.vocab_size:,}",
        ]
        for name, spec in manifest.streams.items()
    ]
    return "\n".join(lines) + "\n\n" + _table(["stream", "width", "site", "tokenizer", "vocabulary"], rows)


def _list_training(records: Sequence[ConceptRecord], n_concepts: int) -> Iterable[str]:
    """Say how concepts were trained; those trained alike are listed together."""
    recipes: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for record in records:
        key = json.dumps(dict(record.training), sort_keys=True)
        recipes.setdefault(key, (record.training, []))[1].append(record.name)
    for training, names in list(recipes.values())[:_RECIPES]:
        if len(recipes) > 1 or len(records) < n_concepts:
            few, more = names[:_RECIPES], len(names) - _RECIPES
            yield f"Settings of {', '.join(map(_text, few))}" + (f" and {more} more:" if more > 0 else ":")
        if not training:
            yield "The file records no settings."
            continue
        rows = [[_text(name), _text(_show_value(value))] for name, value in sorted(training.items())[:_SETTINGS]]
        left = len(training) - len(rows)
        yield _table(["setting", "value"], rows) + (f"\n\nand {left} more in the file." if left else "")
    others = len(recipes) - _RECIPES
    if others > 0 or len(records) < n_concepts:
        yield "`engram inspect --json` shows the settings of every concept."


def _list_licences(given: str | None, stated: Counter[str | None]) -> Iterable[str]:
    if given is not None:
        yield f"Stated by the publisher: {_text(given)}"
    if list(stated) == [None]:
        if given is None:
            yield "No licence was stated. Ask the publisher before you use the file."
    elif len(stated) == 1:
        (only,) = stated
        if only != given:
            yield f"Stated in the file: {_text(only or '')}"
    else:
        yield "The concepts in the file state licences of their own:"
        ordered = sorted(stated.items(), key=lambda item: (-item[1], item[0] or ""))
        lines = [
            f"- {number:,} concept{'' if number == 1 else 's'}: {'none stated' if name is None else _text(name)}"
            for name, number in ordered[:_LICENCES]
        ]
        more = len(ordered) - len(lines)
        yield "\n".join([*lines, *([f"- and {more:,} more licences"] if more else [])])
    yield "The base model has a licence of its own."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _show_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _clean(text: str) -> str:
    """Return a text on one line, without characters that do not print."""
    signs = (" " if sign.isspace() else sign for sign in text)
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in signs)


def _text(text: str) -> str:
    """Return a stranger's text as Markdown that shows it; something else must begin the line."""
    text = _clean(text)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return _INNER_UNDERSCORE.sub("_", text.translate(_REFERENCES))


def _code(text: str) -> str:
    """Return a stranger's text as Markdown that shows it as code, in full: it is there to be copied.

    Between backticks character references would not be read, and a table would still be cut at each pipe.
    """
    return f"<code>{_clean(text).translate(_REFERENCES)}</code>"


def _quoted(text: str) -> str:
    """Return a text as a string of YAML as well as of Python."""
    return json.dumps(_clean(text), ensure_ascii=False)
