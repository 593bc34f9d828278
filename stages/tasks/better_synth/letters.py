"""The letter that an answer to a multiple-choice question means, by rule and without a model.

The rules read what `can_infer` reads in VLMEvalKit, the public evaluator of MMBench, with these differences: they
ignore denied letters and the article `A`, and they find a stated answer among several letters.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping

_SIGNS = str.maketrans("。、【】〔〕「」『』“”‘’", ".,[][]" + '"' * 6 + "'" * 2)
"""Chinese punctuation that NFKC does not replace, and its ASCII counterparts. NFKC replaces full-width signs such as
the comma and the colon."""
_BOXED = re.compile(r"\\boxed\b")
_MARKUP = re.compile(r"\\[A-Za-z]+|\\.|[*_`$#{}<>|~]")
"""LaTeX commands, and signs of LaTeX, Markdown and tags that may surround a letter."""

_LETTER = r"[A-H](?![A-Za-z0-9'+-])"
_OPEN = r"[\s(\[\"':]*+"
_LONE = re.compile(rf"(?<![A-Za-z0-9'-])(?<![A-Za-z]\.){_LETTER}(?!\.[A-Za-z0-9])")
"""A letter that is not part of a word or an abbreviation."""
_TOUCHED = re.compile(r"[\u4e00-\u9fff]")
_BEFORE = "选是为择项案应即故就有和与或及而非除得"
_AFTER = re.compile(r"选?项|[是为对和与或及不错最更都均也吗]|正确|符合|排除|有误")
"""What may touch a letter in Chinese, as in 选B and B正确, but not in B超."""
_WORD_AFTER = re.compile(r"\s+(?:best\s+)?([A-Za-z]+)")
_NO_NOUN = frozenset(
    (
        *("is", "was", "are", "were", "because", "since", "as", "for", "and", "or", "nor", "but", "would", "could"),
        *("should", "might", "may", "must", "can", "cannot", "will", "seems", "appears", "looks", "fits", "matches"),
        *("shows", "describes", "represents", "depicts", "in", "on", "at", "of", "from", "to", "by", "than", "not"),
        *("with", "if", "so", "then", "that", "which", "where", "while", "has", "have", "does", "isn", "doesn"),
        *("it", "rather"),
    )
)
"""Words that never follow the article `a`."""

_OPTION = r"(?:(?i:the\s+)?(?:(?i:\b(?:options?|choices?|letters?)\b)|选项)\s*+)?+"
_JOIN = rf"[\s)\]\"']*+(?:,?\s*+(?i:\b(?:and|or|nor)\b|&)|[/和或与及])\s*+{_OPTION}{_OPEN}"
_COMMA = rf"[\s)\]\"']*+,\s*+{_OPTION}{_OPEN}"
_LIST = rf"{_LETTER}(?:(?:{_COMMA}{_LETTER}){{0,7}}(?:{_JOIN}{_LETTER}){{1,7}})?"
"""One letter, or several with an `and` or `or` before the last."""
_LONG_LIST = rf"(?<!is )(?<!: )(?<![选是为案择:]){_LETTER}(?:(?:{_COMMA}|{_JOIN}){_LETTER}){{1,7}}"
"""Several letters, before a verb in the plural: not those of `The answer is B, A and C are wrong`."""
_END = r"[\s)\]\"']*+"
_SURELY = r"(?:(?i:\b(?:all|both|also|clearly|obviously|definitely|probably|likely|just|simply|the|an?)\b)\s*+)*+"
_WRONG = rf"\s*{_SURELY}(?i:not|wrong|incorrect|false|impossible|invalid|ruled out|excluded|eliminated)\b"
_WRONG_IN_CHINESE = r"\s*选?项?[\s是都均也显然明肯定]*(?:不(?![但仅])|错|有误|被?排除|吗)"
_NEGATION = (
    r"(?:(?i:\b(?:not|cannot|never|neither|nor|none of|rather than|instead of|except|exclud(?:es?|ed|ing)"
    r"|eliminat(?:es?|ed|ing)|reject(?:s|ed|ing)?|rul(?:es?|ed|ing) out|other than|unlike)\b)"
    r"|n't\b(?:\s+(?i:think|believe))?)"
    r"(?:\s+(?i:be|it|it's|is|that|either|of|choose|pick|select|the|correct|right|answer|options?|choices?))*+"
)
_DENIED = (
    # B is wrong. B isn't. B?
    re.compile(
        rf"(?P<letters>{_LETTER})(?:{_END}(?:(?i:is|was|seems|looks|appears|would be|must be){_WRONG}"
        rf"|(?i:(?:is|was|does|did|ca|could|would)n't|cannot|(?:can|does|did|could|would) not)\b)"
        rf"|{_WRONG_IN_CHINESE})"
    ),
    # A, C and D are wrong
    re.compile(
        rf"(?P<letters>{_LONG_LIST})(?:[\s)\]\"',]*{_SURELY}(?:(?i:are|were|seem|look|appear|would be|must be){_WRONG}"
        rf"|(?i:(?:are|were|do|did|ca|could)n't|(?:can|do|could) not|cannot)\b)|{_WRONG_IN_CHINESE})"
    ),
    # not A, B or C
    re.compile(
        rf"(?:{_NEGATION}|不[是选为]|不应该?选?择?|并非|排除|除了?|而非)\s*{_OPTION}{_OPEN}(?P<letters>{_LIST})"
    ),
    # B? A or B?
    re.compile(rf"(?P<letters>{_LIST}){_END}\?"),
)
"""Each finds `letters` that are denied or asked about."""

_LINK = (
    r"(?:\s*+(?:(?i:\b(?:is|was|be|are|would|should|must|could|might|may|will|thus|therefore|indeed|clearly|definitely"
    r"|probably|most likely|likely|then|it|as)\b)|:|=|->|→|-|,|应该?|应当|可能|只能|一定|必然|就|便|则|[是为]|选择?))*+"
)
_STATED = re.compile(
    r"(?:(?i:\b(?:answers?|(?:correct|right|best|final|most likely)\s+(?:option|choice|one|letter)|choose|chose|select"
    r"|pick|go with|going with|conclude)\b)|答案|正确的?选项|正确的|(?<![不候备])选择?(?!项))"
    r"(?i:\s+(?:to|for)\s+(?:the|this|that)\b[^.:,;\n]{0,60}?(?=\s+(?:is|would|should|must)\b|:))?"
    rf"{_LINK}\s*+{_OPTION}{_OPEN}"
    rf"(?P<letter>{_LETTER}|[a-h](?=[)\]\"']*(?:[.,;!)\]]|\s*$)))"
)
"""A letter after a marker of the answer. A small letter counts only at the end of a clause."""
_JUDGED = re.compile(
    rf"(?P<letter>{_LETTER}){_END}(?:选?项?\s*(?:是?正确|[是为]?对的?|[是为]答案|(?:最|更)?符合)"
    rf"|(?i:is|was|would be|must be|seems|looks)\s+{_SURELY}(?i:only\s+)?(?i:correct|right|best|answer)\b)"
)
_LEADING = re.compile(rf"[(\[\"]?(?P<letter>{_LETTER})(?:\"|\s*[)\].:,;/]|\s*选?项)")
_LED = re.compile(rf"(?:^|[\s(\[\"])(?P<letter>{_LETTER})\s*[)\].:]")
_NEXT = re.compile(rf"(?:{_JOIN}|{_COMMA}|\W*)(?P<letter>{_LETTER})")


def letter_in(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of `options` (letter -> text) that an answer means; None if it means none or several.

    The first rule that finds anything counts:

    1. a line that is only a letter, if there is one such letter;
    2. the text of an option;
    3. the last letter that is stated as the answer: "Answer: B", "the best choice would be B", \\boxed{B}, 答案是B;
    4. the only letter that is called right;
    5. the first letter, if a sign separates it from what follows and the options are not repeated: "B. dog", B选项;
    6. the only letter of the answer, wherever it is;
    7. B猫, where 猫 is the text of B;
    8. the text of exactly one option inside an answer that is not much longer, as in VLMEvalKit.

    Letters that are denied or asked about do not count ("B is wrong", "not B", 不选B, "B?"), nor do the article `A` and
    letters in the text of an option.
    """
    bare = {letter for line in text.splitlines() if (letter := _bare_letter(line)) in options}
    if len(bare) == 1:
        return bare.pop()
    folded = _folded_text(text)
    whole = [letter for letter, option in options.items() if _comparable_text(option) == _comparable_text(folded)]
    plain = _without_options(_plain_text(text), options)
    rules = (whole, _letters_by_rule(plain), _joined_letters(folded, options), _mentioned_letters(folded, options))
    letters = set(next((found for found in rules if found), []))
    return letters.pop() if len(letters) == 1 and letters <= options.keys() else None


