"""The library of the C++ passes: built once, found again, never a wrong one; or why there is none.

The compiler is a script that copies the real library and notes what it does.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from di4c_fast.kernels.cpu import build

import di4c_fast
from di4c_fast import __main__ as command
from di4c_fast import backends
from di4c_fast.passes import cpu

ROOT = Path(__file__).resolve().parent.parent
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "fake {version}"; exit 0;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o) out="$2";; -shared) link=1;; esac
  shift
done
if [ -z "$link" ]; then : > "$out"; exit 0; fi
sleep {pause}
echo built >> {log}
cp {library} "$out"
"""
FAILING = """#!/bin/sh
case "$*" in *--version*) echo "broken 1.0"; exit 0;; esac
echo "vec.h:1: error: no vectors today" >&2
exit 1
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """The real one: a compiler that is there must be able to build it."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.find_library()


@dataclasses.dataclass
class Machine:
    """Folders of its own: sources, cache, temporary files, compilers."""

    root: Path
    patch: pytest.MonkeyPatch
    library: Path

    def install(self, script: str, **values: object) -> None:
        values = {"version": "1.0", "pause": 0} | values
        path = self.root / "bin" / "c++"
        path.write_text(script.format(log=self.root / "log", library=self.library, **values))
        path.chmod(0o755)
        self.patch.setenv("CXX", str(path))

    @property
    def builds(self) -> int:
        log = self.root / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    @property
    def cached(self) -> list[Path]:
        return sorted(self.root.glob("cache/di4c_fast/*.so"))

    def find(self) -> Path:
        return build.find_library.__wrapped__()


def forget() -> None:
    for function in (build.find_library, cpu._library, backends._warn_fallback):
        function.cache_clear()


@pytest.fixture
def machine(tmp_path, monkeypatch, library):
    for name in ("bin", "tmp"):
        (tmp_path / name).mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "kernels" / "cpu", tmp_path / "sources", ignore=ignored)
    monkeypatch.setattr(build, "HERE", tmp_path / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("DI4C_FAST_CXXFLAGS", "DI4C_FAST_CPU"):
        monkeypatch.delenv(name, raising=False)
    found = Machine(tmp_path, monkeypatch, library)
    found.install(COMPILER)
    forget()
    yield found
    monkeypatch.undo()
    forget()


def test_it_is_built_once_with_one_line_and_then_found(machine, capsys):
    path = machine.find()
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == machine.library.read_bytes()
    assert machine.cached == [path]
    assert machine.find() == path
    assert machine.builds == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["source", "flags"])
def test_a_stale_library_is_built_again(machine, what):
    first = machine.find()
    if what == "source":
        with open(build.HERE / "vec.h", "a") as file:
            file.write("// changed\n")
    else:
        machine.patch.setenv("DI4C_FAST_CXXFLAGS", "-g")
    assert machine.find() != first
    assert machine.builds == 2


def test_what_is_built_is_found_without_a_compiler(machine):
    path = machine.find()
    machine.patch.setenv("CXX", "/nonexistent/c++")
    assert machine.find() == path
    path.unlink()
    with pytest.raises(build.BuildError, match="there is no C\\+\\+ compiler"):
        machine.find()


@pytest.mark.parametrize("contents", ["torn", "foreign", "empty"])
def test_a_file_that_is_not_what_its_name_says_is_built_again(machine, contents):
    path = machine.find()
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[:5000], "foreign": b"\x7fELF" + whole, "empty": b""}[contents])
    assert machine.find().read_bytes() == whole
    assert machine.cached == [path]
    assert machine.builds == 2


def test_a_library_that_does_not_load_here_is_built_again(machine):
    path = machine.find()
    other = b"of a newer C library"
    place = path.with_name(path.name.rsplit("_", 1)[0] + f"_{build._digest(other)}.so")
    path.rename(place)
    place.write_bytes(other)
    assert machine.find() == path
    assert machine.builds == 2


def test_what_a_killed_build_leaves_does_not_matter(machine):
    path = machine.find()
    for leftover in (".building-x", "di4c_0_0.so.tmp"):
        (path.parent / leftover).mkdir()
    path.unlink()
    assert machine.find() == path


@pytest.mark.parametrize("why", ["a file", "a system folder", "somebody else's"])
def test_another_folder_where_the_cache_cannot_be_used(machine, why):
    if why == "a file":
        (machine.root / "cache").write_text("")
    elif why == "a system folder":
        machine.patch.setenv("XDG_CACHE_HOME", "/sys")  # not even for the superuser
    else:  # with a library of the right name in it, which must not run
        strange = machine.find().parent
        real = Path.stat

        def stat(path, **options):
            found = real(path, **options)
            if path != strange:
                return found
            return os.stat_result([*found[:4], os.getuid() + 1, *found[5:]])

        machine.patch.setattr(Path, "stat", stat)
    assert machine.find().parent == machine.root / "tmp" / f"di4c_fast-{os.getuid()}"


