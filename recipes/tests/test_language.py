"""The recipes of the language-model experiments hold the published values, and run on data in the same columns."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars

from engram_core import open_memory
from engram_core.settings import Layer, resolve_settings
from engram_llm.qwen3 import QWEN3
from engram_llm.settings import EvaluateSettings, TrainSettings
from recipes.language import biomedical, function_calls, settings_study
from recipes.language.published import SAMPLES_A_STEP, count_steps

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

FOLDER = Path(__file__).parents[1] / "language"
# AutoArk/TinyEngram, train/*.sh, train/*.py, engram.py and doc/experiments/*.md.
COMMON = {
    "model": "Qwen/Qwen3-0.6B",
    "packing": False,
    "schedule": "cosine",
    "weight_decay": 0.005,
    "adam_beta2": 0.95,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "max_grad_norm": 1.0,
}
MEMORY = {"method": "engram", "kernel_size": 4, "pad_id": 2, "hash_seed": 0, "init_std": 1.0, "engram_warmup_steps": 0}
PUBLISHED = {
    "biomedical": COMMON
    | MEMORY
    | {
        "engram_vocab_size": (20000, 2000),
        "max_ngram_size": 3,
        "n_embed_per_ngram": 512,
        "n_head_per_ngram": 8,
        "layer_ids": (5, 7, 13, 17),
        "max_length": 1500,
        "learning_rate": 1e-5,
        "table_rate": 1e-5,
        "evaluate_every": 100,
    },
    "function-calls": COMMON
    | MEMORY
    | {
        "engram_vocab_size": (500, 100, 100),
        "max_ngram_size": 4,
        "n_embed_per_ngram": 1024,
        "n_head_per_ngram": 16,
        "layer_ids": (1, 2, 3, 4),
        "max_length": 2048,
        "learning_rate": 2e-5,
        "table_rate": 2e-5,
        "evaluate_every": 50,
    },
    "function-calls-lora": COMMON
    | {
        "method": "lora",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "max_length": 2048,
        "learning_rate": 1e-5,
        "evaluate_every": 50,
    },
}
# What a machine without a GPU can do in seconds, on the checkpoint that ships.
SMALL = {
    "model": "tiny",
    "precision": "fp32",
    "device": "cpu",
    "steps": 2,
    "warm_up": 1,
    "batch_size": 2,
    "accumulate": 2,
    "max_length": 48,
    "evaluate_every": 1,
    "gradient_checkpointing": False,
}
CALL = '<functioncall> {"name": "get_weather", "arguments": {"city": "Oslo"}}'
CHAT = f"""USER: Hello there


ASSISTANT: Hi! How can I help? <|endoftext|>


USER: What is the weather in Oslo?


ASSISTANT: {CALL} <|endoftext|>


FUNCTION RESPONSE: {{"degrees": 3}}


