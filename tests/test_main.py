"""`python -m di4c_fast`."""

from __future__ import annotations

import pytest
import torch

import di4c_fast
from di4c_fast import __main__ as command


def test_report_names_versions_devices_and_working_backends(capsys):
    assert command.main([]) == 0
    report = capsys.readouterr().out
    assert f"di4c_fast    {di4c_fast.__version__}" in report
    assert f"torch        {torch.__version__.split('+')[0]}" in report
    assert "cpu: " in report
    assert "torch      cpu      ok" in report
    assert report.count("reference  cpu      ok") == 2  # the loss and sample


def test_a_backend_that_computes_something_else_fails_the_check(monkeypatch, capsys):
    from di4c_fast import streaming

    honest = streaming.loss_per_example

    def broken(inputs, scale):
        value, terms = honest(inputs, scale)
        return value * 1.001, terms

    monkeypatch.setattr(streaming, "loss_per_example", broken)
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_backend_that_draws_other_tokens_fails_the_check(monkeypatch, capsys):
    from di4c_fast import streaming_sample

    honest = streaming_sample.sample_rows

    def broken(inputs):
        fields = honest(inputs)
        return fields | {"token": fields["token"].flip(0)}

    monkeypatch.setattr(streaming_sample, "sample_rows", broken)
    assert command.main([]) == 1
    report = capsys.readouterr().out
    assert report.count("WRONG") == 1
    assert "WRONG" in report[report.index("backends of sample") :]


def test_an_unavailable_backend_is_listed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(command.backends, "triton_unavailable", lambda device: "no such thing")
    assert command.main([]) == 0
    assert "triton     cpu      unavailable: no such thing" in capsys.readouterr().out


def test_help_explains_the_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "which backends work" in capsys.readouterr().out
