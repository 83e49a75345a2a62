from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.snapshots.filters import LONGEST, columns_in, masks, parse_filter
from infra.errors import SettingsError

TABLE = pa.table(
    {
        "width": pa.array([256, 512, 1024, None, 640], pa.int32()),
        "height": pa.array([256, 300, 1024, 512, 640], pa.int32()),
        "duplicate": [False, True, False, False, None],
        "objects": pa.array([0, 1, 2, 3, 1], pa.int64()),
        "score": [0.1, 0.5, float("nan"), None, 0.9],
        "source": ["a", "b", "a", "b", "c"],
        "captions": [["x"]] * 5,
        "row": range(5),
        "large": pa.array([2**62, -5, 7, None, 0]),
        "hash": pa.array([2**64 - 1, 5, None, 2**63, 0], pa.uint64()),
        "narrow": pa.array([0, 1, 2, 3, 4], pa.int8()),
    }
)


def rows(text: str) -> list[int]:
    passed = np.ones(TABLE.num_rows, bool)
    for mask in masks(TABLE, parse_filter(text, TABLE.schema)):
        passed &= mask
    return list(TABLE["row"].to_numpy()[passed])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("width >= 512", [1, 2, 4]),
        ("width >= 512 and not duplicate", [2]),
        ("not width >= 512", [0]),
        ("objects in (1, 2)", [1, 2, 4]),
        ("objects not in [1, 2]", [0, 3]),
        ("width in (256,)", [0]),
        ("width not in (256,)", [1, 2, 4]),
        ("not (width not in (256,))", [0]),
        ("source == 'a' or source == 'c'", [0, 2, 4]),
        ("source in {'a'} and width > 300", [2]),
        ("256 < width < 1024", [1, 4]),
        ("width / height > 1.5", [1]),
        ("width / height == 1", [0, 2, 4]),
        ("objects / 2 == 1.5", [3]),  # a true division, of whole numbers too
        ("width / objects > 300", [1, 2, 4]),  # by zero it has no value
        ("not width / objects > 300", []),
        ("width / objects is None", [0, 3]),
        ("1 / 0 > 0", []),
        ("(score - score) / (score - score) == 0", []),
        ("width * width * width * width > 0", [0, 1, 2, 4]),
        ("large * 4 > 0", [0, 2]),
        ("large > 0.5", [0, 2]),
        ("large == 4611686018427387905", []),  # as floating point it would be row 0's
        ("large in (4611686018427387904, -5)", [0, 1]),
        ("hash > 3", [0, 1, 3]),
        ("hash == 18446744073709551615", [0]),
        ("hash in (18446744073709551615, 5, -1)", [0, 1]),
        ("hash not in (5,)", [0, 3, 4]),
        ("hash >= -1 and hash != large", [0, 1]),
        ("hash / 2 > 0.5", [0, 1, 3]),
        ("narrow < 300", [0, 1, 2, 3, 4]),
        ("narrow * 1000 > 3500", [4]),
        ("width * height >= 512 * 512 and width - height == 0", [2, 4]),
        ("score > 0.3", [1, 4]),
        ("score == score", [0, 1, 4]),
        ("width is None", [3]),
        ("width is not None and not duplicate", [0, 2]),
        ("duplicate == True", [1]),
        ("duplicate or objects == 3", [1, 3]),
        ("objects == -1 + 2", [1, 4]),
        ("(width >= 512 and objects == 1) or objects == 0", [0, 1, 4]),
    ],
)
def test_filters(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


def test_conditions_are_counted_one_by_one_at_the_top_level_only() -> None:
    conditions = parse_filter("width>=512 and (not duplicate or objects==1)", TABLE.schema)
    assert [condition.text for condition in conditions] == ["width >= 512", "not duplicate or objects == 1"]
    assert columns_in("width>=512 and (not duplicate or objects==1)") == {"width", "duplicate", "objects"}
    assert columns_in(" ") == set()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("widht >= 512", "did you mean `width`"),
        ("not duplicates", "did you mean `duplicate`"),
        ("zzz == 1", "columns: duplicate, hash, height"),
        ("captions == 1", "no column"),
        ("width", "not a condition"),
        ("width + 1", "not a condition"),
        ("1", "not a condition"),
        ("width >=", "not an expression"),
        ("width == 'a'", "`width` (whole numbers) and `'a'` (text) cannot be compared"),
        ("objects in ('a', 'b')", "cannot be compared"),
        ("objects in (1, True)", "cannot be compared"),
        ("duplicate == 1", "`duplicate` (True or False) and `1` (whole numbers) cannot be compared"),
        ("source > 3", "cannot be compared"),
        ("source + 1 > 3", "cannot be computed"),
        ("source / 2 > 3", "compute with columns of numbers"),
        ("objects == 10 ** 3", "`10 ** 3` has no place in a filter: write the number out"),
        ("width // height == 1", "divide by `/`, which gives fractions"),
        ("objects % 2 == 0", "there are + - * / alone"),
        ("-width < 3", "write `0 - x` in place of `-x`"),
        ("(width > 5) & (height > 5)", "is not a condition: write `and` in place of `&`"),
        ("duplicate | (width > 5)", "write `or` in place of `|`"),
        ("~duplicate", "write `not` in place of `~`"),
        ("width > 5 & height > 5", "write `and` in place of `&`"),
        ("abs(width) > 5", "filters call no functions"),
        ("width is 'a'", "write `is None`"),
        ("objects == 99999999999999999999999", "cannot be computed"),
        ("objects in (width, 2)", "no place in a filter"),
        ("objects in width", "not a list"),
        ("objects is 3", "None alone"),
        ("__import__('os').system('true')", "not a condition"),
        ("width.__class__ == 1", "no place in a filter"),
        ("[x for x in (1,)] == 1", "no place in a filter"),
        ("(lambda: 1)() == 1", "no place in a filter"),
        ("width == 1j", "no place in a filter"),
        ("not " * 490 + "duplicate", "recursion"),
        ("(" * 300 + "duplicate" + ")" * 300, "not an expression"),
        ("width\0 == 1", "not an expression"),
    ],
)
def test_what_is_no_filter_is_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        rows(text)
    assert said in str(error.value)


WORDS = (
    "width",
    "objects",
    "not",
    "and",
    "or",
    "in",
    "(",
    ")",
    "[",
    "]",
    ",",
    "<",
    "==",
    "is",
    "1",
    "'a'",
    ".",
    "-",
    "/",
)


@given(st.text(max_size=80) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_text_is_a_filter_or_a_settings_error(text: str) -> None:
    try:
        kept = rows(text[:LONGEST])
    except SettingsError:
        return
    assert set(kept) <= set(range(5))
