"""Which page a question names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.mentions import chinese_number, page_named


def in_chinese(number: int) -> str:
    """1..9999 written out, by the schoolbook: units in turn, one 零 for a gap, 一十 at the front as 十."""
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // unit % 10
        if digit:
            text += ("零" if gap and text else "") + "零一二三四五六七八九"[digit] + name
            gap = False
        else:
            gap = True
    return text.removeprefix("一") if text.startswith("一十") else text


def full_width(number: int) -> str:
    return "".join(chr(ord(c) + 0xFEE0) for c in str(number))


spaces = st.sampled_from(["", " ", "  ", "\u3000", "\t"])
pages = st.integers(1, 9999)


def test_the_number_writer_of_these_tests_is_right() -> None:
    known = {
        1: "一",
        10: "十",
        15: "十五",
        20: "二十",
        21: "二十一",
        101: "一百零一",
        110: "一百一十",
        1001: "一千零一",
    }
    known |= {
        120: "一百二十",
        999: "九百九十九",
        1010: "一千零一十",
        2305: "二千三百零五",
        9000: "九千",
        1100: "一千一百",
    }
    assert {number: in_chinese(number) for number in known} == known


def test_every_chinese_numeral_is_read_back() -> None:
    wrong = [n for n in range(1, 10_000) if chinese_number(in_chinese(n)) != n]
    assert wrong == []


@given(pages, spaces, spaces, st.sampled_from([str, full_width, in_chinese]), st.sampled_from("页頁"))
def test_a_chinese_question_names_its_page(number, before, after, spelled, leaf) -> None:  # type: ignore[no-untyped-def]
    assert page_named(f"在文件中第{before}{spelled(number)}{after}{leaf}的图中，部件3是什么？") == number


@given(
    pages,
    st.sampled_from(
        ["page {}", "Page {}", "PAGE {}", "page{}", "page  {}", "page no. {}", "page number {}", "{}th page"]
    ),
    st.sampled_from([str, full_width]),
    st.sampled_from(["On {}, what is part 12?", "What does {} show", "根据{}的图，部件5是什么？", "{}", "({})"]),
)
def test_an_english_question_names_its_page(number, form, spelled, sentence) -> None:  # type: ignore[no-untyped-def]
    assert page_named(sentence.format(form.format(spelled(number)))) == number


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("第两页", 2),
        ("第二页", 2),
        ("第一百五页", 150),
        ("第一百零五页", 105),
        ("第一二页", 12),
        ("第〇页", None),
        ("第二〇页", 20),
        ("第 6 页", 6),
        ("第06页", 6),
        ("第⑥页", 6),
        ("On the 1st page", 1),
        ("the 22nd page", 22),
        ("the 3RD Page", 3),
    ],
)
def test_unusual_spellings(text: str, page: int | None) -> None:
    assert page_named(text) == page


@pytest.mark.parametrize(
    "text",
    [
        "",
        "部件3相对于部件5的位置关系是？",
        "What is part 12?",
        "第三个部件是什么？",
        "第页",
        "共6页",
        "第6图",
        "homepage 3 is not one",
        "pages and pages",
        "page twelve",
        "page 12a",
        "claim 4, figure 2",
        "第十十页",
        "第百页",
        "第0页",
        "page 0",
        "page " + "9" * 5000,
        "第" + "9" * 5000 + "页",
        "第" + "九" * 5000 + "页",
    ],
)
def test_what_names_no_page(text: str) -> None:
    assert page_named(text) is None


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("第3页和第5页", 3),
        ("page 7, not page 2", 7),
        ("page 9 (第4页)", 9),
        ("第四页 (page 9)", 4),
        ("the 2nd page after page 5", 2),
        ("第0页 or page 3", 3),
        ("第十十页，第五页", 5),
    ],
)
def test_the_first_page_named_wins(text: str, page: int) -> None:
    assert page_named(text) == page


@given(st.text(max_size=60))
def test_any_text_names_a_page_or_none(text: str) -> None:
    page = page_named(text)
    assert page is None or page >= 1


@given(st.text("零〇一二两三四五六七八九十百千", max_size=8))
def test_any_row_of_numerals_is_a_number_below_ten_thousand_or_none_unless_all_digits(numerals: str) -> None:
    value = chinese_number(numerals)
    if value is not None and any(unit in numerals for unit in "十百千"):
        assert 0 < value < 10_000
