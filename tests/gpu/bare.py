"""Parts in one process, small and on a CPU, as if only what they name were installed: for the test of the parts.

python -m tests.gpu.bare FOLDER PART...    writes FOLDER/PART, the lines of each part
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.gpu.child import run
from tests.gpu.parts import PARTS
from tests.gpu.report import Options

# What the project depends on beside what the parts name. That a library of theirs brings one of these along is well.
REFUSED = {
    "aiohttp",
    "boto3",
    "botocore",
    "hypothesis",
    "matplotlib",
    "mlflow",
    "moto",
    "open_clip",
    "pytest",
    "ray",
    "rich",
    "simplejpeg",
    "torchvision",
    "typer",
    "webdataset",
}


class Bare:
    """A finder of modules that does not find those, so that importing and asking for them go as if they were absent."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in REFUSED else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def main(folder: Path, names: list[str]) -> int:
    assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
    sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
    codes = [run(PARTS[name], Options("cpu", tiny=True), folder / name) for name in names]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
