"""engram_core: exact, mergeable memories for frozen generators, without PyTorch.

Build a concept's registry, match it in token ids, compute its residuals, merge and extract adapters, and
read and write the adapter file. Needs NumPy and safetensors. `engram_core.torch` adds tensors (extra `torch`).
"""

from engram_core.adapter import Adapter, open_adapter
from engram_core.audit import (
    Firing,
    Interference,
    PromptAudit,
    PromptReport,
    SilentTrigger,
    StreamReading,
    audit_lines,
    check_tokenizers,
    find_interference,
    fired_spans,
)
from engram_core.backbones import (
    Backbone,
    ConvertingBackbone,
    ConvertSettings,
    DemonstratingBackbone,
    DemoReport,
    Generated,
    GenerateReport,
    GeneratingBackbone,
    InstalledBackbone,
    TrainingBackbone,
    TrainReport,
    Watcher,
    list_backbones,
    load_backbone,
)
from engram_core.concept import Activation, Concept, ConceptRecord, ConceptStream, Overlap, Rule, VectorType
from engram_core.conflicts import ON_CONFLICT, Conflict, OnConflict, find_conflicts
from engram_core.errors import (
    AdapterFormatError,
    AdapterReadError,
    AdapterWriteError,
    BackboneLoadError,
    BackboneNotFoundError,
    ConceptNotFoundError,
    ConflictError,
    EngramError,
    IncompatibleAdaptersError,
    InputError,
    MissingSettingsError,
    TargetExistsError,
    TriggerError,
)
from engram_core.hashing import NgramHash
from engram_core.layout import StreamTable
from engram_core.manifest import Manifest, StreamSpec
from engram_core.matcher import NO_MATCHES, Matcher, Matches, TokenIds
from engram_core.merge import MergeReport, extract_concepts, extract_file, merge_adapters, merge_files
from engram_core.registry import (
    CONTEXTS,
    DEFAULT_MAX_NGRAM,
    Registry,
    SkippedContext,
    Variant,
    build_registry,
)
from engram_core.residual import Edit, Editor, Residual
from engram_core.tokenizer import StreamTokenizer, TokenizerSpec, fingerprint_tokenizer, wrap_tokenizer

__version__ = "0.1.0"

__all__ = [
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
    "Conflict",
    "ConflictError",
    "ConvertSettings",
    "ConvertingBackbone",
    "DemoReport",
    "DemonstratingBackbone",
    "Edit",
    "Editor",
    "EngramError",
    "Firing",
    "GenerateReport",
    "Generated",
    "GeneratingBackbone",
    "IncompatibleAdaptersError",
    "InputError",
    "InstalledBackbone",
    "Interference",
    "Manifest",
    "Matcher",
    "Matches",
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
    "TokenIds",
    "TokenizerSpec",
    "TrainReport",
    "TrainingBackbone",
    "TriggerError",
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
    "wrap_tokenizer",
]
