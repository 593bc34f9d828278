"""What the model is asked, in Chinese where the problem is, else in English; and what its completions mean.

The prompt is kept short: a small model has to find its way in it.
"""

import re
import unicodedata
from collections.abc import Mapping

from stages.contract.records import Message
from stages.wording import plain

# -- prompt and target -------------------------------------------------------------------------------------------

_ROLE = {
    True: "你擅长逻辑推理。采用封闭世界假设：题目没有说明、也推不出的，都不成立。",
    False: "You solve logic puzzles. The world is closed: what the facts do not say or imply is false.",
}
_ASKED = {
    # no letter stands for an example: it would be the answer of a small model
    True: "题目：{problem}\n问题：{question}\n{options}\n这是单选题。最后一行写“答案是：”和该选项的字母。",
    False: "{problem}\nQuestion: {question}\n{options}\n"
    "One option is right. End with the line `Answer: ` and its letter.",
}
_TARGET = {True: "答案是：{}", False: "Answer: {}"}


def is_chinese(text: str) -> bool:
    return re.search(r"[\u3400-\u4dbf\u4e00-\u9fff]", text) is not None


def choice(problem: str, question: str, options: Mapping[str, str]) -> list[Message]:
    """A sub-question of a problem, with its options by their letters."""
    chinese = is_chinese(problem)
    lines = "\n".join(f"{letter}. {plain(option)}" for letter, option in options.items())
    asked = _ASKED[chinese].format(problem=plain(problem), question=plain(question), options=lines)
    return [{"role": "system", "content": _ROLE[chinese]}, {"role": "user", "content": asked}]


def target(problem: str, letter: str) -> str:
    """What training teaches to answer: the line that is asked for, alone."""
    return _TARGET[is_chinese(problem)].format(letter)


# -- completions -------------------------------------------------------------------------------------------------

_OPENING = r"[\s\"'“”‘’(\[{【「<]*"
_LINK = (
    r"(?:\s*(?:应该是|应该选|应该为|应选|应是|应为|就是|选择|是|为|选|:|=|->|→|-|,"
    r"|\b(?:should be|must be|would be|is|was)\b))"
)
_LETTER = r"(?P<letter>[A-Za-z])(?![A-Za-z0-9'’\-])"
_NOUN = rf"(?:(?:(?:the\s+)?\b(?:option|choice|letter)\b|选项)\s*:?{_OPENING})?"
_MARKED = re.compile(
    r"(?:答案|正确的?选项|\banswers?\b|\b(?:correct|right|best)\s+(?:option|choice|one|letter)\b)[】\])}>」”\"]*"
    rf"(?:\s+(?:to|for)\s[^.:\n]{{1,60}}?{_LINK}|{_LINK}){{0,4}}{_OPENING}{_NOUN}{_LETTER}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    rf"(?:选择?(?!项)|\b(?:choose|pick|select)\b){_LINK}{{0,2}}{_OPENING}{_NOUN}{_LETTER}", re.IGNORECASE
)
"""Weaker than an answer marker: reasoning also chooses on its way."""
_SEVERAL = re.compile(
    r"[\s\"'”’)\]】」]*(?:(?:\bor\b|\band\b|[和或与及])[\s\"'“‘(\[【「]*[A-Z](?![A-Za-z])"
    r"|[,/、&+]\s*[A-Z]\s*(?:[,/、&+.。;)\n]|\bor\b|\band\b|[和或与及中]|$))"
)
_WORD_AFTER = re.compile(r"\s+(?P<word>[A-Za-z]+)")
_NO_NOUN = {"because", "since", "as", "for", "is", "was", "based", "which", "that", "given", "due"}
"""Words that do not follow the article `a`."""
_BARE = re.compile(rf"{_OPENING}(?P<letter>[A-Za-z])[\s\"'”’)\]}}】」>]*[.:、,;)]?\s*")
_LED = re.compile(r"[\s(\[【]*(?P<letter>[A-Z])\s*[)\]】]?\s*[.:、)\]】]\s*(?P<rest>\S.*)")
_WHOLE_CLAUSE = {"yes", "no", "true", "false", "all", "none", "both", "one", "it", "on", "off", "不是", "正确", "错误"}
"""Options that ordinary sentences are full of: they count where they stand alone."""
_DENIED = re.compile(r"(?:\b(?:not|never|neither|nor|no)|n['’]t|不是|并非|不|非|没有)\s*(?:(?:the|an?)\s+)?$")