def _bare_letter(line: str) -> str:
    """The line in upper case, without markup, and without brackets and punctuation at both ends."""
    return _plain_text(line).strip("()[].:,;!/\"' ").upper()


def _folded_text(text: str) -> str:
    """The text on one line, with punctuation and letters of one width."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_SIGNS).split())


def _plain_text(text: str) -> str:
    """The folded text without markup, with `/` in place of 、 and `answer:` before the content of a LaTeX box."""
    return " ".join(_MARKUP.sub(" ", _BOXED.sub(" answer: ", _folded_text(text.replace("、", "/")))).split())


def _without_options(text: str, options: Mapping[str, str]) -> str:
    """The text with a white square in place of each option that contains a lone letter, such as `vitamin B`."""
    texts = {_plain_text(option) for option in options.values()}
    for option in sorted((each for each in texts if len(each) > 1 and _LONE.search(each)), key=len, reverse=True):
        text = re.sub(
            rf"(?<![A-Za-z0-9]){re.escape(option)}(?![A-Za-z0-9])", "\N{WHITE SQUARE}", text, flags=re.IGNORECASE
        )
    return text


# -- letters -----------------------------------------------------------------------------------------------------


def _letters_by_rule(text: str) -> list[str]:
    """The result of the first of the rules 3 to 6 of `letter_in` that finds exactly one letter: that letter, as often
    as the rule finds it. Empty if no rule does."""
    denied = {
        match.start("letters") + letter.start()
        for pattern in _DENIED
        for match in pattern.finditer(text)
        for letter in re.finditer(_LETTER, match["letters"])
    }
    named = {place: letter for place, letter in _lone_letters(text) if place not in denied}

    def meant_letters(pattern: re.Pattern[str]) -> list[str]:
        """The letters that a pattern finds, in upper case, without those denied and those that begin a list. Small
        letters are never left out."""
        return [
            match["letter"].upper()
            for match in pattern.finditer(text)
            if match["letter"].islower()
            or (match.start("letter") in named and not _is_first_of_several(text, match, named))
        ]

    leading = _LEADING.match(text)
    led = {match["letter"] for match in _LED.finditer(text)} | set(leading["letter"] if leading else "")
    leads = (
        leading
        and leading.start("letter") in named
        and not _is_first_of_several(text, leading, named)
        and len(led) == 1
    )
    rules = (meant_letters(_STATED)[-1:], meant_letters(_JUDGED), list(led) if leads else [], list(named.values()))
    return next((found for found in rules if len(set(found)) == 1), [])


def _lone_letters(text: str) -> Iterator[tuple[int, str]]:
    """The letters that stand alone, each with its place in the text. The article `A` is left out."""
    for match in _LONE.finditer(text):
        before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 20]
        if _TOUCHED.match(before) and before not in _BEFORE:
            continue
        if _TOUCHED.match(after) and not _AFTER.match(after):
            continue
        word = _WORD_AFTER.match(after)
        if match.group() == "A" and word and word[1].lower() not in _NO_NOUN and not _LONE.fullmatch(word[1]):
            continue
        yield match.start(), match.group()


def _is_first_of_several(text: str, match: re.Match[str], named: Mapping[int, str]) -> bool:
    """Whether the letter that a pattern found is the first of several: `B or C`."""
    following = _NEXT.match(text, match.end("letter"))
    return following is not None and following.start("letter") in named


# -- texts of options --------------------------------------------------------------------------------------------


def _comparable_text(text: str) -> str:
    """The folded text in lower case, without punctuation and blanks at both ends."""
    return _folded_text(text).casefold().strip(".,!?:;\"' ")


def _joined_letters(text: str, options: Mapping[str, str]) -> list[str]:
    """The letters whose option begins with a Chinese character, if the text is only letter and option, such as B猫."""
    whole = _comparable_text(text)
    return [
        letter
        for letter, option in options.items()
        if _TOUCHED.match(option) and whole == _comparable_text(letter + option)
    ]


_DENIED_TEXT = re.compile(r"(?:\b(?:not|no|never|neither|nor)|n't|不是|并非|没有|不|非)\s*(?:(?:an?|the)\s+)?$")


def _mentioned_letters(text: str, options: Mapping[str, str]) -> list[str]:
    """The letters of the options whose text occurs in a text as whole words and is not denied there, without options
    that are part of another one that occurs. Empty if the text is more than twice as long as all options together."""
    text = _comparable_text(text)
    texts = {letter: _comparable_text(option) for letter, option in options.items()}
    if len(text) > 2 * sum(map(len, texts.values())):
        return []
    inside = [letter for letter, option in texts.items() if option and _has_words(text, option)]
    return [
        letter
        for letter in inside
        if not any(texts[letter] != texts[other] and _has_words(texts[other], texts[letter]) for other in inside)
    ]


def _has_words(text: str, part: str) -> bool:
    """Whether a text contains a part that no Latin letter or digit touches and that is not denied. Chinese has no
    blanks between words."""
    places = re.finditer(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z0-9])", text)
    return any(not _DENIED_TEXT.search(text[: match.start()]) for match in places)
