"""What strangers write stays on its line and says what it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from infra.text import printable


@given(st.text())
def test_it_stays_on_one_line_and_moves_no_cursor(text: str) -> None:
    found = printable(text)
    assert len(found.splitlines()) <= 1
    assert not any(letter < " " or 0x7F <= ord(letter) < 0xA0 for letter in found)
    assert printable(found) == found


def test_what_can_be_read_is_kept() -> None:
    assert printable("  two\tred \u202ecircles\x1b[31m\n") == "two red circles [31m"
    assert printable("ein Bär, 熊, 🐻") == "ein Bär, 熊, 🐻"
