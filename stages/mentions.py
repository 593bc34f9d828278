"""What the text of a question points at: a page of its document. Chinese and English, digits and numerals."""

import re
import unicodedata

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_NUMBER = "[零〇一二两三四五六七八九十百千]{1,12}"
_PAGE_PATTERNS = (
    re.compile(rf"第\s*(\d{{1,6}}|{_CHINESE_NUMBER})\s*[页頁]"),
    # not \b: Chinese characters are word characters to it, and stand next to English ones without a space
    re.compile(r"(?<![a-z])page\s*(?:no\.?|number)?\s*(\d{1,6})(?![a-z\d])", re.IGNORECASE),
    re.compile(r"(?<![a-z\d])(\d{1,6})(?:st|nd|rd|th)\s+page(?![a-z])", re.IGNORECASE),
)


def page_named(text: str) -> int | None:
    """1-based page that a question names: `第6页`, `第 六 页`, `page 6`, `6th page`; None where it names none.

    Full-width digits count as digits. The first page named wins. A page number of 0 names no page.
    """
    text = unicodedata.normalize("NFKC", text)
    matches = [match for pattern in _PAGE_PATTERNS for match in pattern.finditer(text)]
    for match in sorted(matches, key=lambda match: match.start()):
        number = match.group(1)
        page = int(number) if number.isdecimal() else chinese_number(number)
        if page:
            return page
    return None


def chinese_number(text: str) -> int | None:
    """Value of a Chinese numeral below ten thousand, or None for what is no well-formed number.

    `二十一` -> 21, `一百零五` -> 105, `一百五` -> 150 (as it is spoken), and a row of digits: `一二` -> 12.
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
