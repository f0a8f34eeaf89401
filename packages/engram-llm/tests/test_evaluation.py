"""Perplexity by hand, whatever the batches; and tasks of lm-evaluation-harness where it is installed."""

import dataclasses
import gzip
import importlib.util
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from llm_folders import POSITIONS, TEXTS, make_folder, make_memory_file

from engram_core import EvaluatingBackbone, IncompatibleAdaptersError, InputError, TargetExistsError, Watcher
from engram_core.settings import Layer, resolve_settings
from engram_llm.harness import run_tasks
from engram_llm.loading import load_memory
from engram_llm.models import load_model, load_tokenizer
from engram_llm.perplexity import encode_document, plan_windows
from engram_llm.quiet import quiet_libraries
from engram_llm.qwen3 import QWEN3
from engram_llm.settings import EvaluateSettings

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
LONG = "Once upon a time there was a fox by the sea, and the dog sleeps on. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def base(folder):
    return make_folder(folder / "model")


@pytest.fixture(scope="module")
def a(folder, base):
    return make_memory_file(folder / "a.safetensors", base)


@pytest.fixture(scope="module")
def b(folder, base):
    return make_memory_file(folder / "b.safetensors", base, seed=1, layer_ids=(0, 3))


@pytest.fixture
def settings(base):
    def settings(*adapters, **fields):
        defaults = {"precision": "fp32", "device": "cpu", "window": 40}
        return EvaluateSettings(adapters=tuple(map(str, adapters)), model=str(base), **defaults | fields)

    return settings


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [*TEXTS, LONG, "x", ""]
    file.write_text("".join(json.dumps({"text": row, "id": 3}) + "\n" for row in rows), encoding="utf-8")
    return file


def figures(report):
    return {(measure.subject, measure.metric): measure.values for measure in report.measures}


