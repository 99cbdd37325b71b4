"""Writes the tree that the `kernels` package of Hugging Face builds and loads: `make hub`.

    python -m release.hub [folder]        default build/hub

    build.toml, torch-ext/illada_kernels/    the source tree, in the layout of kernel-builder (Python only: noarch)
    build/torch-cpu/, build/torch-cuda/      the built tree; torch-cpu holds the compiled extension of this checkout too
    README.md                                the card

The extension is of this machine's kind; another loads the same tree and computes on the reference backend.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME, PACKAGE = "illada-kernels", "illada_kernels"
BACKENDS = ("cpu", "cuda")
# for a checkout or an installation only
LEFT_OUT = ("doctor.py", "__main__.py", "_build.py", "_probe.py", "_selftest.py", "_toolchain.py", "_build_info.json")
EXPORT = '\nfrom .nn import layers as layers  # noqa: E402  (what `kernelize` looks for)\n\n__all__ += ["layers"]\n'
SOURCES = ("cuda", "include/illada", "nvrtc")  # of csrc: what NVRTC compiles

BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""

CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernels]
---

# illada-kernels

Bidirectional attention, masked-token loss and parallel unmasking for masked-diffusion language models.

    from kernels import get_local_kernel  # or get_kernel("<owner>/illada-kernels", version={version}), once uploaded
    ops = get_local_kernel(Path("build/hub"))
    out = ops.attention(q, k, v, ops.KeyRanges.padding(lengths, num_keys))

Layers for `kernelize`: {layers}.
"""


def write(target: Path, version: int = 0) -> Path:
    """Writes the whole tree into `target`, which must not exist or be one that this wrote before."""
    if target.exists() and not (target / "build.toml").exists():
        raise SystemExit(f"{target}: expected a new folder, or one written by this command; remove it or name another")
    shutil.rmtree(target, ignore_errors=True)
    package(target / "torch-ext" / PACKAGE)
    (target / "build.toml").write_text(BUILD_TOML.format(name=NAME, version=version))
    layers = ", ".join(f"`{name}`" for name in layer_names())
    (target / "README.md").write_text(CARD.format(version=version, layers=layers))
    shutil.copy(ROOT / "LICENSE", target)
    for backend in BACKENDS:
        folder = target / "build" / f"torch-{backend}"
        shutil.copytree(target / "torch-ext" / PACKAGE, folder)
        if backend == "cpu":
            for binary in (ROOT / PACKAGE).glob("_C*.so"):
                shutil.copy(binary, folder)
        (folder / "metadata.json").write_text(json.dumps(metadata(folder, backend, version), indent=1) + "\n")
    return target


def package(target: Path) -> None:
    """Copies the package with what it compiles at first use, and exports its layers."""
    shutil.copytree(ROOT / PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", *LEFT_OUT))
    for name in SOURCES:
        shutil.copytree(
            ROOT / "csrc" / name, target / "_csrc" / name, ignore=shutil.ignore_patterns("*_sm90a.cu", "__pycache__")
        )
    init = target / "__init__.py"
    init.write_text(init.read_text() + EXPORT)


def layer_names() -> list[str]:
    from illada_kernels.nn import layers

    return layers.__all__


def metadata(folder: Path, backend: str, version: int) -> dict[str, object]:
    """Returns what metadata.json says of a folder: its files by SHA-256, and an id of them all."""
    files = {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    return {
        "id": f"_{PACKAGE}_{backend}_{unique}",
        "name": NAME,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.hub", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "hub")
    parser.add_argument("--version", type=int, default=0, help="of the repository on the hub, a whole number")
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.version))


if __name__ == "__main__":
    main()
