"""The prompt, which is Chinese for a Chinese problem and else English, and the letters that completions mean.

The prompt is short so that small models can follow it.
"""

import re
import unicodedata
from collections.abc import Mapping

from stages.contract.records import Message, escape_places

# -- prompt and target -------------------------------------------------------------------------------------------

_ROLE = {
    True: "你擅长逻辑推理。采用封闭世界假设：题目没有说明、也推不出的，都不成立。",
    False: "You solve logic puzzles. The world is closed: what the facts do not say or imply is false.",
}
_ASKED = {
    # no letter as an example: small models would repeat it
    True: "题目：{problem}\n问题：{question}\n{options}\n这是单选题。最后一行写“答案是：”和该选项的字母。",
    False: "{problem}\nQuestion: {question}\n{options}\n"
    "One option is right. End with the line `Answer: ` and its letter.",
}
_TARGET = {True: "答案是：{}", False: "Answer: {}"}


def is_chinese(text: str) -> bool:
    """Whether a text contains a Chinese character, also of Unicode's extension A."""
    return re.search(r"[\u3400-\u4dbf\u4e00-\u9fff]", text) is not None


def choice_prompt(problem: str, question: str, options: Mapping[str, str]) -> list[Message]:
    """The prompt for a sub-question of a problem; `options` are texts by letter."""
    chinese = is_chinese(problem)
    lines = "\n".join(f"{letter}. {escape_places(option)}" for letter, option in options.items())
    asked = _ASKED[chinese].format(problem=escape_places(problem), question=escape_places(question), options=lines)
    return [{"role": "system", "content": _ROLE[chinese]}, {"role": "user", "content": asked}]


def target_completion(problem: str, letter: str) -> str:
    """The completion to learn: only the line that the prompt asks for."""
    return _TARGET[is_chinese(problem)].format(letter)


# -- completions -------------------------------------------------------------------------------------------------

