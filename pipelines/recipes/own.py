"""A recipe for somebody's own corpus, in words: what a look at it found, and settings that fit it and a laptop.

The text is for people who have read no other recipe, so every line that may be changed says what it does. It is made of
strangers' names and columns; they are quoted where they are values, and plain where a comment repeats them.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any, NamedTuple

import yaml

from data_prep.survey import Survey
from infra.text import printable

MOST_WORDS = 40  # of a caption that a small network reads
SIDE, PATCH = 64, 16  # of the pictures, and of the network's patches
STEPS, BATCH, RANKS = 600, 32, 2  # for two minutes or three on two cores
VOCABULARY = 2048
WIDTH = 116


class Fit(NamedTuple):
    """What fits the corpus."""

    side: int
    patch: int
    tokens: int
    held_out: float
    shown: int  # captions that are drawn


def fit(found: Survey) -> Fit:
    short = found.shorter_side
    side = SIDE if short is None or short >= SIDE else max(16, short // 16 * 16)
    tokens = min(MOST_WORDS, max(10, found.longest)) * 3 // 2 // 8 * 8 + 8
    # Some captions to draw, whatever the size of the corpus, and no more pictures kept from training than that takes.
    held_out = min(0.2, max(0.01, round(15 / max(1, found.pictures), 3)))
    return Fit(side, PATCH if side >= SIDE else PATCH // 2, tokens, held_out, 8)


def written(name: str, path: str, out: str, found: Survey) -> str:
    """The recipe's text."""
    chosen = fit(found)
    parts = (
        _head(name, path, out, found),
        _prepare(found, chosen),
        _data(chosen),
        _training(found, chosen),
        _ends(name, chosen),
    )
    return "\n".join(parts)


def _head(name: str, path: str, out: str, found: Survey) -> str:
    many = f"{found.pictures:,}" if found.counted else f"about {found.pictures:,}"
    sizes = f", nearly all {found.shorter_side} px and larger" if found.shorter_side else ""
    said = f"{many} pictures{sizes}, with captions of about {found.words:g} words."
    return "\n".join(
        [
            *_comment(f"`pixnerd new {path}` found {said}"),
            "#",
            f"#     pixnerd run {out}              # prepare, train, draw: some four minutes on two cores",
            f"#     pixnerd run {out} --dry-run    # only say what would be done",
            "#",
            *_comment(
                f"What is made lies in runs/{name}, or where --store says. Change a line and run it again: what the "
                "change does not touch is reused."
            ),
            *(line for warning in found.warnings for line in _comment(f"Note: {warning}.")),
            f"name: {_value(name)}",
            "",
            "stages:",
        ]
    )


def _prepare(found: Survey, chosen: Fit) -> str:
    short = found.shorter_side
    larger = next((side for side in (512, 256, 128) if short is None or short >= side), None)
    more = f"; [{chosen.side}, {larger}] prepares {larger} px as well" if larger and larger > chosen.side else ""
    lines = [
        *_comment(
            "The pictures are cut square, resized and packed into shards. `pixnerd data show` tells of all.",
            2,
        ),
        "  prepare:",
        "    kind: prepare",
        "    sources:",
    ]
    for source, remarks in zip(found.sources, found.remarks, strict=True):
        lines += _source(source, remarks)
    lines += [f"    sizes: [{chosen.side}]{' ' * 20}# sides in pixels{more}", *_fetch(found), ""]
    return "\n".join(lines)


def _source(source: Mapping[str, Any], remarks: Mapping[str, str]) -> list[str]:
    lines = []
    for number, (key, value) in enumerate(source.items()):
        line = f"      {'-' if not number else ' '} {key}: {_value(value)}"
        remark = printable(remarks.get(key, ""))
        if remark and len(line) + len(remark) + 4 > WIDTH:
            lines += _comment(f"{key}: {remark}", 8) if number else []
            remark = ""
        lines.append(f"{line}{'  # ' if remark else ''}{remark}")
    return lines


def _fetch(found: Survey) -> list[str]:
    """How downloads are made, where the corpus is a list of URLs."""
    hosts = found.hosts
    if hosts is None:
        return []
    if hosts.fetch and not hosts.public:
        said = f"{', '.join(hosts.private[:3])} lies inside of a network: nothing there is asked without this"
        return [*_comment(said, 4), f"    fetch: {_value(hosts.fetch)}"]
    lines = _comment("What site owners see of you; and if servers are inside of your own network:", 4)
    return [*lines, '    # fetch: {contact: "https://example.org/crawler", allow_networks: [10.0.0.0/8]}']


def _data(chosen: Fit) -> str:
    about = (
        "What training reads. The filter may ask for more (original_width >= 512), `captions: {KIND: 1}` chooses among "
        "several, and what is held out no training sees: its captions are drawn at the end."
    )
    return "\n".join(
        [
            *_comment(about, 2),
            "  data:",
            "    kind: snapshot",
            "    shards: prepare",
            f"    size: {chosen.side}",
            "    filter: not duplicate",
            f"    held_out: {chosen.held_out:g}",
            "",
        ]
    )


def _training(found: Survey, chosen: Fit) -> str:
    about = (
        "A small Qwen3 with a tokenizer of these captions, so that no hub is needed. For Qwen3-1.7B leave out this "
        "stage, and `encoders` and `train_text` below."
    )
    seen = STEPS * BATCH / max(1, found.pictures)
    times = f"each picture is seen {seen:.0f} times" if seen >= 2 else f"{STEPS * BATCH:,} pictures are seen"
    steps = f"    steps: {STEPS}"
    return "\n".join(
        [
            *_comment(about, 2),
            f"  encoders: {{kind: encoders, captions: data, text: {{vocab: {VOCABULARY}}}}}",
            "",
            *_comment("PixNerd, as small as it goes; more steps give better pictures.", 2),
            "  train:",
            "    kind: train",
            "    preset: tiny",
            "    data: data",
            "    encoders: encoders",
            "    train_text: 2               # both layers of the small Qwen3 learn along: it starts from nothing",
            f"    model: {{patch_size: {chosen.patch}, text_tokens: {chosen.tokens}, prediction: image}}",
            f"{steps:<32}# {times}",
            f"    batch: {BATCH}",
            f"    workers: {RANKS}                  # processes, one for each core or GPU",
            "    optim: {schedule: cosine, final: 0.1}",
            "",
        ]
    )


def _ends(name: str, chosen: Fit) -> str:
    return "\n".join(
        [
            *_comment("Pictures for captions that training never saw, beside those that have them; and the page.", 2),
            "  samples:",
            "    kind: sample",
            "    checkpoint: train",
            "    data: data",
            f"    count: {chosen.shown}",
            "    prompts: []                 # of your own, drawn as well",
            "    sampling: {steps: 16, guidance: 2.0}",
            f"  report: {{kind: report, title: {_value(name)}}}",
            "",
        ]
    )


def _comment(said: str, indent: int = 0) -> list[str]:
    start = f"{' ' * indent}# "
    return wrap(printable(said), WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _value(value: Any) -> str:
    """As YAML, in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()
