"""An evaluation on a Ray of several nodes, of which some die: `python -m tests.pipelines.nodes STORE CHECKPOINT_KEY`.

It prints how many have died.
"""

from __future__ import annotations

import sys

from infra.records import CheckpointRecord, read_record
from infra.store import open_store
from pipelines.evaluation.run import geneval
from tests.nodes import joined
from tests.pipelines.test_evaluation import STAGE, settings


def main() -> None:
    print(evaluated(*sys.argv[1:]))


def evaluated(url: str, key: str) -> int:
    """How many nodes died: one in drawing and one in judging, of those that had an actor."""
    store, died = open_store(url), set[str]()
    with joined(4) as nodes:

        def show(text: str, done: int, total: int) -> None:
            noun = text.partition(" of ")[2].partition(" ")[2]
            if noun not in died and done < total and nodes.kill_one_with(b"ray::_Actor"):
                died.add(noun)

        geneval(store, STAGE, read_record(store, key, CheckpointRecord), settings(workers=2), show)
    return len(died)


if __name__ == "__main__":
    main()
