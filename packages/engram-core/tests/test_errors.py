"""One tree of errors, each also a built-in type."""

import builtins
import inspect
import pickle

import pytest
from core_builders import make_adapter, make_concept

import engram_core
from engram_core import ConceptNotFoundError, ConflictError, EngramError, MissingSettingsError, find_conflicts

ERRORS = [
    value
    for name, value in vars(engram_core).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value is not EngramError
]

BUILT_IN = {
    "AdapterFormatError": ValueError,
    "AdapterReadError": OSError,
    "AdapterWriteError": OSError,
    "BackboneLoadError": ImportError,
    "BackboneNotFoundError": LookupError,
    "ConceptNotFoundError": KeyError,
    "ConflictError": ValueError,
    "IncompatibleAdaptersError": ValueError,
    "InputError": ValueError,
    "MissingSettingsError": ValueError,
    "TargetExistsError": FileExistsError,
    "TrainingError": ArithmeticError,
    "TriggerError": ValueError,
}


def test_every_public_error_is_known_here():
    assert {error.__name__ for error in ERRORS} == set(BUILT_IN)


@pytest.mark.parametrize("error", ERRORS)
def test_each_is_an_engram_error_and_a_built_in_one(error):
    assert issubclass(error, EngramError)
    assert issubclass(error, BUILT_IN[error.__name__])
    assert any(base.__module__ == builtins.__name__ and base not in (Exception, object) for base in error.__mro__)


def test_every_module_raises_from_this_tree_alone():
    defined = {value for value in vars(engram_core.errors).values() if inspect.isclass(value)}
    assert {value for value in defined if issubclass(value, Exception)} == {EngramError, *ERRORS}


def test_a_missing_concept_reads_as_a_sentence():
    error = ConceptNotFoundError("x.safetensors: has no concept 'cat'")
    assert str(error) == "x.safetensors: has no concept 'cat'"


def test_a_conflict_error_carries_the_conflicts():
    conflicts = find_conflicts([make_adapter(make_concept("a", (1, 2))), make_adapter(make_concept("b", (1, 2)))])
    error = ConflictError("1 conflict", conflicts)
    assert error.conflicts == tuple(conflicts)
    assert str(error) == "1 conflict"


@pytest.mark.parametrize("error", [one for one in ERRORS if one not in (ConflictError, MissingSettingsError)])
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error("what happened")))  # noqa: S301 - what this very test wrote
    assert type(copy) is error
    assert str(copy) == "what happened"


def test_a_conflict_error_crosses_processes():
    copy = pickle.loads(pickle.dumps(ConflictError("1 conflict", [])))  # noqa: S301 - what this very test wrote
    assert str(copy) == "1 conflict"
    assert copy.conflicts == ()


def test_missing_settings_are_told_as_the_flags_that_set_them_and_cross_processes():
    error = MissingSettingsError(["data", "run_dir"])
    assert str(error) == "missing: --data, --run-dir; give them on the command line or in engram.toml"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - what this very test wrote
    assert (copy.names, str(copy)) == (("data", "run_dir"), str(error))
