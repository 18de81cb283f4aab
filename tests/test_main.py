"""`python -m di4c_fast`."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

import di4c_fast
from di4c_fast import __main__ as command
from di4c_fast import backends
from di4c_fast.passes import torch as passes


def register(monkeypatch, **functions):
    """A third party's backend: the torch passes with other functions."""
    module = types.ModuleType("mine")
    module.__dict__.update({**vars(passes), **functions})
    monkeypatch.setitem(sys.modules, "mine", module)
    module.__spec__ = types.SimpleNamespace(name="mine")
    monkeypatch.setattr(backends, "_known", dict(backends._known))
    backends.register("mine", "mine")


def test_report_names_versions_devices_and_working_backends(capsys):
    assert command.main([]) == 0
    report = capsys.readouterr().out
    assert f"di4c_fast    {di4c_fast.__version__}" in report
    assert f"torch        {torch.__version__.split('+')[0]}" in report
    assert "cpu: " in report
    assert "torch      cpu      ok" in report
    assert report.count("reference  cpu      ok") == 2  # the loss and sample


def test_a_backend_that_computes_something_else_fails_the_check(monkeypatch, capsys):
    def broken(chunk):
        passes.forward(chunk)
        chunk.statistics.teacher_kl.mul_(1.01)

    register(monkeypatch, forward=broken)
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_backend_that_draws_other_tokens_fails_the_check(monkeypatch, capsys):
    def broken(*arguments):
        drawn = passes.draw(*arguments)
        return dataclasses.replace(drawn, token=drawn.token.flip(0))

    register(monkeypatch, draw=broken)
    assert command.main([]) == 1
    report = capsys.readouterr().out
    assert report.count("WRONG") == 1
    assert "WRONG" in report[report.index("backends of sample") :]


def test_an_unavailable_backend_is_listed_with_its_reason(monkeypatch, capsys):
    register(monkeypatch, unavailable=lambda device: "no such thing")
    assert command.main([]) == 0
    assert "mine       cpu      unavailable: no such thing" in capsys.readouterr().out


def test_a_backend_that_cannot_be_imported_is_listed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_known", dict(backends._known))
    backends.register("mine", "json.nothing")
    assert command.main([]) == 0
    assert (
        "mine       cpu      unavailable: there is no module json.nothing"
        in capsys.readouterr().out
    )


def test_help_explains_the_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "which backends work" in capsys.readouterr().out
