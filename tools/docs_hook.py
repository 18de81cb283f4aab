"""Hooks of `make docs`: files of the repository that pages link to become part of the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("benchmarks/figures/*", "benchmarks/results/**/*.png", "benchmarks/results/**/*.json")
PAGES = ("kernels/README.md", "benchmarks/README.md")


def on_files(files: Any, config: Any) -> Any:
    found = [path for pattern in LINKED for path in ROOT.glob(pattern) if path.is_file()]
    for path in [*found, *(ROOT / page for page in PAGES)]:
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    # docs/ is the root of the site; there, ../benchmarks/ of the repository is benchmarks/.
    for folder in ("benchmarks", "kernels"):
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