def test_relative_cache_folders_are_passed_over(machine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert machine.find().parent.parent == machine.root / "tmp"


def test_no_folder_at_all_leaves_torch_with_the_reasons(machine):
    machine.patch.setenv("XDG_CACHE_HOME", "/sys")
    machine.patch.setattr(tempfile, "tempdir", str(machine.root / "bin" / "c++"))
    reason = backends.unavailable("cpu", torch.device("cpu"))
    assert "no folder can hold the library: /sys/di4c_fast: " in reason
    assert f"{machine.root}/bin/c++/di4c_fast-{os.getuid()}: Not a directory" in reason


def assert_torch_runs(reason: str, capsys) -> None:
    """In place of the C++ passes, with the reason in a warning and in the report."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match='"auto" uses the torch backend') as warned:
        draw = di4c_fast.sample(logits, seed=1)
    assert reason in str(warned[0].message)
    assert draw.token.equal(di4c_fast.sample(logits, seed=1, backend="torch").token)
    with pytest.raises(RuntimeError, match='backend="cpu" cannot run'):
        di4c_fast.sample(logits, seed=1, backend="cpu")
    capsys.readouterr()
    assert command.main([]) == 0
    report = capsys.readouterr().out
    assert "cpu        cpu      unavailable: the C++ passes cannot be built" in report
    assert reason in report


@pytest.fixture
def few_backends(monkeypatch):
    monkeypatch.setattr(
        backends, "_known", {n: p for n, p in backends._known.items() if n != "triton"}
    )


def test_a_compiler_that_fails_is_quoted_and_torch_runs(machine, few_backends, capsys):
    machine.install(FAILING)
    assert_torch_runs("vec.h:1: error: no vectors today", capsys)
    assert machine.cached == []
    assert list(machine.root.glob("cache/di4c_fast/.building-*")) == []


def test_without_ninja_the_compiler_is_called_directly(machine):
    machine.patch.setattr(build, "_ninja", lambda: None)
    machine.find().unlink()
    machine.install(FAILING)
    with pytest.raises(build.BuildError, match=r"the compiler failed:\nvec.h:1: error"):
        machine.find()
    assert machine.builds == 1


@pytest.mark.parametrize("given", [None, "nonesuch -O2", "'"])
def test_without_a_compiler_torch_runs(machine, few_backends, given, capsys):
    machine.patch.setenv("PATH", str(machine.root / "tmp"))
    if given is None:
        machine.patch.delenv("CXX")
    else:
        machine.patch.setenv("CXX", given)
    reason = {
        None: "there is no C++ compiler (c++, g++ and clang++ not found)",
        "nonesuch -O2": "there is no C++ compiler (CXX=nonesuch -O2 not found)",
        "'": 'CXX="\'" cannot be read: No closing quotation',
    }[given]
    assert_torch_runs(reason, capsys)


def test_two_processes_at_once_build_one_library(machine):
    machine.install(COMPILER, pause=0.5)
    code = "import build; print(build.find_library())"
    environment = {**os.environ, "TMPDIR": str(machine.root / "tmp")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=build.HERE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in running]
    assert {out.strip() for out, _ in outputs} == {str(machine.find())}
    assert machine.builds == 1
    assert sum("building its C++ passes" in err for _, err in outputs) == 1


# Which instruction set runs -----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["avx", "AVX2", "", "native"])
def test_an_unknown_instruction_set_is_refused_with_the_known_ones(machine, monkeypatch, value):
    monkeypatch.setenv("DI4C_FAST_CPU", value)
    reason = backends.unavailable("cpu", torch.device("cpu"))
    assert reason == f"DI4C_FAST_CPU must be one of plain, avx2, avx512, got {value!r}"
    with pytest.warns(UserWarning, match="DI4C_FAST_CPU must be one of"):
        assert backends.resolve("auto", torch.device("cpu"), torch.float32) == "torch"
    assert machine.builds == 0


def test_the_highest_instruction_set_can_be_chosen(machine):
    highest = cpu.SETS.index(cpu.instruction_set())
    for index, name in enumerate(cpu.SETS):
        machine.patch.setenv("DI4C_FAST_CPU", name)
        cpu._library.cache_clear()
        assert cpu.instruction_set() == cpu.SETS[min(index, highest)]


# Wheels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["works", "fails", "missing"])
def test_a_wheel_has_the_sources_and_the_library_where_it_can_be_built(machine, compiler):
    if compiler == "fails":
        machine.install(FAILING)
    elif compiler == "missing":
        machine.patch.setenv("CXX", "nonesuch")
    project = machine.root / "project"
    for name in ("di4c_fast", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    )
    wheel = done.stdout.splitlines()[-1]
    unpacked = machine.root / "unpacked"
    zipfile.ZipFile(project / wheel).extractall(unpacked)
    folder = unpacked / "di4c_fast" / "kernels" / "cpu"
    sources = {path.name for path in (ROOT / "kernels" / "cpu").iterdir() if path.is_file()}
    libraries = {path.name for path in folder.glob("*.so")}
    assert {path.name for path in folder.iterdir()} - libraries == {
        name for name in sources if not name.endswith(".so")
    }
    assert wheel.endswith("-py3-none-any.whl") == (compiler == "missing")
    assert len(libraries) == (compiler == "works")
    if compiler == "fails":
        assert "built without its C++ passes: the compiler failed:" in done.stderr
        assert "no vectors today" in done.stderr
    if compiler == "works":  # what it holds is found, with no compiler and no cache
        machine.patch.setattr(build, "HERE", folder)
        machine.patch.setenv("CXX", "nonesuch")
        assert machine.find().parent == folder
        assert machine.cached == []
