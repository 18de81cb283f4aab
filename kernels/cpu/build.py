"""Build and find the library of the C++ passes.

The library has a plain C interface and knows neither torch nor Python, so one file serves all
their versions. `pip install` puts it beside the sources where there is a compiler; otherwise it is
built at first use into a cache folder. Its name holds a hash of how it is built and one of its
contents: a file that is stale, torn or foreign is never loaded. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno "
    "-fno-trapping-math -ffp-contract=fast -Wall -Wno-psabi -Wno-unused-function "
    "-Wno-maybe-uninitialized"
)
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
SECONDS = 300  # after which a compiler counts as stuck


class BuildError(Exception):
    """Why there is no library, in one sentence and the last lines of the compiler."""


@functools.cache
def find_library() -> Path:
    """The library for this machine, built if need be.

    Raises:
        BuildError: there is none and it cannot be built.
    """
    key, reasons = _key(), []
    installed = _intact(HERE, key)
    if installed is not None:
        return installed
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():  # who could have put anything there
                raise PermissionError("it belongs to somebody else")
            found = _intact(folder, key)
            if found is not None:
                return found
            with _lock(folder / f"{key}.lock"):
                return _intact(folder, key) or _build_loudly(find_compiler(), folder, key)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    raise BuildError("no folder can hold the library: " + "; ".join(reasons))


def find_compiler() -> list[str]:
    """The command of a C++ compiler.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CXX")
    for command in [given] if given else ["c++", "g++", "clang++"]:
        words = _words("CXX", command)
        if words and shutil.which(words[0]):
            return words
    wanted = f"CXX={given}" if given else "c++, g++ and clang++"
    raise BuildError(f"there is no C++ compiler ({wanted} not found)")


def build(folder: Path, key: str | None = None, compiler: list[str] | None = None) -> Path:
    """Compile the library into `folder`, under its final name at the last moment.

    Raises:
        BuildError: the compiler failed.
        OSError: the folder cannot be written.
    """
    compiler = compiler or find_compiler()
    key, folder = key or _key(), folder.resolve()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        result = Path(scratch) / "library.so"
        _run(*_commands(compiler, Path(scratch), result), Path(scratch))
        target = folder / f"di4c_{key}_{_digest(result.read_bytes())}.so"
        os.replace(result, target)
    return target


def _commands(
    compiler: list[str], scratch: Path, result: Path
) -> tuple[list[tuple[Path, list[str]]], list[str]]:
    """The objects with the commands that compile them, and the command that links them."""
    sets: dict[str, list[str]] = {"plain": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets |= {"avx2": AVX2, "avx512": AVX512}
    units: list[tuple[str, str, list[str]]] = [("library", "library.cpp", [])]
    units += [(name, "isa.cpp", [*f, f"-DDI4C_ISA=di4c_{name}"]) for name, f in sets.items()]
    extra = _extra_flags()
    objects = []
    for name, source, flags in units:
        out = scratch / f"{name}.o"
        command = [*compiler, *FLAGS, *flags, *extra, "-c", str(HERE / source), "-o", str(out)]
        objects.append((out, command))
    link = [*compiler, "-shared", *extra, *(str(out) for out, _ in objects), "-o", str(result)]
    if sys.platform.startswith("linux"):
        link.append("-Wl,--as-needed")
    return objects, link


def _run(objects: list[tuple[Path, list[str]]], link: list[str], scratch: Path) -> None:
    """Run the commands, through ninja where it is installed."""
    ninja = _ninja()
    if ninja is None:
        commands = [command for _, command in objects] + [link]
    else:
        lines = ["rule run\n  command = $line\n"]
        for out, command in [*objects, (scratch / "library.so", link)]:
            inputs = " ".join(_escaped(str(o)) for o, _ in objects) if command is link else ""
            lines.append(f"build {_escaped(str(out))}: run {inputs}\n")
            lines.append(f"  line = {shlex.join(command).replace('$', '$$')}\n")
        (scratch / "build.ninja").write_text("".join(lines))
        commands = [[ninja, "-C", str(scratch)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise BuildError(f"the compiler took more than {SECONDS} s") from None
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise BuildError(f"the compiler failed:\n{last}")


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def _build_loudly(compiler: list[str], folder: Path, key: str) -> Path:
    print(
        f"di4c_fast: building its C++ passes into {folder} (once; some ten seconds) ...",
        file=sys.stderr,
        flush=True,
    )
    return build(folder, key, compiler)


def _extra_flags() -> list[str]:
    return _words("DI4C_FAST_CXXFLAGS", os.environ.get("DI4C_FAST_CXXFLAGS", ""))


def _words(variable: str, value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable}={value!r} cannot be read: {error}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


def _key() -> str:
    """A hash of sources, flags and machine. What is built needs no compiler to be found again."""
    parts = [platform.machine(), sys.platform, *FLAGS, *AVX512, *_extra_flags()]
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        parts += [source.name, source.read_text()]
    return _digest("\0".join(parts).encode())


def _intact(folder: Path, key: str) -> Path | None:
    """The library with this key in a folder, if its contents are what its name says.

    One that does not load here, such as that of a newer C library, counts as missing.
    """
    for path in folder.glob(f"di4c_{key}_*.so"):
        with contextlib.suppress(OSError):
            if path.stem.endswith(f"_{_digest(path.read_bytes())}"):
                ctypes.CDLL(str(path))
                return path
            path.unlink()
    return None


def _folders() -> list[Path]:
    """Where a library may be kept: the user's cache, else the folder of temporary files."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    temporary = os.path.join(tempfile.gettempdir(), f"di4c_fast-{os.getuid()}")
    folders = [Path(cache) / "di4c_fast", Path(temporary)]
    return [folder for folder in folders if folder.is_absolute()]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time builds; the others wait and find the result."""
    import fcntl

    with open(path, "w") as file:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process holds {path}") from None
                time.sleep(0.1)
        yield


if __name__ == "__main__":
    print(find_library())