def letter_in(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a completion answers with, of those in `options`; None where there is none, or several.

    In turn: the last valid letter behind an answer marker; behind a choosing word; a completion, or a last line, that
    is a letter alone or with its option; the only option whose text occurs. No letter outside the options is one.
    """
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf)\b|[*_`#$]", "", unicodedata.normalize("NFKC", text))
    for pattern in (_MARKED, _CHOSEN):
        found = [_valid(text, match, options) for match in pattern.finditer(text)]
        letters = [letter for letter in found if letter is not None]
        if letters:
            return letters[-1]
    return _alone(text, options) or _only_option(text, options)


def _valid(text: str, match: re.Match[str], options: Mapping[str, str]) -> str | None:
    """The letter behind a marker, where it is an option's, and neither an article nor one of several."""
    written, rest = match["letter"], text[match.end("letter") :]
    named = [letter for letter, option in options.items() if len(option) > 1 and _begins(written + rest, option)]
    if named:  # 'A is taller', 'A同学': an option that begins with a letter
        return max(named, key=lambda letter: len(options[letter]))
    letter = written.upper()
    if letter not in options or _SEVERAL.match(rest):
        return None
    word = _WORD_AFTER.match(rest) if letter == "A" or written.islower() else None
    if word is not None and "\n" not in rest[: word.start("word")] and word["word"].lower() not in _NO_NOUN:
        return letter if _begins(rest, options[letter]) else None  # 'a red hat', unless that is what A says
    return letter


def _alone(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of a completion that is one, or of its last line."""
    lines = text.strip().split("\n")
    bare = _BARE.fullmatch(lines[-1])
    if bare is not None:
        letter = bare["letter"].upper()
        return letter if letter in options else None
    led = [match for line in lines if (match := _LED.fullmatch(line))]
    if len(led) != 1:  # several: the options are told again
        return None
    letter = led[0]["letter"]
    return letter if letter in options and _begins(led[0]["rest"], options[letter]) else None


def _begins(text: str, option: str) -> bool:
    found, wanted = _folded(text[: 2 * len(option) + 8]), _folded(option)
    rest = found[len(wanted) :]
    return found.startswith(wanted) and not (wanted[-1:].isalnum() and wanted[-1:].isascii() and _is_word(rest[:1]))


def _only_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text occurs, as whole words and not denied."""
    left, found = _folded(text), []
    for letter, option in sorted(options.items(), key=lambda item: -len(_folded(item[1]))):
        wanted = _folded(option)
        places = list(re.finditer(_pattern(wanted), left))
        if places:
            # a shorter option within a longer one does not count
            left = re.sub(_pattern(wanted), "\0", left)
        found += [letter] * any(
            not _DENIED.search(match.string[max(match.start() - 20, 0) : match.start()]) for match in places
        )
    return found[0] if len(found) == 1 else None


def _pattern(option: str) -> str:
    if len(option) == 1 or option in _WHOLE_CLAUSE:
        return rf"(?:(?<=[.,;:!?。、\n\0\"“(])|^)\s*{re.escape(option)}(?=\s*(?:[.,;:!?。、\n\"”)]|$))"
    before = r"(?<![a-z0-9])" if _is_word(option[0]) else ""
    after = r"(?![a-z0-9])" if _is_word(option[-1]) else ""
    return before + re.escape(option) + after


def _is_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _folded(text: str) -> str:
    lines = unicodedata.normalize("NFKC", text).casefold().strip().split("\n")
    return "\n".join(" ".join(line.split()) for line in lines)
