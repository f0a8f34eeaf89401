"""What other packages may rely on: the names, their documentation, and a light import."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import engram_core

PUBLIC = [
    "CONTEXTS",
    "DEFAULT_MAX_NGRAM",
    "NO_MATCHES",
    "ON_CONFLICT",
    "Activation",
    "Adapter",
    "AdapterFormatError",
    "AdapterReadError",
    "AdapterWriteError",
    "Backbone",
    "BackboneLoadError",
    "BackboneNotFoundError",
    "Concept",
    "ConceptNotFoundError",
    "ConceptRecord",
    "ConceptStream",
    "ConceptsTrainingBackbone",
    "Conflict",
    "ConflictError",
    "ConvertSettings",
    "ConvertingBackbone",
    "ClipMakingBackbone",
    "ClipsReport",
    "DemoReport",
    "DemonstratingBackbone",
    "Edit",
    "Editor",
    "EngramError",
    "EvaluateReport",
    "EvaluatingBackbone",
    "Firing",
    "GenerateReport",
    "Generated",
    "GeneratedText",
    "GeneratingBackbone",
    "HashedMemory",
    "IncompatibleAdaptersError",
    "InputError",
    "InstalledBackbone",
    "Interference",
    "Manifest",
    "Matcher",
    "Matches",
    "Measure",
    "MemoryRecord",
    "MemorySettings",
    "MergeReport",
    "MissingSettingsError",
    "NgramHash",
    "OnConflict",
    "Overlap",
    "PromptAudit",
    "PromptReport",
    "Registry",
    "Residual",
    "Rule",
    "SilentTrigger",
    "SkippedContext",
    "StreamReading",
    "StreamSpec",
    "StreamTable",
    "StreamTokenizer",
    "TargetExistsError",
    "TextReport",
    "TokenIds",
    "TokenizerSpec",
    "TrainReport",
    "TrainingBackbone",
    "TrainingError",
    "TriggerError",
    "UsedAdapter",
    "Variant",
    "VectorType",
    "Watcher",
    "audit_lines",
    "build_registry",
    "check_tokenizers",
    "extract_concepts",
    "extract_file",
    "find_conflicts",
    "find_interference",
    "fingerprint_tokenizer",
    "fired_spans",
    "list_backbones",
    "load_backbone",
    "merge_adapters",
    "merge_files",
    "open_adapter",
    "open_any",
    "open_memory",
    "wrap_tokenizer",
    "write_memory",
]

HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "diffusers", "tqdm", "requests", "PIL"}


def test_the_public_names_are_these():
    # A name that leaves this list breaks somebody's code; one that joins it stays.
    assert sorted(engram_core.__all__) == sorted(PUBLIC)


def test_they_are_listed_constants_first_then_types_then_functions():
    def rank(name):
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert list(engram_core.__all__) == sorted(engram_core.__all__, key=rank)


@pytest.mark.parametrize("name", engram_core.__all__)
def test_each_can_be_imported(name):
    assert getattr(engram_core, name) is not None


def test_nothing_else_is_public():
    modules = {name for name, value in vars(engram_core).items() if inspect.ismodule(value)}
    public = {name for name in vars(engram_core) if not name.startswith("_")} - modules
    assert public == set(engram_core.__all__)


def documented():
    """(name, object) of every public class and function, and of every public method."""
    for name in engram_core.__all__:
        value = getattr(engram_core, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value) and value.__module__.startswith("engram_core"):
            for attribute, member in vars(value).items():
                plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if not attribute.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
                    yield f"{name}.{attribute}", plain


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in documented()])
def test_each_is_documented(name, value):
    text = inspect.getdoc(value)
    assert text
    assert text.split("\n")[0].endswith((".", ":")), f"{name}: {text}"
    # What dataclasses write by themselves is no documentation.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("module", sorted(Path(engram_core.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_each_module_says_what_it_is_about(module):
    source = module.read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert "import *" not in source


def test_the_package_is_typed():
    assert (Path(engram_core.__file__).parent / "py.typed").exists()


def loaded_by(code):
    """The modules that a fresh interpreter holds after running some code."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_loads_numpy_and_safetensors_alone():
    loaded = loaded_by("import engram_core")
    assert not loaded & HEAVY
    assert "engram_core.torch" not in loaded
    assert "engram_core.huggingface" not in loaded
    before = {name.partition(".")[0] for name in loaded_by("import numpy, safetensors")}
    added = {name.partition(".")[0] for name in loaded} - before - sys.stdlib_module_names
    assert added == {"engram_core"}


def test_no_module_imports_the_extras_by_itself():
    folder = Path(engram_core.__file__).parent
    modules = [path.stem for path in (*folder.glob("*.py"), *(init.parent for init in folder.glob("*/__init__.py")))]
    assert {"torch", "huggingface", "matcher"} <= set(modules)
    others = sorted(set(modules) - {"torch", "__init__"})
    loaded = loaded_by("\n".join(f"import engram_core.{name}" for name in others))
    assert not loaded & HEAVY
    assert "engram_core.torch" not in loaded


def test_the_torch_module_has_names_of_its_own():
    pytest.importorskip("torch")
    import engram_core.torch as twin

    assert list(twin.__all__) == [
        "Delta",
        "Residual",
        "TrainableConcept",
        "TrainableStream",
        "add_delta",
        "entry_terms",
        "match_tensor",
        "mean_norm",
        "sum_terms",
    ]
    for name in twin.__all__:
        assert inspect.getdoc(getattr(twin, name))


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert engram_core.__version__ == version("engram-core")
