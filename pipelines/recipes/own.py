"""The recipe that `pixnerd new` writes: YAML for a user's own corpus, with settings that fit the corpus and a laptop.

It is written for people who have read no other recipe, so every line that may be changed says what it does. Names and
columns come from the corpus and may hold anything: values are quoted as YAML, comments repeat them as printable text.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any, NamedTuple

import yaml

from data_prep.survey import Survey
from infra.text import printable

MOST_WORDS = 40  # that a small network reads of a caption
SIDE, PATCH = 64, 16  # in pixels: of the pictures, and of the network's patches
STEPS, BATCH, RANKS = 600, 32, 2  # two to three minutes of training on two cores
VOCABULARY = 2048
WIDTH = 116  # of a line


class Fit(NamedTuple):
    """Settings that are chosen by the corpus."""

    side: int
    patch: int
    tokens: int
    held_out: float
    drawn: int  # captions that the run draws at its end


def fit(survey: Survey) -> Fit:
    short = survey.shorter_side
    side = SIDE if short is None or short >= SIDE else max(16, short // 16 * 16)
    tokens = min(MOST_WORDS, max(10, survey.longest)) * 3 // 2 // 8 * 8 + 8
    # About 15 samples, enough captions to draw; at least 1 % and, of a tiny corpus, at most a fifth.
    held_out = min(0.2, max(0.01, round(15 / max(1, survey.pictures), 3)))
    return Fit(side, PATCH if side >= SIDE else PATCH // 2, tokens, held_out, 8)


def written(name: str, path: str, out: str, survey: Survey) -> str:
    """The recipe's text."""
    fitting = fit(survey)
    lines = [
        *_head(name, path, out, survey),
        *_prepare(survey, fitting),
        *_data(fitting),
        *_training(survey, fitting),
        *_ends(name, fitting),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, path: str, out: str, survey: Survey) -> list[str]:
    count = f"{survey.pictures:,}" if survey.counted else f"about {survey.pictures:,}"
    sizes = f", nearly all {survey.shorter_side} px and larger" if survey.shorter_side else ""
    captions = f"with captions of about {survey.words:g} words"
    reuse = (
        f"What is made lies in runs/{name}, or where --store says. Change a line and run it again: what the change "
        "does not touch is reused."
    )
    return [
        *_comment(f"`pixnerd new {path}` found {count} pictures{sizes}, {captions}."),
        "#",
        f"#     pixnerd run {out}              # prepare, train, draw: some four minutes on two cores",
        f"#     pixnerd run {out} --dry-run    # only say what would be done",
        "#",
        *_comment(reuse),
        *(line for warning in survey.warnings for line in _comment(f"Note: {warning}.")),
        f"name: {_value(name)}",
        "",
        "stages:",
    ]


def _prepare(survey: Survey, fitting: Fit) -> list[str]:
    short = survey.shorter_side
    larger = next((side for side in (512, 256, 128) if short is None or short >= side), None)
    more = f"; [{fitting.side}, {larger}] prepares {larger} px as well" if larger and larger > fitting.side else ""
    return [
        *_comment("The pictures are cut square, resized and packed into shards. `pixnerd data show` tells of all.", 2),
        "  prepare:",
        "    kind: prepare",
        "    sources:",
        *(line for pair in zip(survey.sources, survey.remarks, strict=True) for line in _source(*pair)),
        f"    sizes: [{fitting.side}]{' ' * 20}# sides in pixels{more}",
        *_fetch(survey),
        "",
    ]


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


def _fetch(survey: Survey) -> list[str]:
    """How downloads are made, if the corpus is a list of URLs."""
    hosts = survey.hosts
    if hosts is None:
        return []
    if hosts.fetch and not hosts.public:
        reason = f"{', '.join(hosts.private[:3])} lies inside of a network: nothing there is asked without this"
        return [*_comment(reason, 4), f"    fetch: {_value(hosts.fetch)}"]
    lines = _comment("What site owners see of you; and if servers are inside of your own network:", 4)
    return [*lines, '    # fetch: {contact: "https://example.org/crawler", allow_networks: [10.0.0.0/8]}']


def _data(fitting: Fit) -> list[str]:
    about = (
        "What training reads. The filter may ask for more (original_width >= 512), `captions: {KIND: 1}` chooses among "
        "several, and what is held out no training sees: its captions are drawn at the end."
    )
    return [
        *_comment(about, 2),
        "  data:",
        "    kind: snapshot",
        "    shards: prepare",
        f"    size: {fitting.side}",
        "    filter: not duplicate",
        f"    held_out: {fitting.held_out:g}",
        "",
    ]


def _training(survey: Survey, fitting: Fit) -> list[str]:
    about = (
        "A small Qwen3 with a tokenizer of these captions, so that no hub is needed. For Qwen3-1.7B leave out this "
        "stage, and `encoders` and `train_text` below."
    )
    seen = STEPS * BATCH / max(1, survey.pictures)
    times = f"each picture is seen {seen:.0f} times" if seen >= 2 else f"{STEPS * BATCH:,} pictures are seen"
    steps = f"    steps: {STEPS}"
    return [
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
        f"    model: {{patch_size: {fitting.patch}, text_tokens: {fitting.tokens}, prediction: image}}",
        f"{steps:<32}# {times}",
        f"    batch: {BATCH}",
        f"    workers: {RANKS}                  # processes, one for each core or GPU",
        "    optim: {schedule: cosine, final: 0.1}",
        "",
    ]


def _ends(name: str, fitting: Fit) -> list[str]:
    return [
        *_comment("Pictures for captions that training never saw, beside those that have them; and the page.", 2),
        "  samples:",
        "    kind: sample",
        "    checkpoint: train",
        "    data: data",
        f"    count: {fitting.drawn}",
        "    prompts: []                 # of your own, drawn as well",
        "    sampling: {steps: 16, guidance: 2.0}",
        f"  report: {{kind: report, title: {_value(name)}}}",
    ]


def _comment(text: str, indent: int = 0) -> list[str]:
    start = f"{' ' * indent}# "
    return wrap(printable(text), WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _value(value: Any) -> str:
    """The value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()
