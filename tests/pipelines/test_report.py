"""The page, from a workflow made by hand: its figures are the records', it adds up, and nothing in it can hurt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.records import EvalReport, Interval, Output, PrepareSummary, StageRecord, Verdict, put_data, write_record
from infra.shards import parquet_bytes
from infra.store import Store, open_store
from pipelines.evaluation.statistics import ends
from pipelines.page.elements import duration
from pipelines.page.graph import Box, arrange, graph
from pipelines.page.markup import tag
from pipelines.page.plots import Axis, Line, lines
from pipelines.page.report import build
from tests.pipelines.small_story import Made, evaluate, make

VOID = {"br", "col", "hr", "img", "link", "meta"}
TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr", "overall"]
HOSTILE = "\"'><script>alert(1)</script></title></style><img src=x onerror=alert(2)>"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, class_: str = "") -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (not class_ or class_ in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.all(tag, class_)

    def one(self, tag: str, class_: str = "") -> Element:
        (found,) = self.all(tag, class_)
        return found

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def section(self, title: str) -> Element:
        (found,) = (section for section in self.all("section") if section.one("h2").text() == title)
        return found

    def rows(self) -> list[list[str]]:
        cells = [[c for c in row.children if isinstance(c, Element)] for row in self.one("tbody").all("tr")]
        return [[cell.text().strip() for cell in row] for row in cells]


class Strict(HTMLParser):
    """A tree of elements; every tag must be closed, in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"not closed: {[element.tag for element in parser.open]}"
    return parser.root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(open_store(str(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="module")
def page(made: Made) -> Element:
    return parse(build(made.store, "A small story", made.stages))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def own(store: Store) -> Made:
    """A workflow that a test may spoil."""
    return make(store, per_task=2, images=1, rows=1)


def shown(made: Made) -> Element:
    return parse(build(made.store, "A small story", made.stages))


def changed(stage: StageRecord, change: dict[str, Any]) -> StageRecord:
    output = stage.output.model_copy(update=change.get("output", {}))
    return stage.model_copy(update={**change, "output": output})


def spoilt(made: Made, stage: str, **change: Any) -> Element:
    stages = [changed(s, change) if s.stage == stage else s for s in made.stages]
    return parse(build(made.store, "A small story", stages))


# ------------------------------------------------------------------------------------------------ figures


def test_every_score_is_the_reports(made: Made, page: Element) -> None:
    table = page.one("table", "scores")
    reports = [made.named[f"{name}_score"] for name in ("low", "high", "sft")]
    assert [cell.text() for cell in table.one("thead").all("th")] == [
        "",
        "low low_score",
        "high high_score",
        "sft sft_score",
    ]
    assert [next(row.all("span")).attributes["title"] for row in table.one("tbody").all("tr")] == [
        f"geneval/{task}" for task in TASKS
    ]
    for task, row in zip(TASKS, table.rows(), strict=True):
        scores = [report.scores[f"geneval/{task}"] for report in reports]
        assert row[1:] == [f"{score.value:.3f} {ends(score)}" for score in scores]


def test_the_head_tells_of_the_judged_model(made: Made, page: Element) -> None:
    score = made.named["sft_score"].scores["geneval/overall"]
    head = page.one("header")
    assert f"scores {score.value:.3f} on geneval/overall" in head.one("p", "lead").text()
    assert next(head.one("dl").all("small")).text() == "no 95 % interval"
    assert [tile.text() for tile in head.one("dl").all("b")] == [
        f"{score.value:.3f}",
        "3.08\xa0M",
        f"{3 * 3 * 20 * 64:,}",  # three stages of three rows
        duration(sum(stage.seconds for stage in made.stages)),
    ]
    verdict = head.one("p", "verdict").text()
    assert "Gate passed" in verdict
    assert f"✓ geneval/overall {score.value:.3f} is at least 0.100" in verdict
    assert "pixnerd-demo version 3, alias champion" in verdict


def test_the_gate_says_which_evaluation_is_the_models(own: Made) -> None:
    works = {stage.stage: stage.digest_of_work for stage in own.stages}
    judged = own.named["high_score"].scores["geneval/overall"]
    page = spoilt(own, "gate", inputs={"scores.0": works["high_score"], "scores.1": works["low_score"]})
    assert next(page.one("dl").all("b")).text() == f"{judged.value:.3f}"
    assert "in 2 training stages" in page.one("p", "lead").text()


def test_a_closed_gate_and_no_model(own: Made) -> None:
    rule = Verdict(score="geneval/overall", value=0.5, limit="at least 0.600", passed=False)
    own.stages.pop()
    verdict = spoilt(own, "gate", output={"passed": False, "verdicts": [rule]}).one("p", "verdict").text()
    assert "Gate closed✗ geneval/overall 0.500 is not at least 0.600" in verdict
    assert "Not registered" in verdict


def test_lineage_is_that_of_the_digests(made: Made, page: Element) -> None:
    checkpoint, report = made.named["high"], made.named["high_score"]
    row = page.one("table", "lineage").rows()[1]
    value = f"{report.scores['geneval/overall'].value:.3f}"
    assert row == [
        "high",
        f"{made.named['high_data'].digest()[:8]} high_data, {made.named['high_data'].rows:,} samples",
        f"{made.named['low'].digest()[:8]} low",
        f"{checkpoint.digest()[:8]} step {checkpoint.step:,}, {checkpoint.position:,} images",
        f"{value} {report.digest()[:8]} geneval/overall, high_score",
    ]


def test_too_few_prompts_for_an_interval_are_told_of(own: Made) -> None:
    assert "–: no interval, as there are fewer than 6 prompts a task" in shown(own).text()
    scores = {name: Interval(value=0.5, low=0.4, high=0.6) for name in own.named["sft_score"].scores}
    write_record(own.store, "records/known.json", own.named["sft_score"].model_copy(update={"scores": scores}))
    page = spoilt(own, "sft_score", output={"record": "records/known.json"})
    assert "scores 0.500 [0.400, 0.600] on geneval/overall" in page.one("p", "lead").text()
    assert next(page.one("header").one("dl").all("small")).text() == "95 % interval [0.400, 0.600]"


def test_evaluations_of_other_prompts_stand_in_a_table_of_their_own(own: Made) -> None:
    evaluate(own, "more", "sft", 0.9, per_task=1, images=1)
    tables = list(shown(own).all("table", "scores"))
    assert [len(list(table.one("thead").all("th"))) for table in tables] == [4, 2]


def test_scores_of_other_protocols(own: Made) -> None:
    names = ("dpg/relation", "dpg/overall", "dpg/entity")
    scores = {name: Interval(value=83.2, low=81.0, high=85.5) for name in names}
    report = own.named["sft_score"].model_copy(update={"protocol": "dpg", "scores": scores})
    write_record(own.store, "records/dpg.json", report)
    page = spoilt(own, "sft_score", output={"record": "records/dpg.json"})
    assert [row[0] for row in list(page.all("table", "scores"))[1].rows()] == ["entity", "relation", "overall"]
    assert "scores 83.200 [81.000, 85.500] on dpg/overall" in page.one("p", "lead").text()
    circle = list(page.all("circle", "value"))[-1]
    assert 4 < float(str(circle.attributes["cx"])) < 136  # on a scale that reaches as far as the scores


# ------------------------------------------------------------------------------------------------ samples


def test_samples_have_the_same_prompts_in_every_column(page: Element) -> None:
    rows = [
        row
        for row in page.section("Samples").one("div", "grid").all("div", "samples")
        if "head" not in str(row.attributes["class"])
    ]
    assert len(rows) == 12  # two of each task
    tasks = [next(row.one("div", "prompt").all("small")).text() for row in rows]
    assert tasks == [task.replace("_", " ") for task in TASKS[:-1] for _ in range(2)]
    for row in rows:
        asked = row.one("div", "prompt").one("bdi").text()
        pictures = list(row.all("span", "tile"))
        assert len(pictures) == 6  # two seeds, three stages
        for number, picture in enumerate(pictures):
            said = str(picture.attributes["title"])
            assert said.startswith(f"{asked}\nseed {number % 2}, ")
            assert ("wrong" in str(picture.attributes["class"])) == ("wrong: " in said)
            assert picture.one("img").attributes["class"] == "pixels"


def test_wrong_pictures_are_counted_and_explained(made: Made, page: Element) -> None:
    right = wrong = 0
    for cell in page.section("Samples").one("div", "grid").all("div"):
        if not any(isinstance(child, Element) and child.tag == "p" for child in cell.children):
            continue
        marked = list(cell.all("span", "wrong"))
        said = cell.one("p")
        assert said.one("b").text() == f"{2 - len(marked)} of 2 "
        for tile in marked:
            assert str(tile.attributes["title"]).partition("wrong: ")[2] in said.one("bdi").text()
        right, wrong = right + 2 - len(marked), wrong + len(marked)
    assert right > 0
    assert wrong > 0


def test_large_pictures_become_thumbnails(own: Made) -> None:
    evaluate(own, "large", "sft", 0.9, per_task=2, images=1, size=400)
    html = build(own.store, "large", own.stages)
    assert len(html) < 600_000
    assert any(str(image.attributes["src"]).startswith("data:image/jpeg") for image in parse(html).all("img"))


# ------------------------------------------------------------------------------------------------ inputs


def test_the_inputs_add_up_and_the_page_says_so(made: Made, page: Element) -> None:
    section = page.section("What became of every input")
    rows = [[cell.text() for cell in row.all("span", "number")] for row in section.one("table", "counts").all("tr")][1:]
    causes = [row[0] for row in section.one("table", "counts").rows()]
    assert causes == ["accepted", "too many pixels", "too small", "truncated", "unknown format"]
    assert [sum(int(row[size]) for row in rows) for size in (0, 1)] == [200, 200]
    checks = [check.text() for check in section.all("p", "check")]
    assert checks[0] == "✓ 16 px: 195 accepted + 5 rejected = all 200 inputs"
    rows_of = made.named["low_data"].rows
    assert checks[2] == f"✓ {rows_of} training + {193 - rows_of} held out + 2 filtered out = all 195 accepted"
    assert len(checks) == 5
    assert all(check.startswith("✓") for check in checks)


def test_an_input_that_vanished_is_told(own: Made) -> None:
    sizes = own.stages[1].of(PrepareSummary).sizes
    lost = sizes["32"].model_copy(update={"accepted": 194})
    page = spoilt(own, "prepare", output={"sizes": sizes | {"32": lost}})
    bad = [check.text() for check in page.all("p", "bad")]
    assert bad[0] == "✗ 32 px: 194 accepted + 5 rejected are not the 200 inputs"
    assert len(bad) == 3  # and the two snapshots that begin with 195


def test_a_snapshot_that_loses_a_sample_is_told(own: Made) -> None:
    record = own.named["low_data"].model_copy(update={"held_out_rows": 0})
    write_record(own.store, "records/other.json", record)
    page = spoilt(own, "low_data", output={"record": "records/other.json"})
    assert len(list(page.all("p", "bad"))) == 1


def test_every_kind_of_file_has_a_fate(page: Element) -> None:
    rows = {row[0].split()[0]: row for row in page.one("table", "fates").rows()}
    assert sum(int(row[1]) for row in rows.values()) == 200
    assert rows["truncated"][1:7] == ["2", "0", "2 truncated", "0", "0", "0"]
    assert rows["bomb"][1:7] == ["1", "0", "1 too many pixels", "0", "0", "0"]
    assert rows["duplicate"][1:7] == ["2", "2", "0", "0", "0", "0"]
    assert rows["rotated"][1:7] == ["2", "2", "0", "2", "2", "2"]


# ------------------------------------------------------------------------------------------------ safety


def test_nothing_is_fetched_and_nothing_runs(page: Element, made: Made) -> None:
    for element in walk(page):
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset"):
                assert str(value).startswith(("data:image/png;", "data:image/jpeg;", "#"))
    html = build(made.store, "A small story", made.stages)
    assert "@import" not in html
    assert set(re.findall(r"url\([^)]*\)", html)) == {"url(#arrow)"}
    assert not re.search(r"https?:", html)
    policy = next(meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    assert str(policy.attributes["content"]).startswith("default-src 'none'")
    anchors = {str(element.attributes.get("id")) for element in walk(page)}
    assert {str(a.attributes["href"])[1:] for a in page.all("a")} <= anchors


def walk(element: Element) -> Iterator[Element]:
    for child in element.children:
        if isinstance(child, Element):
            yield child
            yield from walk(child)


def test_hostile_words_stay_words(own: Made) -> None:
    report: EvalReport = own.named["sft_score"]
    details = [
        {"task": HOSTILE, "prompt": 0, "text": HOSTILE, "image": 0, "correct": False, "reasons": HOSTILE},
        {"task": "counting", "prompt": 1, "text": "\u202egnorw", "image": 0, "correct": True, "reasons": ""},
    ]
    spoken = report.model_copy(
        update={
            "judge": HOSTILE,
            "details": put_data(own.store, "bad", "bad.parquet", parquet_bytes(pa.Table.from_pylist(details))),
            "scores": {f"geneval/{HOSTILE}": report.scores["geneval/overall"]},
        }
    )
    write_record(own.store, "records/bad.json", spoken)
    sizes = {HOSTILE: own.stages[1].of(PrepareSummary).sizes["16"].model_copy(update={"rejected": {HOSTILE: 5}})}
    bad: dict[str, dict[str, Any]] = {
        "sft_score": {"output": {"record": "records/bad.json"}, "stage": HOSTILE, "started": HOSTILE},
        "prepare": {"output": {"sizes": sizes}, "versions": {HOSTILE: HOSTILE}},
        "register": {"output": {"model": HOSTILE, "version": HOSTILE, "alias": HOSTILE}, "kind": "register"},
        "low": {"stage": HOSTILE, "settings": {HOSTILE: [{"a": HOSTILE}]}, "kind": "train"},
    }
    stages = [changed(stage, bad.get(stage.stage, {})) for stage in own.stages]
    page = parse(build(own.store, HOSTILE, stages))
    assert not list(page.all("script"))
    assert all(str(image.attributes["src"]).startswith("data:") for image in page.all("img"))
    assert all(not name.startswith("on") for element in walk(page) for name in element.attributes)
    assert page.one("head").one("title").text() == page.one("h1").text() == HOSTILE
    assert HOSTILE in [bdi.text() for bdi in page.all("bdi")]


@given(st.text(alphabet=st.characters(), max_size=20))
def test_any_text_survives_markup(said: str) -> None:
    root = parse(tag("p", said, title=said))
    plain = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", said)
    assert root.one("p").text() == root.one("p").attributes["title"] == plain
    tag("p", said).encode()


# ------------------------------------------------------------------------------------------------ what is missing


def test_a_page_at_every_point_of_the_way(own: Made) -> None:
    for count in range(len(own.stages) + 1):
        page = parse(build(own.store, "so far", own.stages[:count]))
        assert len(list(page.all("details"))) == count
        assert not list(page.one("footer").all("p", "bad"))
    assert parse(build(own.store, "so far", own.stages[:-1])).one("p", "verdict").text().endswith("Not registered")


def test_without_what_came_before(own: Made) -> None:
    page = parse(build(own.store, "the end alone", own.stages[-5:]))
    assert "a stage that is not on this page" in page.text()
    assert page.one("table", "scores").rows()


class PolishOutput(Output, kind="polish_shoes"):
    shine: int


def test_a_kind_of_stage_that_it_does_not_know(own: Made) -> None:
    own.stage("polish", "polish_shoes", {"shine": 1}, settings={"brush": "soft"}, data="prepare")
    page = shown(own)
    assert "polish shoes" in page.one("svg", "graph").text()
    assert "brush" in page.section("Settings and versions").text()


def test_a_curve_of_one_row_and_none(own: Made) -> None:
    assert len(list(shown(own).all("svg", "chart"))) == 4  # its stages have one row each
    bare = own.named["low"].model_copy(update={"curve": None})
    write_record(own.store, "records/bare.json", bare)
    first = [stage for stage in own.stages if stage.stage in ("corpus", "low")]
    first[1] = changed(first[1], {"output": {"record": "records/bare.json"}})
    page = parse(build(own.store, "bare", first))
    assert not list(page.all("svg", "chart"))


@pytest.mark.parametrize("stage", ["low_data", "sft", "high_score"])
def test_a_removed_record_is_named_as_missing(own: Made, stage: str) -> None:
    own.store.delete(f"records/{stage}.json")
    page = shown(own)
    (lost,) = page.one("footer").all("p", "bad")
    assert stage in lost.text()
    assert stage in page.one("svg", "graph").text()


def test_removed_data_is_named_and_the_record_still_counts(own: Made) -> None:
    own.store.delete(own.named["high_score"].details.key)
    own.store.delete(own.named["low"].curve.key)
    page = shown(own)
    assert len(list(page.one("footer").all("p", "bad"))) == 2
    assert len(page.one("table", "lineage").rows()) == 3
    assert len(list(page.one("table", "scores").one("thead").all("th"))) == 4


def test_a_picture_that_failed_has_its_place(own: Made) -> None:
    report = own.named["sft_score"].model_copy(update={"pictures": [], "failed": 12})
    write_record(own.store, "records/failed.json", report)
    page = spoilt(own, "sft_score", output={"record": "records/failed.json"})
    assert len(list(page.section("Samples").one("div", "grid").all("span", "none"))) == 12
    assert "count as wrong: 12 of sft_score" in page.section("Scores").text()


def test_it_says_the_same_again(own: Made) -> None:
    assert build(own.store, "twice", own.stages) == build(own.store, "twice", own.stages)


# ------------------------------------------------------------------------------------------------ charts


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 30), max_size=3)), max_size=12))
def test_boxes_stand_apart_and_right_of_what_they_read(drawn: list[tuple[int, list[int]]]) -> None:
    lanes = [lane for lane, _ in drawn]
    parents = [sorted({p % k for p in above}) if k else [] for k, (_, above) in enumerate(drawn)]
    columns = arrange(lanes, parents)
    assert len(set(zip(lanes, columns, strict=True))) == len(lanes)
    for k, above in enumerate(parents):
        for p in above:
            assert columns[p] + (lanes[p] == lanes[k]) <= columns[k]
    boxes = [Box(str(k), "", "", "red", "", "#", lane, tuple(parents[k])) for k, lane in enumerate(lanes)]
    assert len(list(parse(graph(boxes)).all("path", "edge"))) == sum(map(len, parents))


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.booleans())
def test_ticks_are_few_round_and_on_the_axis(a: float, b: float, log: bool) -> None:
    axis = Axis(min(a, b), max(a, b), 0, 100, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(-0.1 <= axis(tick) <= 100.1 for tick in ticks)


def test_a_long_line_is_thinned_but_keeps_its_gaps_and_its_end() -> None:
    points = [(float(k), None if k == 500 else float(k)) for k in range(1001)]
    chart = lines([Line("long", "red", points)], "chart", marks={})
    assert chart is not None
    drawn = list(parse(chart).all("polyline"))
    assert len(drawn) == 2
    assert sum(len(str(line.attributes["points"]).split()) for line in drawn) < 160
    assert "long: 1000 at 1,000 images" in chart
    assert lines([Line("empty", "red", [(1.0, None), (2.0, float("nan"))])], "chart", marks={}) is None


def test_stages_go_on_where_their_weights_left_off(made: Made, page: Element) -> None:
    said = next(page.all("svg", "chart")).text()
    assert f"at {made.named['low'].position + 20 * 64:,} images" in said


def test_durations() -> None:
    said = [duration(seconds).replace("\xa0", " ") for seconds in (0.04, 9.94, 9.96, 59.7, 237.2, 3599.6, 7260)]
    assert said == ["0.0 s", "9.9 s", "10 s", "1 min 00 s", "3 min 57 s", "1 h 00 min", "2 h 01 min"]


def test_training_without_a_snapshot_on_the_page(own: Made) -> None:
    kept = [stage for stage in own.stages if stage.kind != "snapshot"]
    assert len(parse(build(own.store, "no data", kept)).one("table", "lineage").rows()) == 3
