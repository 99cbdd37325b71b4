"""What the site takes from outside docs/: CONTRIBUTING.md, CHANGELOG.md and the figures of committed results.

Links in the repository are written for it, so that they work where the files are read as they are; here they are turned
to where the same files lie in the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    outside = [*(ROOT / name for name in PAGES), *sorted((ROOT / "benchmarks" / "results").glob("*/*.png"))]
    for path in outside:
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\(docs/", "](", markdown)
    depth = page.file.src_uri.count("/")
    outside = "|".join(("benchmarks/results/", *PAGES))
    return re.sub(rf"\]\({'../' * (depth + 1)}({outside})", rf"]({'../' * depth}\1", markdown)