ASSISTANT: It has 3 degrees. <|endoftext|>"""
SYSTEM = "SYSTEM: You are a helpful assistant with access to the following functions. get_weather(city)"


@pytest.fixture(autouse=True)
def quiet():
    disable_progress_bars()


def tables(name):
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def train(name, **changes):
    values = tables(name)["train"]
    assert values.pop("backbone") == "qwen3"
    layers = [Layer(source="recipe", values=values), Layer(source="test", values=SMALL | changes)]
    return QWEN3.train(resolve_settings(TrainSettings, layers))


def evaluate(name, **changes):
    values = tables(name)["eval"]
    assert values.pop("backbone") == "qwen3"
    assert values.pop("tasks")
    small = {"model": "tiny", "precision": "fp32", "device": "cpu", "limit": 3}
    layers = [Layer(source="recipe", values=values), Layer(source="test", values=small | changes)]
    return QWEN3.evaluate(resolve_settings(EvaluateSettings, layers))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_hold_the_published_values(name):
    values = tables(name)["train"]
    values.pop("backbone")
    settings = resolve_settings(TrainSettings, [Layer(source="recipe", values=values)])
    assert {field: getattr(settings, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert settings.batch_size * settings.accumulate == SAMPLES_A_STEP == 192


def test_the_study_holds_the_published_rows():
    rows = settings_study.ROWS
    assert {name: row.loss for name, row in rows.items()} == {
        "early": 0.1850,
        "middle": 0.1877,
        "late": 0.3386,
        "width-512": 0.2143,
        "heads-8": 0.1901,
        "rows-500-100": 0.1982,
        "rows-500-500": 0.1913,
        "rows-1000-200": 0.1936,
        "rows-500-500-500": 0.1823,
    }
    published = PUBLISHED["function-calls"]
    assert rows["early"].settings == {name: published[name] for name in rows["early"].settings}
    assert rows["rows-500-100"].settings["max_ngram_size"] == 3
    assert rows["width-512"].settings["n_head_per_ngram"] == 8


def test_steps_follow_from_rows():
    assert count_steps(1920, 7, 0.03) == {"steps": 70, "warm_up": 3}
    assert count_steps(193, 1, 0.005) == {"steps": 2, "warm_up": 1}


def make_articles():
    """Rows with the columns of Biomed-Enriched."""
    return [
        {
            "article_id": f"PMC{number}",
            "text": f"Article {number}: a fever is a rise in the temperature of the body above the usual range.",
            "language": "en" if number % 13 else "fr",
            "domain": "biomedical" if number % 7 else "other",
            "document_type": "study",
            "educational_score": None if number == 1 else (1 + number % 5) * 1.0 + 0.25 * (number % 5 == 4),
        }
        for number in range(260)
    ]


def test_articles_are_divided_by_language_domain_and_score():
    rows = make_articles()
    learned, others = biomedical.divide(Dataset.from_list(rows))
    fits = [
        row for row in rows if row["language"] == "en" and row["domain"] == "biomedical" and row["educational_score"]
    ]
    assert sorted(learned["text"]) == sorted(row["text"] for row in fits if row["educational_score"] > 4)
    assert sorted(others["text"]) == sorted(row["text"] for row in fits if row["educational_score"] < 4)
    assert any(row["educational_score"] == 4.0 for row in fits)  # belongs to neither
    many = [row | {"educational_score": 1.0} for row in rows * 2]
    assert len(biomedical.divide(Dataset.from_list(many))[1]) == 200


def test_the_biomedical_experiment_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(make_articles()).to_parquet("commercial.parquet")
    biomedical.main(["commercial.parquet"])
    said = capsys.readouterr().out
    assert "engram train --config recipes/language/biomedical.toml --steps 1 --warm-up 1" in said
    report = train("biomedical", layer_ids=[1, 3], engram_vocab_size=[200, 20])
    memory = open_memory(report.output)
    assert memory.settings.layer_ids == (1, 3)
    assert memory.settings.pad_id == 2
    measure = evaluate("biomedical").measures[0]
    assert measure.values.keys() == {"base", "engram"}
    assert measure.subject == str(Path("biomedical/eval.jsonl"))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"system": SYSTEM, "chat": CHAT}, (SYSTEM, "What is the weather in Oslo?", CALL)),
        ({"system": f"{SYSTEM} with no access to external functions", "chat": CHAT}, None),
        ({"system": SYSTEM, "chat": "USER: Hello\n\nASSISTANT: Hi <|endoftext|>"}, None),
        ({"system": SYSTEM, "chat": None}, None),
        ({"system": SYSTEM, "chat": f"ASSISTANT: {CALL}"}, None),
        ({"system": SYSTEM, "chat": f"USER: a USER: b ASSISTANT: {CALL} USER: c"}, (SYSTEM, "b", CALL)),
        (
            {"system": SYSTEM, "chat": "USER: a ASSISTANT: <tool_code>x</tool_code>"},
            (SYSTEM, "a", "<tool_code>x</tool_code>"),
        ),
    ],
)
def test_calls_are_found_in_conversations(row, found):
    assert function_calls.find_call(row) == found


def test_calls_are_written_in_chatml():
    assert function_calls.write_call("offer", "question", "call") == (
        "<|im_start|>system\noffer<|im_end|>\n<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\ncall<|im_end|>"
    )


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The folder in which the data of the function-call experiment lie."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"system": SYSTEM, "chat": CHAT.replace("Oslo", f"town {number}")}
        if number % 4
        else {"system": "x", "chat": "y"}
        for number in range(160)
    ]
    Path("glaive-function-calling-v2.json").write_text(json.dumps(rows))
    function_calls.main(["glaive-function-calling-v2.json"])
    return tmp_path


def test_the_function_call_experiment_runs(calls, capsys):
    assert len(Path("function-calls/train.jsonl").read_text().splitlines()) == 118
    assert len(Path("function-calls/eval.jsonl").read_text().splitlines()) == 2
    small = {"n_embed_per_ngram": 64, "layer_ids": [1, 2]}
    assert open_memory(train("function-calls", **small).output).settings.max_ngram_size == 4
    lora = train("function-calls-lora").output
    assert json.loads((lora / "adapter_config.json").read_text())["r"] == 16
    values = evaluate("function-calls").measures[0].values
    assert values.keys() == {"base", "lora", "engram", "both"}
    assert len(set(values.values())) == 4


def test_the_settings_study_runs(calls, monkeypatch, capsys):
    small = {"n_embed_per_ngram": 64, "layer_ids": (1, 2)} | SMALL
    real = settings_study.run_row
    monkeypatch.setattr(
        settings_study,
        "run_row",
        lambda name, row, folder, options, tasks: real(name, row, folder, small | options, tasks),
    )
    words = ["--steps", "2", "--warm-up", "1", "--row", "early", "--row", "rows-500-100", "--no-tasks"]
    settings_study.main(words)
    found = json.loads(Path("study/study.json").read_text())
    assert list(found) == ["early", "rows-500-100"]
    assert all(figures["loss"] > 0 for figures in found.values())
    assert open_memory("study/rows-500-100.safetensors").settings.max_ngram_size == 3
    assert "published loss 0.185, MC1 0.2644, MC2 0.434" in capsys.readouterr().out
    settings_study.main(words)  # nothing is left to do
    assert "published" not in capsys.readouterr().out
