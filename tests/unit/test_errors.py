"""Every error says what happened, where, what is accepted and what to do."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from thermoe import errors
from thermoe.errors import ConfigError, ThermoeError, UnknownNameError, near_match

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ThermoeError)]


def test_message_has_its_four_parts_in_order() -> None:
    error = ThermoeError("k is 9", where="router.top_k", accepted="1 to 8", fix="lower k")
    assert str(error) == "k is 9\n  where: router.top_k\n  accepted: 1 to 8\n  fix: lower k"
    assert (error.what, error.where, error.accepted, error.fix) == ("k is 9", "router.top_k", "1 to 8", "lower k")


def test_parts_left_out_leave_no_empty_line() -> None:
    assert str(ThermoeError("k is 9", fix="lower k")) == "k is 9\n  fix: lower k"
    assert str(ThermoeError("k is 9")) == "k is 9"


@pytest.mark.parametrize("error_class", CLASSES)
def test_each_error_is_ours_and_a_builtin_and_knows_its_exit_code(error_class: type[ThermoeError]) -> None:
    builtin = {ValueError, RuntimeError, ImportError}
    assert error_class is ThermoeError or builtin & set(error_class.__mro__)
    machine = issubclass(
        error_class, (errors.MachineError, errors.MissingDependencyError, errors.TrainingDivergedError)
    )
    assert error_class.exit_code == (3 if machine else 2)
    with pytest.raises(ThermoeError, match="what happened"):
        raise error_class("what happened", where="here")


@pytest.mark.parametrize("error_class", CLASSES)
@pytest.mark.parametrize("copier", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_can_be_sent_between_processes(error_class: type[ThermoeError], copier: object) -> None:
    error = error_class("k is 9", where="router.top_k", accepted="1 to 8", fix="lower k")
    twin = copier(error)  # type: ignore[operator]
    assert type(twin) is error_class
    assert str(twin) == str(error) and twin.where == "router.top_k"


def test_unknown_name_lists_what_there_is_and_the_near_one() -> None:
    error = UnknownNameError.of("router", "pricd", iter(["topk", "priced", "random"]), where="router")
    assert isinstance(error, ConfigError) and isinstance(error, ValueError)
    assert error.what == "unknown router 'pricd'"
    assert error.accepted == "priced, random, topk"
    assert error.fix == "did you mean 'priced'?"
    assert error.where == "router"


def test_unknown_name_without_a_near_one_or_any() -> None:
    assert UnknownNameError.of("router", "zzz", ["topk"]).fix == "choose one of the accepted router names"
    assert UnknownNameError.of("router", "zzz", []).accepted == "nothing is registered"


@pytest.mark.parametrize(
    ("name", "options", "near"),
    [
        ("TOPK", ["topk", "priced"], "topk"),
        ("gelu_nw", ["GELU_new", "relu"], "GELU_new"),
        ("xyz", ["topk"], None),
        ("", ["topk"], None),
        ("topk", [], None),
    ],
)
def test_near_match(name: str, options: list[str], near: str | None) -> None:
    assert near_match(name, options) == near
    assert near_match(name, iter(options)) == near, "an iterator will do"
