"""Replacing attributes and putting them back."""

from __future__ import annotations

import types

import pytest
from torch import nn

from di4c_fast.integrations import dream, llada, maskgit, mdlm, sdtt, tauldr
from di4c_fast.integrations._handle import Handle, check_attributes


class Parent:
    def sample(self):
        return "parent"


class Child(Parent):
    pass


def test_inherited_methods_are_uncovered_again():
    child = Child()
    with Handle(child, "sample", lambda: "replaced"):
        assert child.sample() == "replaced"
    assert child.sample() == "parent"
    assert vars(child) == {}
    with Handle(Child, "sample", lambda self: "class"):
        assert child.sample() == "class"
        assert Parent().sample() == "parent"
    assert "sample" not in vars(Child)


def test_own_attributes_come_back():
    owner = types.SimpleNamespace(a=1, b=None)
    handle = Handle()
    handle.replace(owner, "a", 2)
    handle.replace(owner, "b", 3)
    handle.replace(owner, "c", 4)
    handle.replace(owner, "a", 5)
    assert vars(owner) == {"a": 5, "b": 3, "c": 4}
    handle.remove()
    handle.remove()
    assert vars(owner) == {"a": 1, "b": None}


def test_attributes_of_modules_come_back():
    module = nn.Linear(1, 1)
    forward = module.forward
    with Handle(module, "forward", lambda x: "replaced"):
        assert module.forward(0) == "replaced"
    assert module.forward == forward


def test_leaving_by_an_error_undoes_too():
    child = Child()
    with pytest.raises(KeyError, match="inside"), Handle(child, "sample", None):
        raise KeyError("inside")
    assert child.sample() == "parent"


def test_later_replacements_must_be_undone_first():
    child = Child()
    first, second = Handle(child, "sample", "first"), Handle(child, "sample", "second")
    with pytest.raises(RuntimeError, match="sample of Child has been replaced again"):
        first.remove()
    assert child.sample == "second"
    second.remove()
    assert child.sample == "first"
    first.remove()
    assert child.sample() == "parent"


def test_what_cannot_be_replaced_leaves_nothing_to_undo():
    handle = Handle()
    with pytest.raises(TypeError):
        handle.replace(object(), "sample", None)
    with pytest.raises(TypeError):
        handle.replace(int, "real", None)
    handle.remove()


def test_all_integrations_share_the_handle():
    for module in (dream, llada, maskgit, mdlm, sdtt, tauldr):
        assert module.Handle is Handle


def test_missing_attributes_are_named():
    check_attributes(Child(), "trainer", ("sample",))
    with pytest.raises(TypeError, match="trainer must have the attributes sample, vit, ae, got "):
        check_attributes(Child(), "trainer", ("sample", "vit", "ae"))
    with pytest.raises(TypeError, match=r"got Child without vit$"):
        check_attributes(Child(), "trainer", ("sample", "vit"))
