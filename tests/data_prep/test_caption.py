from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.scores import Failure, Row
from data_prep.scores.endpoint import MOST_BYTES, EndpointScorer
from data_prep.scores.replies import LONGEST, clean
from data_prep.scores.settings import EndpointSettings, VlmSettings
from data_prep.scores.vlm import VlmScorer
from infra.config import parse
from infra.errors import CheckpointError, PixnerdError, SettingsError
from tests.data_prep.small_scorers import build_vlm, said, sample, serve

# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  a dog\n\n on a\tmat ", "a dog on a mat"),
        ("a\x00 d\x1b[31mog\x7f", "a d[31mog"),
        ("half \ud83d a pair", "half a pair"),
        ("\u202egnirts\u202c", "gnirts"),
        ("cut in the mid\ufffd", "cut in the mid"),
        ("eine Katze, 猫, 🐈‍⬛", "eine Katze, 猫, 🐈‍⬛"),
        (" \x00\n", Failure.EMPTY_ANSWER),
        ("", Failure.EMPTY_ANSWER),
        ("a" * (LONGEST + 1), Failure.TOO_LONG),
        ("\n" * 10**7, Failure.TOO_LONG),
        ("a" * LONGEST, "a" * LONGEST),
    ],
)
def test_an_answer_becomes_a_caption(answer: str, text: str):
    assert clean(answer) == text


@given(st.text(st.characters(codec=None)))
def test_whatever_was_said_a_caption_is_one_line_of_utf8(answer: str):
    text = clean(answer)
    assert text
    if not isinstance(text, Failure):
        assert text.encode().decode() == text == clean(text)
        assert text.isprintable() or not any(ord(letter) < 32 for letter in text)


# ------------------------------------------------------------------------------------------------ transformers

SIZES = [(32, 32), (64, 32), (48, 64), (16, 80), (40, 40), (17, 23), (64, 64)]
ASKS = [
    {"kind": "short", "prompt": "A few words.", "max_tokens": 6},
    {"kind": "long", "prompt": "Describe everything in this picture at length.", "max_tokens": 24},
]


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    build_vlm(folder, request.param)
    return folder


def vlm_settings(folder: Path, **changes: Any) -> VlmSettings:
    given = {"kind": "vlm", "model": str(folder), "asks": ASKS, "dtype": "float32", "batch_size": 3}
    return parse(VlmSettings, given | changes)


def test_captions_of_a_batch_are_those_of_each_image_alone(vlm: Path):
    samples = [sample(number, *size) for number, size in enumerate(SIZES)]
    samples.insert(2, samples[0]._replace(image=b"\xff\xd8\xff no picture"))
    samples.insert(4, sample(9, 8, 8 * 250))
    alone = list(VlmScorer(vlm_settings(vlm, batch_size=1)).rows(samples))
    assert [row["captioner_failure"] for row in alone if "captions" not in row] == ["unreadable_image"] * 2
    texts = [[caption["text"] for caption in row["captions"]] for row in alone if "captions" in row]
    assert [[caption["kind"] for caption in row["captions"]] for row in alone if "captions" in row] == (
        [["short", "long"]] * len(SIZES)
    )
    assert len({short for short, _ in texts}) >= 4 and len({long for _, long in texts}) >= 4, "pictures matter"
    assert not any(long.startswith(short) for short, long in texts), "prompts matter"
    assert max(len(short) for short, _ in texts) <= 6 < max(len(long) for _, long in texts)
    for batch_size in (3, 32):
        assert list(VlmScorer(vlm_settings(vlm, batch_size=batch_size), threads=2).rows(samples)) == alone


def test_answers_of_several_lengths_in_one_batch(vlm: Path):
    """Some of these networks' answers end of themselves while others of the batch go on."""
    samples = [sample(number, *SIZES[number % len(SIZES)]) for number in range(20)]
    asks = [{"kind": "caption", "prompt": "Say it.", "max_tokens": 60}]
    rows = list(VlmScorer(vlm_settings(vlm, asks=asks, batch_size=10)).rows(samples))
    assert rows == list(VlmScorer(vlm_settings(vlm, asks=asks, batch_size=1)).rows(samples))
    assert len({len(row["captions"][0]["text"]) for row in rows}) > 1


def test_larger_pictures_are_made_smaller_where_asked(vlm: Path):
    full, less = VlmScorer(vlm_settings(vlm)), VlmScorer(vlm_settings(vlm, max_pixels=1024))
    picture = Image.open(io.BytesIO(sample(0, 64, 64).image))
    tokens = [
        scorer.processor(text=[scorer.prompts[0]], images=[picture], return_tensors="pt")["input_ids"].shape[1]
        for scorer in (full, less)
    ]
    assert tokens[0] - tokens[1] == (64 * 64 - 32 * 32) // 16**2


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        VlmScorer(vlm_settings(tmp_path))


