"""Packaging of di4c_fast: the folder `kernels/` is installed as `di4c_fast.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "di4c_fast" / "_version.py").read_text())
assert VERSION is not None

# PyTorch builds for a GPU bring their own Triton; beside a CPU build it serves the tests.
TRITON = ["triton>=3.6; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"]
EXAMPLES = ["scikit-learn>=1.3", "matplotlib>=3.8", "tqdm>=4.65", "sacrebleu>=2.4"]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8", "tqdm>=4.65"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "mypy>=1.11",
    "scipy>=1.11",
    "transformers>=4.40",
]

setup(
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
        "di4c_fast.kernels.triton",
    ],
    package_dir={"di4c_fast.kernels": "kernels"},
    package_data={"di4c_fast": ["py.typed"], "di4c_fast.kernels": ["configs/*.json", "README.md"]},
    install_requires=["torch>=2.11", "numpy", "einops>=0.7", "safetensors>=0.4"],
    extras_require={
        "examples": EXAMPLES,
        "bench": BENCH,
        "triton": TRITON,
        "docs": DOCS,
        "dev": sorted({*DEV, *EXAMPLES, *BENCH, *TRITON}),
    },
)
