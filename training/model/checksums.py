"""The hashes of a checkpoint folder's files, in SHA256SUMS, which `sha256sum --check SHA256SUMS` reads.

Without them, weights with a bit flipped on a disk or in transit would load and draw other pictures. A folder without
the file, or a file that is not listed in it, was not written by us and is accepted unchecked.
"""

from __future__ import annotations

from pathlib import Path

from infra.errors import CheckpointError
from infra.files import appearing, sha256_of

SUMS = "SHA256SUMS"


def sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))


def write_sums(folder: Path) -> None:
    """Write or replace SHA256SUMS, for all other files in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SUMS]
    text = sums_text({path.relative_to(folder).as_posix(): sha256_of(path) for path in files})
    with appearing(folder / SUMS) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 by file name; empty if the folder has no SHA256SUMS."""
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
    """Raises if one of these files, or a file in one of these subfolders, does not have its listed hash."""
    for name, sha256 in read_sums(folder).items():
        checked = name in names or any(name.startswith(f"{subfolder}/") for subfolder in names)
        path = folder / name
        if checked and path.is_file() and sha256_of(path) != sha256:
            raise CheckpointError(
                f"{path} is damaged: its bytes do not have the hash in {SUMS}",
                remedy=f"fetch or export the checkpoint again; if you changed it yourself, take its line out of {SUMS}",
            )