def test_the_weights_name_the_captioner_and_not_their_place(vlm: Path, tmp_path: Path):
    settings = vlm_settings(vlm)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in vlm.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    (moved / "README.md").write_text("hello")
    assert vlm_settings(moved, batch_size=1).identity() == settings.identity()
    assert vlm_settings(vlm, dtype="bfloat16").identity() != settings.identity()
    (moved / "chat_template.jinja").write_text("another")
    assert vlm_settings(moved).identity() != settings.identity()


# ------------------------------------------------------------------------------------------------ an endpoint


def endpoint(url: str, **changes: Any) -> EndpointSettings:
    asks = [{"kind": "short", "prompt": "Briefly.", "max_tokens": 20}]
    quick = {"backoff": 0.0, "timeout": 20.0, "deadline": 30.0, "concurrency": 4, "retries": 2}
    return parse(EndpointSettings, {"kind": "endpoint", "url": url, "model": "a/vlm", "asks": asks} | quick | changes)


def captions(settings: EndpointSettings, count: int = 6) -> list[Row]:
    return list(EndpointScorer(settings).rows(sample(number) for number in range(count)))


def number_of(request: dict[str, Any]) -> int:
    """Which of the test's samples the request shows."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    return KNOWN[url.partition(",")[2]]


KNOWN = {base64.b64encode(sample(number).image).decode(): number for number in range(40)}


def test_every_image_is_asked_about_in_every_way_and_in_order():
    requests: list[dict[str, Any]] = []
    flying = peak = 0

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        nonlocal flying, peak
        flying, peak = flying + 1, max(peak, flying + 1)
        requests.append(body)
        await asyncio.sleep(0.002 * (number_of(body) % 3))  # answers come in another order
        flying -= 1
        return said(f"{body['messages'][0]['content'][1]['text']} {number_of(body)}")

    asks = [{"kind": kind, "prompt": kind, "max_tokens": length} for kind, length in (("short", 9), ("long", 99))]
    with serve(handler) as url:
        rows = captions(endpoint(url, asks=asks), 30)
    assert rows == [
        {
            "captions": [{"kind": kind, "text": f"{kind} {number}"} for kind in ("short", "long")],
            "captioner_failure": None,
        }
        for number in range(30)
    ]
    assert 1 < peak <= 4
    assert Counter(body["max_tokens"] for body in requests) == {9: 30, 99: 30}
    assert {(body["model"], body["temperature"], body["seed"]) for body in requests} == {("a/vlm", 0, 0)}
    for body in requests:
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        kind = ("jpeg", "png", "webp")[number_of(body) % 3]
        assert image.startswith(f"data:image/{kind};base64,")


def test_what_passes_is_tried_again():
    tries: Counter[int] = Counter()

    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        number = number_of(body)
        tries[number] += 1
        if tries[number] > 2 or number == 5:
            return said(f"picture {number}")
        if number == 0:
            return web.Response(status=429, headers={"Retry-After": "0"})
        if number == 1:
            return web.Response(status=503)
        if number == 2:
            return web.Response(text="<html>busy</html>")
        if number == 3:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=500)

    with serve(handler) as url:
        rows = captions(endpoint(url))
    assert [row["captions"][0]["text"] for row in rows] == [f"picture {number}" for number in range(6)]
    assert tries == {0: 3, 1: 3, 2: 3, 3: 3, 4: 3, 5: 1}


BAD_ANSWERS: dict[int, tuple[Any, Failure]] = {
    1: (said(None), Failure.EMPTY_ANSWER),
    2: (said(" \x00 "), Failure.EMPTY_ANSWER),
    3: (said(["a", "list"]), Failure.BAD_RESPONSE),
    4: (web.json_response([]), Failure.BAD_RESPONSE),
    5: (web.Response(body=b"\xff\xfe{"), Failure.BAD_RESPONSE),
    6: (web.Response(body=b"[" * 100_000), Failure.BAD_RESPONSE),
    7: (said("x" * MOST_BYTES), Failure.BAD_RESPONSE),
    8: (said("x" * (LONGEST + 1)), Failure.TOO_LONG),
    9: (web.Response(status=413), Failure.REFUSED),
    10: (web.Response(status=400, text="too many pixels"), Failure.REFUSED),
    11: (web.Response(status=502), Failure.SERVER_ERROR),
    12: (web.Response(status=429, headers={"Retry-After": "9" * 400}), Failure.SERVER_ERROR),
    13: (web.Response(body=gzip.compress(bytes(50 << 20)), headers={"Content-Encoding": "gzip"}), Failure.BAD_RESPONSE),
    14: (web.Response(body=b"no gzip", headers={"Content-Encoding": "gzip"}), Failure.BAD_RESPONSE),
    15: (web.json_response({"choices": [{"message": {"content": "\ud800"}}]}), Failure.EMPTY_ANSWER),
}


def test_bad_answers_are_counted_by_cause_and_never_end_the_work():
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        number = number_of(body)
        if number not in BAD_ANSWERS:
            return said("fine")
        response, _ = BAD_ANSWERS[number]
        return web.Response(status=response.status, headers=response.headers, body=response.body)

    with serve(handler) as url:
        rows = captions(endpoint(url, tolerated=1.0, retries=0), 17)
    assert {n: row["captioner_failure"] for n, row in enumerate(rows) if row["captioner_failure"]} == {
        number: cause.value for number, (_, cause) in BAD_ANSWERS.items()
    }
    assert [row["captions"] for n, row in enumerate(rows) if n in BAD_ANSWERS] == [None] * len(BAD_ANSWERS)
    assert all(row["captions"] for n, row in enumerate(rows) if n not in BAD_ANSWERS)


def test_an_image_keeps_the_captions_that_it_got():
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        return said("" if body["max_tokens"] == 9 else "words")

    asks = [{"kind": kind, "prompt": kind, "max_tokens": length} for kind, length in (("short", 9), ("long", 99))]
    with serve(handler) as url:
        rows = captions(endpoint(url, asks=asks), 1)
    assert rows == [{"captions": [{"kind": "long", "text": "words"}], "captioner_failure": "empty_answer"}]


@pytest.mark.parametrize("limit", [{"timeout": 0.2, "deadline": 20.0}, {"timeout": 20.0, "deadline": 0.3}])
def test_a_server_that_hangs_costs_its_deadline(limit: dict[str, float]):
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if number_of(body) == 1:
            await asyncio.Event().wait()
        if number_of(body) == 2:  # a drop now and then
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.02)
        return said("fine")

    began = time.monotonic()
    with serve(handler) as url:
        rows = captions(endpoint(url, tolerated=0.5, **limit), 5)
    assert time.monotonic() - began < 10
    assert [row["captioner_failure"] for row in rows] == [None, "timeout", "timeout", None, None]


@pytest.mark.parametrize("count", [1, 40])
def test_a_broken_server_is_an_error_and_no_thousand_failures(count: int):
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=500)

    with serve(handler) as url, pytest.raises(PixnerdError, match=r"gave no answer.*server_error \(status 500\)"):
        captions(endpoint(url, retries=0), count)
    with pytest.raises(PixnerdError, match="unreachable"):
        captions(endpoint(url, retries=1), count)  # it is gone by now


def test_one_failure_is_tolerated_and_a_tenth_is_not():
    failing = {3}

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=400 if number_of(body) in failing else 200, text=json.dumps(FINE))

    with serve(handler) as url:
        assert captions(endpoint(url), 6)[3]["captioner_failure"] == "refused"
        failing |= {7, 11, 19}
        with pytest.raises(PixnerdError, match="4 of 40 requests"):
            captions(endpoint(url), 40)
        assert sum(row["captions"] is None for row in captions(endpoint(url, tolerated=0.1), 40)) == 4


FINE = {"choices": [{"message": {"content": "fine"}}]}


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_a_wrong_key_model_or_address_ends_the_work_at_once(status: int):
    followed = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        followed.append(request.path)
        return web.Response(status=status, headers={"Location": "/v1/chat/completions"})

    with serve(handler) as url, pytest.raises(SettingsError, match=f"answers {status}"):
        captions(endpoint(url, concurrency=1), 40)
    assert len(followed) < 40


def test_the_key_is_sent_and_never_told(tmp_path: Path):
    (tmp_path / "key").write_text("sk-very-secret\n")
    seen: set[str | None] = set()

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.add(request.headers.get("Authorization"))
        return web.Response(status=400, text=f"what do you mean, {request.headers['Authorization']}?")

    with serve(handler) as url:
        settings = endpoint(url, api_key=f"file:{tmp_path / 'key'}")
        with pytest.raises(PixnerdError, match=r"what do you mean, Bearer \*\*\*") as error:
            captions(settings)
    assert seen == {"Bearer sk-very-secret"}
    everything = (
        f"{error.value} {error.value!r} {settings} {settings!r} {settings.model_dump_json()} {settings.results()}"
    )
    assert "very-secret" not in everything
    assert "key" not in json.dumps(settings.results()) and url not in json.dumps(settings.results())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"api_key": "sk-very-secret"}, "never as the value itself"),
        ({"url": "http://me:secret@host/v1"}, "use api_key"),
        ({"url": "file:///etc/passwd"}, "written http://"),
        ({"asks": []}, "must not be empty"),
        ({"asks": [{"kind": "a", "prompt": "b"}] * 2}, "two captions have one kind"),
        ({"asks": [{"kind": "a\x00", "prompt": "b"}]}, "write 1 to 64 letters of ASCII"),
        ({"name": "captions failure"}, "write a word"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(SettingsError, match=said) as error:
        endpoint(**{"url": "http://127.0.0.1:1/v1"} | changes)
    assert "very-secret" not in str(error.value) and ":secret@" not in str(error.value)


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_is_no_header_is_refused(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAPTION_KEY", key)
    with pytest.raises(SettingsError, match="no line of ASCII"):
        EndpointScorer(endpoint("http://127.0.0.1:1/v1", api_key="env:CAPTION_KEY"))