_OPENING = r"[\s\"'“”‘’(\[{【「<]*"
_LINK = (
    r"(?:\s*(?:(?:应该?|应当|很?可能|大概|只能|显然|必然|必定|一定|就|便|则|最终)?(?:是|为|选择?)|:|=|->|→|-|,"
    r"|\b(?:(?:should|must|would|could|may|might) be|is|was|(?:most )?likely|probably|clearly|definitely)\b))"
)
_LETTER = r"(?P<letter>[A-Za-z])(?![A-Za-z0-9'’\-])"
_NOUN = rf"(?:(?:(?:the\s+)?\b(?:option|choice|letter)\b|选项)\s*:?{_OPENING})?"
_MARKED = re.compile(
    r"(?:答案|正确的?选项|\banswers?\b|\b(?:correct|right|best)\s+(?:option|choice|one|letter)\b)[】\])}>」”\"]*"
    rf"(?:\s+(?:to|for)\s[^.:\n]{{1,60}}?{_LINK}|{_LINK}){{0,4}}{_OPENING}{_NOUN}{_LETTER}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    rf"(?:(?<![候备])选择?(?!项)|\b(?:choose|pick|select)\b){_LINK}{{0,2}}{_OPENING}{_NOUN}{_LETTER}", re.IGNORECASE
)
"""Weaker than an answer marker, because reasoning also chooses along the way."""
_JUDGED = re.compile(
    r"(?<![A-Za-z0-9'’\-])(?P<letter>[A-Z])[\"'”’)\]】」 ]{0,3}项?\s*"
    r"(?:\bis\s+(?:(?:clearly|definitely)\s+)?(?:the\s+)?(?:only\s+)?(?:(?:correct|right)\b|answer\b)"
    r"|[是为]?正确(?!吗)|[是为](?:对的|答案)|符合(?:题意|要求))"
)
"""Weaker still: counts only if one letter is called right and no option mentions a letter."""
_SUPPOSED = re.compile(
    r"(?:\b(?:if|whether|suppose|assum(?:e|ing)|unless|why)\b|如果|假[设如定]|要是|倘若|若|是否|为什么|为何)"
    r"(?:(?!\b(?:then|so)\b|[则就]|那么|所以)[^.,;:!?。\n])*$",
    re.IGNORECASE,
)
"""Before a letter in the same clause: the letter is only supposed, and is not an answer."""
_REFUSED = re.compile(
    r"(?:\b(?:not|never|cannot|nor|rather than|instead of)|n['’]t|\bno reason to)"
    r"(?:\s+(?:really|actually|simply|just|ever|even|be|want to|have to|able to|going to))*\s+$"
    r"|(?<!不得)(?:不|没有?|(?<!分)别|勿|无法|并非)(?:[能会应该可以要必再想敢宜]|理由){0,3}\s*$",
    re.IGNORECASE,
)
"""Before a choosing word: the letter is not chosen."""
_TAKEN_BACK = re.compile(
    r"[\"'”’)\]}】」> ]{0,3}项?(?:的?(?:说法|答案|结论))?[显然明肯定也都就是]{0,6}"
    r"(?:不(?:对|正确|成立|符合|行|可能|能)|错|矛盾|有误|被?排除|吗|还是|\?"
    r"|\s*\b(?:(?:is|was|seems?|looks?|would be|must be)\s+(?:(?:clearly|obviously|definitely|also|probably)\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|ruled|excluded|eliminated)|(?:is|was|does|could|would)n['’]t|cannot)\b)"
)
"""After a letter: it is denied or questioned."""
_SEVERAL = re.compile(
    r"[\s\"'”’)\]】」]*(?:(?:\bor\b|\band\b|[和或与及])[\s\"'“‘(\[【「]*[A-Z](?![A-Za-z])"
    r"|[,/、&+]\s*[A-Z]\s*(?:[,/、&+.。;)\n]|\bor\b|\band\b|[和或与及中]|$))"
)
_WORD_AFTER = re.compile(r"\s+(?P<word>[A-Za-z]+)")
_NO_NOUN = {"because", "since", "as", "for", "is", "was", "based", "which", "that", "given", "due"}
"""Words that never follow the article `a`."""
_BARE = re.compile(rf"{_OPENING}(?P<letter>[A-Za-z])[\s\"'”’)\]}}】」>]*[.:、,;)]?\s*")
_LED = re.compile(r"[\s(\[【]*(?P<letter>[A-Z])\s*[)\]】]?\s*[.:、)\]】]\s*(?P<rest>\S.*)")
_WHOLE_CLAUSE = {"yes", "no", "true", "false", "all", "none", "both", "one", "it", "on", "off", "不是", "正确", "错误"}
"""Options that are common in ordinary sentences; they count only as a clause of their own."""
_DENIED = re.compile(r"(?:\b(?:not|never|neither|nor|no)|n['’]t|不是|并非|不|非|没有)\s*(?:(?:the|an?)\s+)?$")