def by_hand(base, texts, *memories, window, stride):
    """Return nats, tokens and bytes: for each token one pass over the window it is scored in."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    for file, strength in memories:
        load_memory(model, file, strength=strength)
    nats, tokens, n_bytes = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for place in range(1, len(ids)):
            begin = 0
            while begin + window <= place:  # the first window that holds the token
                begin += stride
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin : place + 1]]), use_cache=False).logits[0, -2].double()
            nats -= float(logits.log_softmax(-1)[ids[place]])
            tokens += 1
        if len(ids) > 1:
            n_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return nats, tokens, n_bytes


def test_it_evaluates():
    assert isinstance(QWEN3, EvaluatingBackbone)
    assert QWEN3.default_evaluate_settings("tiny") == {"precision": "fp32"}


@pytest.mark.parametrize(("window", "stride"), [(40, 8), (30, 29), (POSITIONS, None)])
def test_perplexity_is_what_it_is_by_hand(base, settings, texts, a, b, window, stride):
    report = QWEN3.evaluate(settings(a, f"{b}@0.5", texts=(texts,), window=window, stride=stride))
    found = figures(report)
    for variant, memories in (("base", ()), ("engram", ((a, 1.0), (b, 0.5)))):
        rows = [*TEXTS, LONG]
        nats, tokens, n_bytes = by_hand(base, rows, *memories, window=window, stride=stride or window // 2)
        subject = str(texts)
        assert found[subject, "nats per token"][variant] == pytest.approx(nats / tokens, abs=1e-5)
        assert found[subject, "perplexity"][variant] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found[subject, "nats per byte"][variant] == pytest.approx(nats / n_bytes, abs=1e-5)
        counts = report.details["texts"][subject]
        assert (counts["tokens"], counts["bytes"]) == (tokens, n_bytes)
    assert (counts["documents"], counts["skipped_documents"]) == (7, 2)
    assert report.details["stride"] == (stride or window // 2)


def test_batches_and_their_padding_change_nothing(settings, texts, a):
    alone = figures(QWEN3.evaluate(settings(a, texts=(texts,), batch_size=1)))
    for size in (3, 64):
        together = figures(QWEN3.evaluate(settings(a, texts=(texts,), batch_size=size)))
        for key, values in alone.items():
            for variant, value in values.items():
                assert together[key][variant] == pytest.approx(value, rel=1e-5)


def test_windows_score_each_token_once():
    for length in range(60):
        for window, stride in ((10, 1), (10, 5), (10, 9), (2, 1), (64, 32)):
            ids = list(range(length))
            scored = [token for part in plan_windows(ids, window, stride) for token in part.ids[-part.scored :]]
            assert scored == ids[1:]
            for part in plan_windows(ids, window, stride):
                assert 0 < part.scored < len(part.ids) <= window
                assert len(part.ids) - part.scored >= min(window - stride, part.ids[-part.scored])


def test_bytes_leave_out_what_is_not_scored(base):
    tokenizer = load_tokenizer(str(base))
    document = encode_document("The dog", tokenizer)
    first = tokenizer.decode(document.ids[:1])
    assert document.n_bytes == len("The dog") - len(first)
    assert encode_document("", tokenizer).n_bytes == 0


def test_what_a_tokenizer_puts_in_front_is_context(base, tmp_path):
    content = json.loads((base / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    document = encode_document("The dog", load_tokenizer(str(tmp_path)))
    assert document.ids[0] == 0
    assert document.n_bytes == len("The dog")


def test_difference_and_identity_are_reported(settings, texts, a, b, tmp_path):
    output = tmp_path / "figures.json"
    report = QWEN3.evaluate(settings(a, f"{b}@2", texts=(texts,), output=output))
    measure = report.measures[0]
    assert measure.difference == measure.values["engram"] - measure.values["base"] != 0
    assert measure.higher_is_better is False
    assert [(one.file, one.strength) for one in report.adapters] == [(str(a), 1.0), (str(b), 2.0)]
    assert json.loads(output.read_text()) == report.to_json()
    with pytest.raises(TargetExistsError, match=r"figures.json: exists; pass --force"):
        QWEN3.evaluate(settings(texts=(texts,), output=output))
    QWEN3.evaluate(settings(texts=(texts,), output=output), overwrite=True)
    assert json.loads(output.read_text())["adapters"] == []


def test_the_base_model_can_be_left_out(settings, texts, a):
    both = QWEN3.evaluate(settings(a, texts=(texts,))).measures[0]
    alone = QWEN3.evaluate(settings(a, texts=(texts,), base=False)).measures[0]
    assert alone.values == {"engram": both.values["engram"]}
    assert alone.difference is None
    plain = QWEN3.evaluate(settings(texts=(texts,))).measures[0]
    assert plain.values == {"base": both.values["base"]}


def test_a_lora_is_measured_beside(base, settings, texts, a, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with quiet_libraries():
        tuned = get_peft_model(load_model(str(base)), config)
        tuned.save_pretrained(tmp_path / "lora")
    values = QWEN3.evaluate(settings(a, texts=(texts,), lora=tmp_path / "lora")).measures[0].values
    assert list(values) == ["base", "lora", "engram", "both"]
    assert len(set(values.values())) == 4
    plain = QWEN3.evaluate(settings(a, texts=(texts,))).measures[0].values
    assert {name: values[name] for name in plain} == plain
    merged = tmp_path / "merged"
    with quiet_libraries():
        tuned.merge_and_unload().save_pretrained(merged)
    load_tokenizer(str(base)).save_pretrained(merged)
    other = QWEN3.evaluate(dataclasses.replace(settings(a, texts=(texts,), force_base=True), model=str(merged)))
    assert other.measures[0].values["base"] == pytest.approx(values["lora"], abs=1e-5)
    assert other.measures[0].values["engram"] == pytest.approx(values["both"], abs=1e-5)
    with pytest.raises(InputError, match=r"is no folder of a PEFT adapter; it has no adapter_config\.json"):
        QWEN3.evaluate(settings(texts=(texts,), lora=tmp_path))


def test_the_same_texts_give_the_same_figures_from_any_file(settings, tmp_path):
    rows = [{"body": text} for text in TEXTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    split = tmp_path / "split"
    split.mkdir()
    for number, text in enumerate(TEXTS):
        (split / f"{number}.txt").write_text(text, encoding="utf-8")
    places = (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet", split)
    report = QWEN3.evaluate(settings(texts=places, text_column="body"))
    values = [measure.values["base"] for measure in report.measures if measure.metric == "perplexity"]
    assert len(values) == 4
    assert len(set(values)) == 1
    few = QWEN3.evaluate(settings(texts=places[:1], text_column="body", limit=2))
    assert few.details["texts"][str(places[0])]["documents"] == 2


def test_progress_is_told(settings, texts, a):
    class Ears(Watcher):
        def __init__(self):
            self.begun, self.done = [], []

        def begin(self, title, total=None, done=0):
            self.begun.append((title, total))

        def advance(self, done, figures=None):
            self.done.append(done)

    ears = Ears()
    report = QWEN3.evaluate(settings(a, texts=(texts,)), watcher=ears)
    windows = report.details["texts"][str(texts)]["windows"]
    assert ears.begun == [(f"loading {settings().model}", None), (f"reading {texts}", 2 * windows)]
    assert ears.done[-1] == 2 * windows
    assert ears.done == sorted(ears.done)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"body": "x"}\n', "texts.jsonl:1: lacks the column 'text'; it has 'body'"),
        ('{"text": 3}\n', "texts.jsonl:1: text is 3, expected a text"),
        ('{"text": "a"}\nnothing\n', "texts.jsonl:2: is not JSON"),
        ("\n", "holds no text"),
        ('{"text": "x"}\n', "no document has two tokens"),
    ],
)
def test_files_that_hold_no_texts_are_refused(settings, tmp_path, content, said):
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(InputError) as refused:
        QWEN3.evaluate(settings(texts=(tmp_path / "texts.jsonl",)))
    assert said in str(refused.value)


def test_windows_that_do_not_fit_are_refused(settings, texts):
    with pytest.raises(InputError, match=f"window is {POSITIONS + 1}, .* reads at most {POSITIONS} tokens"):
        QWEN3.evaluate(settings(texts=(texts,), window=POSITIONS + 1))
    with pytest.raises(InputError, match=f"stride is 200, expected less than the window, which is {POSITIONS}"):
        QWEN3.evaluate(settings(texts=(texts,), window=None, stride=200))


def test_a_model_without_numbers_is_noticed(tmp_path, settings, texts):
    broken = make_folder(tmp_path / "broken")
    model = load_model(str(broken))
    model.model.norm.weight.data[0] = np.nan
    model.save_pretrained(broken)
    with pytest.raises(InputError, match="log-likelihood is nan; try precision fp32"):
        QWEN3.evaluate(dataclasses.replace(settings(texts=(texts,)), model=str(broken)))


def test_memories_of_other_models_are_refused(tmp_path, settings, texts, a):
    wide = make_folder(tmp_path / "wide", width=40)
    with pytest.raises(IncompatibleAdaptersError, match="has width 32, the model's hidden states have 40"):
        QWEN3.evaluate(dataclasses.replace(settings(a, texts=(texts,)), model=str(wide)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "there is nothing to measure on; give --text or --tasks"),
        ({"texts": ["x"], "window": 1}, "window is 1, expected at least 2"),
        ({"texts": ["x"], "window": 8, "stride": 8}, "stride is 8, expected less than the window, which is 8"),
        ({"texts": ["x"], "limit": 0}, "limit is 0, expected at least 1"),
        ({"texts": ["x"], "base": False}, "nothing to measure without the base model; give --adapter"),
    ],
)
def test_wrong_settings_are_told(fields, said):
    with pytest.raises(InputError) as refused:
        resolve_settings(EvaluateSettings, [Layer(source="test", values=fields)])
    assert said in str(refused.value)


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_tasks_without_the_harness_say_how_to_get_it(settings):
    with pytest.raises(InputError) as refused:
        QWEN3.evaluate(settings(tasks=("mmlu",)))
    assert "lm-evaluation-harness, which is not installed" in str(refused.value)
    assert "--extra evaluation" in str(refused.value)


@pytest.fixture
def tasks(tmp_path):
    """Two tasks that need no network."""
    rows = [
        {"question": "Who kept the lamp by the sea?", "choices": ["Brindle", "The fox", "A dog"], "answer": 0},
        {"question": "What is a fever?", "choices": ["a rise in the temperature of the body", "a lamp"], "answer": 0},
        {"question": "Who jumps over the dog?", "choices": ["nobody at all", "the quick brown fox"], "answer": 1},
    ]
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {place / "data.jsonl"}
test_split: train
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
    (place / "choices.yaml").write_text(
        f"task: toy_choices{common}output_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (place / "answers.yaml").write_text(
        f"task: toy_answers{common}output_type: generate_until\n"
        'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return place


@pytest.mark.skipif(not HAS_HARNESS, reason="needs lm-evaluation-harness")
@pytest.mark.filterwarnings("ignore")
class TestHarness:
    def test_tasks_are_measured_with_and_without_memories(self, settings, tasks, a, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        report = QWEN3.evaluate(
            settings(a, tasks=("toy_choices", "toy_answers"), task_folder=tasks, limit=3, batch_size=2)
        )
        found = figures(report)
        assert found.keys() == {("toy_choices", "acc"), ("toy_answers", "exact_match")}
        assert found["toy_choices", "acc"].keys() == {"base", "engram"}
        assert report.details["tasks"] == {"toy_choices": {"samples": 3}, "toy_answers": {"samples": 3}}
        assert all(measure.higher_is_better for measure in report.measures)

    def test_log_likelihoods_are_those_of_full_passes(self, base, a, b):
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        pairs = [("Once upon a time", " there was a fox"), ("The dog", " sleeps on by the sea"), ("A fever is", " a")]
        asked = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(pairs)
        ]
        model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
        load_memory(model, a)
        load_memory(model, b, strength=0.5)
        for size in (1, 3):
            found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size).loglikelihood(asked)
            for (context, rest), (value, _) in zip(pairs, found, strict=True):
                ids, start = tokenizer(context + rest)["input_ids"], len(tokenizer(context)["input_ids"])
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
                expected = sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))
                assert value == pytest.approx(expected, abs=1e-4)

    def test_batches_change_nothing(self, base, a, tasks):
        tokenizer = load_tokenizer(str(base))
        results = []
        for size in (1, 3):
            model = load_model(str(base))
            load_memory(model, a)
            results.append(run_tasks(model, tokenizer, ["toy_choices"], folder=tasks, batch_size=size))
        assert results[0] == results[1]

    def test_unknown_tasks_are_refused_before_anything_is_loaded(self, settings, tasks):
        with pytest.raises(InputError, match="has no task 'toy_choicez'; did you mean toy_choices"):
            QWEN3.evaluate(settings(tasks=("toy_choicez",), task_folder=tasks))
        with pytest.raises(InputError, match="is no folder with tasks"):
            QWEN3.evaluate(settings(tasks=("x",), task_folder=tasks / "absent"))
