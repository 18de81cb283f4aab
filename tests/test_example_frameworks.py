"""The student in other trainers: terms in the log, exact resumption, several processes."""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from example_support import DIGITS
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from examples.frameworks import parts

NEEDS = {
    "accelerate_loop": "accelerate",
    "huggingface_trainer": "accelerate",
    "lightning_module": "lightning",
}
TERMS = ("data_correlation", "teacher_marginal", "consistency_correlation", "component")


def start(name: str, folder: pathlib.Path, steps: int) -> None:
    options = ["--run-dir", str(folder), "--steps", str(steps), "--save-every", "2", "--batch", "4"]
    assert importlib.import_module(f"examples.frameworks.{name}").main(options) == 0


def weights(name: str, folder: pathlib.Path, steps: int) -> dict[str, torch.Tensor]:
    """Of the student, and of its average."""
    if name == "accelerate_loop":
        average = torch.load(folder / "state" / "custom_checkpoint_0.pkl", weights_only=True)
        return load_file(folder / "state" / "model.safetensors") | {
            f"average {key}": value for key, value in average["shadow"].items()
        }
    if name == "huggingface_trainer":
        last = folder / "checkpoints" / f"checkpoint-{steps}"
        average = load_file(last / "average.safetensors")
        return load_file(last / "model.safetensors") | {
            f"average {key}": value for key, value in average.items()
        }
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    average = last["ema"]["shadow"]
    return last["state_dict"] | {f"average {key}": value for key, value in average.items()}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(parts, "SMALL", DIGITS["masked"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NEEDS)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(name, tmp_path, capsys):
    pytest.importorskip(NEEDS[name])
    start(name, tmp_path / "whole", 4)
    printed = capsys.readouterr().out
    if name != "lightning_module":  # which logs into files
        assert all(term in printed for term in TERMS)
    shutil.copytree(tmp_path / "whole" / "teacher", tmp_path / "stopped" / "teacher")
    start(name, tmp_path / "stopped", 2)
    torch.manual_seed(9)
    start(name, tmp_path / "stopped", 4)
    ours, expected = (weights(name, tmp_path / run, 4) for run in ("stopped", "whole"))
    assert ours.keys() == expected.keys()
    assert any(key.startswith("average") for key in ours)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_two_processes_train_what_one_does(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    parts.make(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    program = (
        "import sys, runpy; sys.path.insert(0, 'tests'); from example_support import DIGITS;"
        "from examples.frameworks import parts; parts.SMALL = DIGITS['masked'];"
        f"from examples.frameworks import {name} as m; m.main(sys.argv[1:])"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    root = pathlib.Path(__file__).parent.parent
    for run, processes, batch in (("one", 1, 8), ("two", 2, 4)):
        options = ["--run-dir", str(tmp_path / run), "--steps", "3", "--batch", str(batch)]
        starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, *starter, str(script), *options]
        subprocess.run(command, cwd=root, env=environment, check=True, timeout=300)
    ours, expected = (weights(name, tmp_path / run, 3) for run in ("two", "one"))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-3, atol=2e-4, msg=key)