def letter_in(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of `options` with which a completion answers; None if no rule finds one.

    The first rule that finds a letter decides:

    1. the last valid letter after an answer marker;
    2. the last valid letter after a choosing word;
    3. a last line that is only a letter, or the only line with a letter and its option;
    4. the only letter that is called right;
    5. the only option whose text occurs.

    Letters outside the options, and letters that are denied, supposed or asked about, do not count.
    """
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf)\b|[*_`#$]", "", unicodedata.normalize("NFKC", text))
    for pattern in (_MARKED, _CHOSEN):
        letters = _meant_letters(pattern, text, options)
        if letters:
            return letters[-1]
    return _lone_letter(text, options) or _only_letter_called_right(text, options) or _only_option(text, options)


def _meant_letters(pattern: re.Pattern[str], text: str, options: Mapping[str, str]) -> list[str]:
    """The valid letters that a pattern finds, without those denied, supposed or asked about."""
    found = []
    for match in pattern.finditer(text):
        before, letter = text[max(match.start() - 40, 0) : match.start()], _option_letter(text, match, options)
        refused = pattern is _CHOSEN and _REFUSED.search(before)
        if letter and not refused and not _SUPPOSED.search(before) and not _TAKEN_BACK.match(text, match.end("letter")):
            found.append(letter)
    return found


def _only_letter_called_right(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that is called right. None if none or several are, or if an option mentions a single letter."""
    if any(re.search(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", option) for option in options.values()):
        return None  # 'A is right' may be about a person named A
    found = set(_meant_letters(_JUDGED, text, options))
    return found.pop() if len(found) == 1 else None


def _option_letter(text: str, match: re.Match[str], options: Mapping[str, str]) -> str | None:
    """The letter of the option that a match names. If the text there begins with an option's text, it is that option.
    None if the letter names no option, is an article, or is one of several."""
    written, rest = match["letter"], text[match.end("letter") :]
    named = [letter for letter, option in options.items() if len(option) > 1 and _begins_with(written + rest, option)]
    if named:  # 'A is taller', 'A同学': options that begin with a letter
        return max(named, key=lambda letter: len(options[letter]))
    letter = written.upper()
    if letter not in options or _SEVERAL.match(rest):
        return None
    word = _WORD_AFTER.match(rest) if letter == "A" or written.islower() else None
    if word is not None and "\n" not in rest[: word.start("word")] and word["word"].lower() not in _NO_NOUN:
        return letter if _begins_with(rest, options[letter]) else None  # 'a red hat', unless that is option A
    return letter


def _lone_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter in the last line, if that line is only a letter; else the letter of the only line that is a letter and
    its option. None without either, or if the letter is not one of `options`."""
    lines = text.strip().split("\n")
    bare = _BARE.fullmatch(lines[-1])
    if bare is not None:
        letter = bare["letter"].upper()
        return letter if letter in options else None
    led = [match for line in lines if (match := _LED.fullmatch(line))]
    if len(led) != 1:  # several: the completion repeats the options
        return None
    letter = led[0]["letter"]
    return letter if letter in options and _begins_with(led[0]["rest"], options[letter]) else None


def _begins_with(text: str, option: str) -> bool:
    """Whether a text begins with an option as whole words."""
    found, wanted = _folded_text(text[: 2 * len(option) + 8]), _folded_text(option)
    rest = found[len(wanted) :]
    return found.startswith(wanted) and not (
        wanted[-1:].isalnum() and wanted[-1:].isascii() and _is_latin_or_digit(rest[:1])
    )


def _only_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text occurs as whole words and is not denied; None if none or several do."""
    left, found = _folded_text(text), []
    for letter, option in sorted(options.items(), key=lambda item: -len(_folded_text(item[1]))):
        wanted = _folded_text(option)
        places = list(re.finditer(_option_pattern(wanted), left))
        if places:
            # a shorter option inside a longer one does not count
            left = re.sub(_option_pattern(wanted), "\0", left)
        found += [letter] * any(
            not _DENIED.search(match.string[max(match.start() - 20, 0) : match.start()]) for match in places
        )
    return found[0] if len(found) == 1 else None


def _option_pattern(option: str) -> str:
    """A regular expression that finds an option as whole words, or as a whole clause if it is one character or a common
    word. The option must be folded."""
    if len(option) == 1 or option in _WHOLE_CLAUSE:
        return rf"(?:(?<=[.,;:!?。、\n\0\"“(])|^)\s*{re.escape(option)}(?=\s*(?:[.,;:!?。、\n\"”)]|$))"
    before = r"(?<![a-z0-9])" if _is_latin_or_digit(option[0]) else ""
    after = r"(?![a-z0-9])" if _is_latin_or_digit(option[-1]) else ""
    return before + re.escape(option) + after


def _is_latin_or_digit(character: str) -> bool:
    """Whether a character is an ASCII letter or digit."""
    return character.isascii() and character.isalnum()


def _folded_text(text: str) -> str:
    """The text in one width and case, with one blank for each run of white space in a line. Line ends stay."""
    lines = unicodedata.normalize("NFKC", text).casefold().strip().split("\n")
    return "\n".join(" ".join(line.split()) for line in lines)
