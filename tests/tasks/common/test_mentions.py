"""The pages and figures that a question names, and whether it asks for a position."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tasks.common.mentions import (
    asks_position,
    chinese_number,
    figure_labelled,
    figure_named,
    page_named,
    pages_named,
)


def in_chinese(number: int) -> str:
    """1..9999 in standard Chinese numerals: units in order, one 零 for a gap, a leading 一十 as 十."""
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
def test_texts_that_name_no_page(text: str) -> None:
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


# -- several pages ------------------------------------------------------------------------------------------------


@given(st.lists(pages, min_size=1, max_size=5), st.sampled_from([str, full_width, in_chinese]))
def test_pages_are_named_in_order_and_once(numbers, spelled) -> None:  # type: ignore[no-untyped-def]
    once = list(dict.fromkeys(numbers))
    assert pages_named("，".join(f"第{spelled(n)}页的图" for n in numbers) + "有何不同？") == once
    assert pages_named(f"第{'、'.join(spelled(n) for n in numbers)}页") == once
    assert pages_named(f"Compare {' with '.join(f'page {n}' for n in numbers)}.") == once


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("第3、5页", [3, 5]),
        ("第3和第5页", [3, 5]),
        ("第二，四以及六页", [2, 4, 6]),
        ("pages 3 and 5", [3, 5]),
        ("pages 3, 5, and 7", [3, 5, 7]),
        ("pages 3 & 5", [3, 5]),
        ("pages 3 5", [3, 5]),
        ("On page 3, 5 parts are shown", [3]),
        ("第0页和第2页", [2]),
        ("pages 3-5", [3]),
        ("第3个部件和第5页", [5]),
        ("page 9 (第4页)", [9, 4]),
        ("What is part 12?", []),
    ],
)
def test_lists_of_pages(text: str, named: list[int]) -> None:
    assert pages_named(text) == named


@given(st.text(max_size=60) | st.text("第页page s0123一十、,和 ", max_size=40))
def test_the_page_named_is_the_first_of_the_pages_named(text: str) -> None:
    named = pages_named(text)
    assert page_named(text) == (named[0] if named else None)
    assert len(set(named)) == len(named)
    assert all(page >= 1 for page in named)


# -- figures ------------------------------------------------------------------------------------------------------

letters = st.sampled_from(["", "a", "b", "F"])
figures = st.integers(1, 9999)


@given(
    figures,
    letters,
    spaces,
    st.sampled_from([str, full_width]),
    st.sampled_from(["图", "附图", "如图", "圖", "第6页图", "FIG.", "Fig. ", "fig", "figure ", "FIGURE ", "Figs. "]),
    st.sampled_from(["{}", "{}中，部件3是什么？", "In {}, what is part 12?", "请看{}。", "({})", "{}和图9"]),
)
def test_a_question_names_its_figure(number, letter, space, spelled, word, sentence) -> None:  # type: ignore[no-untyped-def]
    named = f"{number}{letter.lower()}"
    assert figure_named(sentence.format(f"{word}{space}{spelled(number)}{letter}")) == named
    if letter:
        assert figure_named(sentence.format(f"{word}{space}{spelled(number)}({letter})")) == named
        assert figure_named(sentence.format(f"{word}{space}{spelled(number)} （{letter}）")) == named


@given(
    st.integers(1, 999),
    spaces,
    st.sampled_from(["在图{}{}中，部件3是什么？", "图{}{}", "附图{}{}的左边", "第{}{}幅图"]),
)
def test_a_figure_in_chinese_numerals(number, space, sentence) -> None:  # type: ignore[no-untyped-def]
    assert figure_named("第6页的" + sentence.format(space, in_chinese(number % 100 or 1))) == str(number % 100 or 1)


@pytest.mark.parametrize(
    ("text", "figure"),
    [
        ("图02", "2"),
        ("图2所示", "2"),
        ("图⑥", "6"),
        ("第2幅图", "2"),
        ("第二张图", "2"),
        ("第6图", "6"),
        ("第3页第2个图", "2"),
        ("图2a中", "2a"),
        ("图2(b)的左侧", "2b"),
        ("图二(a)", "2a"),
        ("Fig. 2 a lever", "2"),
        ("Fig. 2A所示", "2a"),
        ("Figs. 2 and 3", "2"),
        ("as shown in FIG.12B", "12b"),
        ("图3，不是图2", "3"),
        ("Fig. 4 (图5)", "4"),
        ("图0和图2", "2"),
        ("图十十，图五", "5"),
    ],
)
def test_spellings_of_a_figure(text: str, figure: str) -> None:
    assert figure_named(text) == figure


@pytest.mark.parametrize(
    "text",
    [
        "",
        "在文件中第6页的图中，部件3相对于部件5的位置关系是？",
        "在文件中第六页的附图，部件3是什么？",
        "附图标记3是什么？",
        "图一侧的部件",
        "图三维",
        "图两侧",
        "该图十分清楚",
        "图0",
        "What is part 2 in the figure on page 6?",
        "config 2",
        "figurine 2",
        "figure two",
        "图" + "9" * 5000,
        "fig. " + "9" * 5000,
        "fig" + " " * 50_000,
        "图" + "九" * 5000,
    ],
)
def test_texts_that_name_no_figure(text: str) -> None:
    assert figure_named(text) is None


@given(st.text(max_size=60) | st.text("第附图圖fig. 012一十(a)（）", max_size=40))
def test_any_text_names_a_figure_or_none(text: str) -> None:
    figure = figure_named(text)
    assert figure is None or re.fullmatch("[1-9][0-9]*[a-z]?", figure)


@pytest.mark.parametrize(
    ("text", "labelled"),
    [
        ("图2", ("2", "")),
        (" 图 2 ", ("2", "")),
        ("附图2", ("2", "")),
        ("图2 剖视图", ("2", " 剖视图")),
        ("FIG. 2A", ("2a", "")),
        ("Fig. 2: Sectional view", ("2", ": Sectional view")),
        ("如图2所示", None),
        ("see FIG. 2", None),
        ("第2幅图", None),
        ("图0", None),
        ("附图", None),
        ("12", None),
    ],
)
def test_labels_of_figures(text: str, labelled: tuple[str, str] | None) -> None:
    assert figure_labelled(text) == labelled


# -- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "在文件中第6页的图中，部件3相对于部件5的位置关系是？",
        "什么位于铰链的下方？",
        "挂钩在哪里？",
        "部件3在部件5的哪一侧？",
        "Where is the wing nut?",
        "On page 2, what is the POSITION of part 3 relative to part 5?",
        "What is mounted above the lid?",
        "What lies between the piston and the end cap?",
        "what is right of the infuser?",
        "部件3where",
    ],
)
def test_questions_that_ask_for_a_position(text: str) -> None:
    assert asks_position(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "部件14是什么？",
        "踏板用来做什么？",
        "What is part 26 called?",
        "Which component, elsewhere unnamed, has number 4?",
    ],
)
def test_questions_that_ask_for_no_position(text: str) -> None:
    assert not asks_position(text)


# -- numerals -----------------------------------------------------------------------------------------------------


@given(st.text("零〇一二两三四五六七八九十百千", max_size=8))
def test_any_row_of_numerals_is_a_number_below_ten_thousand_or_none_unless_all_digits(numerals: str) -> None:
    value = chinese_number(numerals)
    if value is not None and any(unit in numerals for unit in "十百千"):
        assert 0 < value < 10_000
