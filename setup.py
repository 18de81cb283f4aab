"""Packaging of di4c_fast: the folder `kernels/` is installed as `di4c_fast.kernels`.

A wheel holds the library of the C++ passes where there is a compiler; without one it is the same
but for that file, and the library is built at first use, or the torch passes run.
"""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "di4c_fast" / "_version.py").read_text())
assert VERSION is not None

# PyTorch builds for a GPU bring their own Triton; beside a CPU build it serves the tests.
TRITON = ["triton>=3.6; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"]
EXAMPLES = ["scikit-learn>=1.3", "matplotlib>=3.8", "tqdm>=4.65", "sacrebleu>=2.4"]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8", "tqdm>=4.65"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
PRETRAINED = ["transformers>=4.40"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "mypy>=1.11",
    "scipy>=1.11",
    "diffusers>=0.42",
    "accelerate>=1.0",  # which the Trainer of transformers needs; 15 s to install, with psutil
    "lightning>=2.5",  # 26 s to install
]

spec = spec_from_file_location("build_passes", ROOT / "kernels" / "cpu" / "build.py")
passes = module_from_spec(spec)
spec.loader.exec_module(passes)


def has_compiler() -> bool:
    try:
        return bool(passes.find_compiler())
    except Exception:
        return False


class BuildWithPasses(build_py):
    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False) or not has_compiler():
            return
        try:
            passes.build(Path(self.build_lib) / "di4c_fast" / "kernels" / "cpu")
        except Exception as error:
            print(f"di4c_fast is built without its C++ passes: {error}", file=sys.stderr)


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:  # whether the wheel is for one platform
        return has_compiler()


COMMANDS = {"build_py": BuildWithPasses}
try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1; the wheel is then for one version of Python
    pass
else:

    class AnyPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:  # the library knows nothing of Python
            return "py3", "none", super().get_tag()[2]

    COMMANDS["bdist_wheel"] = AnyPython

setup(
    cmdclass=COMMANDS,
    distclass=WithLibrary,
    name="di4c_fast",
    version=VERSION.group(1),
    description="Fused losses and exact fast samplers for mixture discrete diffusion models (Di4C)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["di4c_fast", "di4c_fast.*"]),
        "di4c_fast.kernels",
        "di4c_fast.kernels.cpu",
        "di4c_fast.kernels.triton",
    ],
    package_dir={"di4c_fast.kernels": "kernels"},
    package_data={
        "di4c_fast": ["py.typed"],
        "di4c_fast.kernels": ["configs/*.json", "README.md"],
        "di4c_fast.kernels.cpu": ["*.cpp", "*.h"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy",
        "einops>=0.7",
        "safetensors>=0.4",
        "ninja",
        "typing_extensions>=4.1",
    ],
    entry_points={"sglang.srt.plugins": ["di4c_fast = di4c_fast.integrations.sglang:register"]},
    extras_require={
        "examples": EXAMPLES,
        "bench": BENCH,
        "triton": TRITON,
        "pretrained": PRETRAINED,
        "docs": DOCS,
        "dev": sorted({*DEV, *PRETRAINED, *EXAMPLES, *BENCH, *TRITON}),
    },
)
