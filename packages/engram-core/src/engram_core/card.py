"""The model card of an adapter on the Hugging Face hub: a README in Markdown with YAML front matter.

Whatever comes from the file is a stranger's text. In Markdown each of its signs becomes a character reference,
which a Markdown parser shows and never reads as markup; in YAML, Python and shell lines it is a quoted string.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_url

import numpy as np

from engram_core.adapter import Adapter
from engram_core.concept import ConceptRecord
from engram_core.manifest import Manifest
from engram_core.markdown import clean_text, make_table, quote_text, show_code, show_text, show_value
from engram_core.memory import MEMORY_KIND, HashedMemory

__all__ = ["CARD_MARK", "is_repo_id", "render_card"]

CARD_MARK = "<!-- Written by engram push, which replaces it; delete this line to keep a card of your own. -->"
"""Stands in every card written here, so that a card that somebody else wrote is recognised."""

_INSTALL = (
    "Install engram from a checkout of its repository. Projects named engram, engram-core and engram-cli on the "
    "public package index are unrelated to it."
)
_LISTED = 50  # concepts in the table
_LICENCES = 20
_RECIPES = 5  # groups of concepts that were trained alike
_SETTINGS = 40

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
    adapter: Adapter | HashedMemory,
    *,
    repo_id: str,
    license: str | None = None,  # noqa: A002 - as the record and the hub call it
    preview: str | None = None,
    description: str | None = None,
) -> str:
    """Return the model card of an adapter.

    Args:
        adapter: the adapter, concepts or a hashed memory; all of it is read, for its identity.
        repo_id: where it will be, `owner/name`.
        license: licence of the repository; None means the one that all concepts, or the memory, state. Where they
            state several, or none, the card says so.
        preview: path of a picture in the repository.
        description: Markdown of the publisher, inserted as it is.

    Returns:
        The text of README.md. It holds `CARD_MARK`.
    """
    manifest = adapter.manifest
    use = _USES.get(manifest.backbone)
    stated: Counter[str | None] = Counter()
    trigger = None
    if isinstance(adapter, HashedMemory):
        stated[_stated(adapter.record.license)] += 1
        kind, body, training = MEMORY_KIND, _describe_memory(adapter, repo_id), _list_settings(adapter.record.training)
    else:
        records: list[ConceptRecord] = []
        n_spans = 0
        for record in adapter.records():
            if len(records) < _LISTED:
                records.append(record)
            stated[_stated(record.license)] += 1
            n_spans += record.activation == "spans"
        if len(adapter) == 1 and use is not None and use.pipeline is not None:
            trigger = records[0].trigger  # the hub shows it
        kind, body = "concept-table", _describe_table(adapter, records, n_spans, repo_id, use)
        training = _list_training(records, len(adapter))
    sections = [
        _front_matter(manifest, kind, use, _settle_license(license, stated), trigger),
        CARD_MARK,
        f"# {show_text(repo_id.rpartition('/')[2])}",
        *([description.strip()] if description and description.strip() else []),
        *([f"![Preview]({quote_url(preview)})"] if preview else []),
        *body,
        "## Base model",
        _describe_base(manifest),
        "## Training",
        *training,
        "## Licence",
        *_list_licences(license, stated),
        "## File",
        f"- {adapter.nbytes():,} bytes\n- SHA-256, its identity: `{adapter.identity()}`",
    ]
    return "\n\n".join(sections) + "\n"


def _stated(license: str | None) -> str | None:  # noqa: A002
    return clean_text(license or "").strip() or None


def _front_matter(manifest: Manifest, kind: str, use: _Use | None, license: str | None, trigger: str | None) -> str:  # noqa: A002
    fields: dict[str, str | list[str]] = _license_fields(license)
    if is_repo_id(manifest.base_model):  # the hub refuses what cannot be a repository
        fields |= {"base_model": manifest.base_model, "base_model_relation": "adapter"}
    fields["library_name"] = "engram"
    tags = ["engram", kind, manifest.backbone]
    if use is not None:
        fields["pipeline_tag"] = use.task
        tags.append(use.task)
    if trigger is not None:
        fields["instance_prompt"] = clean_text(trigger)
    fields["tags"] = tags
    lines = []
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {quote_text(value)}")
        else:
            lines += [f"{name}:", *(f"  - {quote_text(item)}" for item in value)]
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


def _describe_table(
    adapter: Adapter, records: Sequence[ConceptRecord], n_spans: int, repo_id: str, use: _Use | None
) -> Iterable[str]:
    yield _describe_kind(adapter)
    yield "## Triggers"
    yield _list_triggers(adapter, records)
    yield "## Without a trigger"
    yield _describe_locality(len(adapter), n_spans)
    yield "## Use"
    yield from _show_use(adapter, repo_id, records[0], use)


def _describe_kind(adapter: Adapter) -> str:
    what = "one concept" if len(adapter) == 1 else f"{len(adapter):,} concepts"
    return (
        f"An engram adapter with {what} for {show_text(adapter.manifest.backbone)}. It teaches a frozen generator "
        "something new without changing its weights: where a trigger stands in the prompt, learned vectors are added "
        "to the text states at those tokens, and nowhere else."
    )


def _list_triggers(adapter: Adapter, records: Sequence[ConceptRecord]) -> str:
    counts = {name: np.bincount(table.concept, minlength=len(adapter)) for name, table in adapter.streams.items()}
    header = ["concept", "trigger", "rule", "activation", *(f"entries in {show_text(name)}" for name in counts)]
    rows = [
        [
            show_text(record.name),
            show_code(record.trigger),
            record.rule,
            record.activation,
            *(f"{int(count[index]):,}" for count in counts.values()),
        ]
        for index, record in enumerate(records)
    ]
    more = len(adapter) - len(records)
    return make_table(header, rows) + (f"\n\nand {more:,} more; `engram inspect --limit 0` lists all." if more else "")


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
    manifest, prompt = adapter.manifest, clean_text(record.trigger)
    if use is not None and use.pipeline is not None:
        known = is_repo_id(manifest.base_model)
        model = manifest.base_model if known else "path/to/the/base/model"
        yield "\n".join(
            [
                "```python",
                f"from diffusers import {use.pipeline}",
                "from engram_vision import load_engram, unload_engrams",
                "",
                f"pipeline = {use.pipeline}.from_pretrained({quote_text(model)})",
                f"load_engram(pipeline, {quote_text(repo_id)})",
                f"result = pipeline({quote_text(prompt)}).images[0]",
                "unload_engrams(pipeline)",
                "```",
            ]
        )
        yield "On the command line:"
    words = ["engram", "generate", "--backbone", manifest.backbone, "--adapter", repo_id, "--prompt", prompt]
    yield "\n".join(["```sh", shlex.join(words), "```"])
    yield _INSTALL


def _describe_memory(memory: HashedMemory, repo_id: str) -> Iterable[str]:
    settings, manifest = memory.settings, memory.manifest
    layers = ", ".join(map(str, settings.layer_ids))
    yield (
        f"An engram adapter with a hashed memory of {memory.n_parameters():,} learned values for "
        f"{show_text(manifest.backbone)}. It adapts a frozen language model without changing its weights: n-grams of "
        f"the tokens read so far address learned vectors, which are added to the hidden states before decoder layers "
        f"{layers}, as far as gates open."
    )
    yield "## Settings"
    rows = [[show_text(name), show_text(show_value(value))] for name, value in sorted(settings.to_json().items())]
    yield make_table(["setting", "value"], rows)
    yield (
        "It acts on every text; there is no trigger. After unloading, the model is as it was. Several memories act "
        "side by side: load each."
    )
    yield "## Use"
    model = manifest.base_model if is_repo_id(manifest.base_model) else "path/to/the/base/model"
    yield "\n".join(
        [
            "```python",
            "from engram_llm import load_memory, unload_memories",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({quote_text(model)})",
            f"tokenizer = AutoTokenizer.from_pretrained({quote_text(model)})",
            f"load_memory(model, {quote_text(repo_id)}, tokenizer=tokenizer)",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
            "unload_memories(model)",
            "```",
        ]
    )
    yield "On the command line:"
    words = ["engram", "generate", "--backbone", manifest.backbone, "--adapter", repo_id]
    yield "\n".join(["```sh", shlex.join([*words, "--prompt", "Once upon a time", "--compare"]), "```"])
    yield _INSTALL


def _describe_base(manifest: Manifest) -> str:
    name = show_text(manifest.base_model)
    if is_repo_id(manifest.base_model):
        name = f"[{name}](https://huggingface.co/{manifest.base_model})"
    lines = [f"- trained on {name}, backbone {show_text(manifest.backbone)}"]
    if manifest.base_fingerprint is not None:
        lines.append(f"- fingerprint of its weights: `{manifest.base_fingerprint}`")
    rows = [
        [
            show_text(name),
            str(spec.width),
            show_text(spec.site) + (f", {len(spec.sites)} blocks" if spec.sites else ""),
            show_text(spec.tokenizer.class_name),
            f"{spec.tokenizer.vocab_size:,}",
        ]
        for name, spec in manifest.streams.items()
    ]
    return "\n".join(lines) + "\n\n" + make_table(["stream", "width", "site", "tokenizer", "vocabulary"], rows)


def _list_training(records: Sequence[ConceptRecord], n_concepts: int) -> Iterable[str]:
    """Say how concepts were trained; those trained alike are listed together."""
    recipes: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for record in records:
        key = json.dumps(dict(record.training), sort_keys=True)
        recipes.setdefault(key, (record.training, []))[1].append(record.name)
    for training, names in list(recipes.values())[:_RECIPES]:
        if len(recipes) > 1 or len(records) < n_concepts:
            few, more = names[:_RECIPES], len(names) - _RECIPES
            yield f"Settings of {', '.join(map(show_text, few))}" + (f" and {more} more:" if more > 0 else ":")
        yield from _list_settings(training)
    others = len(recipes) - _RECIPES
    if others > 0 or len(records) < n_concepts:
        yield "`engram inspect --json` shows the settings of every concept."


def _list_settings(training: Mapping[str, Any]) -> Iterable[str]:
    if not training:
        yield "The file records no settings."
        return
    rows = [[show_text(name), show_text(show_value(value))] for name, value in sorted(training.items())[:_SETTINGS]]
    left = len(training) - len(rows)
    yield make_table(["setting", "value"], rows) + (f"\n\nand {left} more in the file." if left else "")


def _list_licences(given: str | None, stated: Counter[str | None]) -> Iterable[str]:
    if given is not None:
        yield f"Stated by the publisher: {show_text(given)}"
    if list(stated) == [None]:
        if given is None:
            yield "No licence was stated. Ask the publisher before you use the file."
    elif len(stated) == 1:
        (only,) = stated
        if only != given:
            yield f"Stated in the file: {show_text(only or '')}"
    else:
        yield "The concepts in the file state licences of their own:"
        ordered = sorted(stated.items(), key=lambda item: (-item[1], item[0] or ""))
        lines = [
            f"- {number:,} concept{'' if number == 1 else 's'}: {'none stated' if name is None else show_text(name)}"
            for name, number in ordered[:_LICENCES]
        ]
        more = len(ordered) - len(lines)
        yield "\n".join([*lines, *([f"- and {more:,} more licences"] if more else [])])
    yield "The base model has a licence of its own."
