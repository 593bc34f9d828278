"""Mentions in the text of a question: pages and figures of its document, and positions.

Reads Chinese and English, digits and Chinese numerals.
"""

import re
import unicodedata

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_NUMBER = "[零〇一二两三四五六七八九十百千]{1,12}"
_NUMBER = rf"(?:\d{{1,6}}|{_CHINESE_NUMBER})"
# not \b, which counts Chinese characters as word characters: they touch English words without a space
_PAGE_PATTERNS = (
    re.compile(rf"第\s*({_NUMBER}(?:\s*(?:以及|[、,和与與及])\s*第?\s*{_NUMBER}){{0,9}})\s*[页頁]"),
    re.compile(r"(?<![a-z])page\s*(?:(?:no\.?|number)\s*)?(\d{1,6})(?![a-z\d])", re.IGNORECASE),
    re.compile(
        r"(?<![a-z])pages\s*(\d{1,6}(?:(?:\s*,\s*|\s*&\s*|\s+)(?:and\s*)?\d{1,6}){0,9})(?![a-z\d])", re.IGNORECASE
    ),
    re.compile(r"(?<![a-z\d])(\d{1,6})(?:st|nd|rd|th)\s+page(?![a-z])", re.IGNORECASE),
)

# 图一侧, 图一样, 图三维: the numeral belongs to the next word. Nor does 图两侧 name figure 2: 两 never numbers a figure
_NO_NUMERAL = "(?![样般些个種种侧側端面直定致起边邊维維角周分零〇一二三四五六七八九十百千])"
_LETTER = r"(?:([a-z])(?![a-z\d])|\s?\(\s?([a-z])\s?\))?"
_FIGURE_PATTERNS = (
    re.compile(
        rf"[图圖]\s*(?:(\d{{1,4}})(?!\d)|([一二三四五六七八九十百零〇]{{1,7}}){_NO_NUMERAL}){_LETTER}", re.IGNORECASE
    ),
    re.compile(rf"(?<![a-z])(?:figures?|figs?)\s*(?:\.\s*)?(\d{{1,4}})(?!\d)(){_LETTER}", re.IGNORECASE),
    re.compile(r"第\s*(?:(\d{1,4})|([一二三四五六七八九十]{1,3}))\s*[幅张張个個]?\s*[图圖]()()"),
)

_POSITION = re.compile(
    "位置|方位|位于|位於|哪里|哪裡|哪儿|何处|哪一?[侧边面]|[上下左右前后]方|[左右两]侧|[上下左右前后里外]边|之间"
    "|(?<![a-z])(?:where|position(?:ed|s)?|locat(?:ed|ion)|relative to|above|below|beneath|under|underneath|behind"
    "|in front of|on top of|beside|next to|between|(?:left|right) (?:of|end|side)|(?:on|to|at) the (?:left|right))"
    "(?![a-z])",
    re.IGNORECASE,
)


def pages_named(text: str) -> list[int]:
    """1-based pages that a question names, each once, in order of mention.

    Reads `第3页和第5页`, `第3、5页` and `pages 3 and 5`. Full-width digits count as digits. Page 0 is left out. A range
    such as `pages 3-5` names its first page.
    """
    text = unicodedata.normalize("NFKC", text)
    matches = [match for pattern in _PAGE_PATTERNS for match in pattern.finditer(text)]
    pages = []
    for match in sorted(matches, key=lambda match: match.start()):
        for number in re.findall(_NUMBER, match.group(1)):
            pages.append(int(number) if number.isdecimal() else chinese_number(number))
    return list(dict.fromkeys(page for page in pages if page))


def page_named(text: str) -> int | None:
    """The first 1-based page that a question names; None without one.

    Reads `第6页`, `第 六 页`, `page 6` and `6th page`.
    """
    return next(iter(pages_named(text)), None)


def figure_named(text: str) -> str | None:
    """The first figure that a question names, as number and lower-case letter; None without one.

    `图2` becomes `2`; `FIG. 2A` and `图二(a)` become `2a`. Also reads `附图3`, `第2幅图` and `Figure 2(b)`.
    """
    text = unicodedata.normalize("NFKC", text)
    matches = [match for pattern in _FIGURE_PATTERNS for match in pattern.finditer(text)]
    figures = (_figure(match) for match in sorted(matches, key=lambda match: match.start()))
    return next((figure for figure in figures if figure), None)


def figure_labelled(text: str) -> tuple[str, str] | None:
    """The figure that a text begins with, and the rest of the text: `图2 剖视图` -> (`2`, ` 剖视图`). None if the text
    begins otherwise."""
    text = unicodedata.normalize("NFKC", text).strip().removeprefix("附")
    for match in filter(None, (pattern.match(text) for pattern in _FIGURE_PATTERNS[:2])):
        figure = _figure(match)
        return (figure, text[match.end() :]) if figure else None
    return None


def _figure(match: re.Match[str]) -> str | None:
    """The figure of a match as number and letter; None if its number is 0 or not well-formed."""
    digits, numeral, *letters = match.groups()
    number = int(digits) if digits else chinese_number(numeral)
    return f"{number}{''.join(filter(None, letters)).lower()}" if number else None


def asks_position(text: str) -> bool:
    """Whether a question asks for the position of a part: it contains a word of place, such as `位置`, `上方`, `where`
    or `below`. Only these words decide, not their meaning in the sentence."""
    return _POSITION.search(unicodedata.normalize("NFKC", text)) is not None


def chinese_number(text: str) -> int | None:
    """The value of a Chinese numeral; None if it is not well-formed. `text` may contain only Chinese digits, 十, 百 and
    千.

    `二十一` -> 21, `一百零五` -> 105, `一百五` -> 150 (spoken form), and a row of digits: `一二` -> 12.
    """
    if text and all(character in _DIGITS for character in text):
        return int("".join(str(_DIGITS[character]) for character in text))
    total, digit, after_zero, last_unit = 0, None, False, 10_000
    for character in text:
        if character in _UNITS:
            unit = _UNITS[character]
            bare_ten = unit == 10 and total == 0 and digit is None and not after_zero
            if unit >= last_unit or (digit is None and not bare_ten):
                return None
            total += unit * (digit or 1)
            digit, after_zero, last_unit = None, False, unit
        elif _DIGITS[character] == 0:
            if digit is not None or after_zero or total == 0:
                return None
            after_zero = True
        elif digit is not None:
            return None
        else:
            digit = _DIGITS[character]
    if digit is None:
        return total if text and not after_zero else None
    spoken_short = last_unit >= 100 and last_unit < 10_000 and not after_zero
    return total + digit * (last_unit // 10 if spoken_short else 1)
