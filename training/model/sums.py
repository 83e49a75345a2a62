"""The hashes that a checkpoint's folder carries, in the file that `sha256sum --check SHA256SUMS` reads.

Weights that lost a bit on a disk or on their way still load, and draw other pictures. A folder without the file, or a
file without a line in it, comes from somewhere else and is taken as it is.
"""

from __future__ import annotations

from pathlib import Path

from infra.errors import CheckpointError
from infra.files import appearing, sha256_of

SUMS = "SHA256SUMS"


def sums_of(folder: Path) -> dict[str, str]:
    """Name in the folder -> its sha256, of all files but the sums themselves."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))


def write_sums(folder: Path) -> None:
    """For all that the folder holds now, in place of the sums that it had."""
    text = sums_text(sums_of(folder))
    with appearing(folder / SUMS) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Empty where the folder carries none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / SUMS} cannot be read ({type(error).__name__})", remedy="fetch or export the checkpoint again"
        ) from None
    pairs = (line.partition("  ") for line in lines)
    return {name: sha256 for sha256, _, name in pairs}


def check_files(folder: Path, *names: str) -> None:
    """Raises if one of these files, or a file in one of these folders, is not as it was saved."""
    for name, sha256 in read_sums(folder).items():
        wanted = name in names or any(name.startswith(f"{inner}/") for inner in names)
        path = folder / name
        if wanted and path.is_file() and sha256_of(path) != sha256:
            raise CheckpointError(
                f"{path} is damaged: its bytes do not have the hash in {SUMS}",
                remedy=f"fetch or export the checkpoint again; if you changed it yourself, take its line out of {SUMS}",
            )
