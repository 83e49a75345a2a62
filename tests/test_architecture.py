"""The floors hold: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# floor -> the floors that it may import; never upwards, never sideways
MAY_IMPORT = {
    "infra": set(),
    "data_prep": {"infra"},
    "training": {"infra"},
    "pipelines": {"infra", "data_prep", "training"},
    "orchestration": {"infra", "data_prep", "training", "pipelines"},
}

# The rooms of a floor: each may import those before it. What is not named here is a file beside the rooms, above them.
ROOMS = {
    "data_prep": (
        "data_prep.rejections",
        "data_prep.web",
        "data_prep.images",
        "data_prep.sources",
        "data_prep.survey",
        "data_prep.prepare",
        "data_prep.scores",
        "data_prep.snapshots",
        "data_prep.export",
        "data_prep.upkeep",
        "data_prep.shapes",
    ),
    "training": (
        "training.kernels",
        "training.model",
        "training.model.published",
        "training.diffusion",
        "training.encoders",
        "training.loader",
    ),
    "pipelines": (
        "pipelines.recipes",
        "pipelines.evaluation",
        "pipelines.pictures",
        "pipelines.sample",
        "pipelines.page",
        "pipelines.stages",
    ),
}

# Each outside system is reached in the files named here and nowhere else.
ONLY_IN = {
    "boto3": {"infra/store/s3.py"},
    "botocore": {"infra/store/s3.py"},
    "mlflow": {"infra/tracking.py"},
    "deepspeed": {"training/engine.py", "training/zero.py"},
}

FILES = sorted(path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name, so that the floor can be seen"
            found.add(node.module or "")
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def modules_in(path: Path) -> set[str]:
    """The files of ours that a file imports, those that only types ask for as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner if inner in MODULES else node.module or ""} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found - {module_of(path)}


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_there_are_files_on_every_floor():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path):
    floor = path.relative_to(ROOT).parts[0]
    others = roots(path) & MAY_IMPORT.keys() - {floor}
    assert others <= MAY_IMPORT[floor], f"{floor} may not import {others - MAY_IMPORT[floor]}"
    assert "tests" not in roots(path)


def place_of(module: str) -> int:
    """Where its room stands among those of its floor."""
    rooms = ROOMS[module.partition(".")[0]]
    within = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return rooms.index(max(within, key=len)) if within else len(rooms)


def test_rooms_import_those_before_them_only():
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module.partition(".")[0] in ROOMS
        for other in modules_in(path)
        if other.partition(".")[0] == module.partition(".")[0] != other and place_of(other) > place_of(module)
    ]
    assert not wrong


def test_no_file_leads_back_to_itself():
    graph = {module: modules_in(path) for module, path in MODULES.items()}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, "these import each other in a circle, or lead to such"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_systems_have_one_door(path: Path):
    for system, allowed in ONLY_IN.items():
        if system in roots(path):
            assert str(path.relative_to(ROOT)) in allowed, f"{system} belongs in {allowed}"


def test_ray_is_started_in_one_place():
    starters = {str(p.relative_to(ROOT)) for p in FILES if "ray.init(" in p.read_text(encoding="utf-8")}
    assert starters == {"infra/cluster.py"}


def test_the_ground_has_no_torch():
    for path in (ROOT / "infra").rglob("*.py"):
        assert not roots(path) & {"torch", "transformers"}, path


# Names of metrics that begin as a folder of the store does.
METRICS = {"data/truncated_captions", "data/unreadable", "data/wait_share"}


def spelt_keys(path: Path) -> Iterator[str]:
    """The texts of a file that begin as a key of the store does; docstrings tell of keys, and may."""
    from infra import layout

    roots = {
        place.spelling.split("/")[0] for place in (*layout.PLACES, *layout.FOLDERS, layout.TRAINING, layout.IMPORTED)
    }
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            root, slash, _ = node.value.partition("/")
            if slash and root in roots and node.value not in METRICS:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"


def test_keys_are_spelt_in_one_place():
    found = [key for path in FILES if path.name != "layout.py" for key in spelt_keys(path)]
    assert not found, f"ask infra/layout.py for these: {found}"


def test_no_other_top_level_folder():
    known = {*MAY_IMPORT, "tests"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= known


@pytest.mark.parametrize(
    "module", ["orchestration.cli", "infra.config", "infra.store", "infra.records", "pipelines.recipes"]
)
def test_light_modules_import_nothing_heavy(module: str):
    heavy = ("torch", "ray", "mlflow", "transformers", "deepspeed", "boto3", "pyarrow", "numpy", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", f"importing {module} pulls in {result.stdout.strip()}"
