"""The scores of CMRC 2018, a Chinese reading comprehension task (Cui et al. 2019, arXiv:1810.07366), by the rules of
its published evaluation script.

The script splits what is not Chinese with NLTK's tokenizer, which needs data that do not come with Lorry. Rules take
its place: Penn Treebank's for words, and a list of abbreviations to find the ends of sentences. So scores may differ
from the script's if an answer has several sentences that are not Chinese, or words that are written together.
"""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher

_LEFT_OUT = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
"""Signs that do not count: those that the script leaves out. All other punctuation counts, also in ASCII."""

_CHINESE = re.compile("[\u4e00-\u9fa5]")

_SIGNS = r"""\[\](){}<>;@#$%&?!"«»‘„\u2012-\u2015"""
"""Signs that are tokens of their own wherever they stand."""
_SUFFIX = rf"(?:n't|'(?:s|m|d|ll|re|ve))(?=[\s{_SIGNS}]|,(?!\d)|\.(?!\w)|$)"
_IN_WORD = rf"(?!{_SUFFIX})(?:[^\s,'.{_SIGNS}]|,(?=\d)|\.(?!\.)|(?<=\w)'(?=\w))"
_TOKEN = re.compile(rf"\.{{2,}}|{_SUFFIX}|(?:{_IN_WORD})+|[,'{_SIGNS}]")
_CLOSED = re.compile(r"[\])}>\"'»]*\s*$")
_TWO_WORDS = {
    **{"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")},
    **{"gimme": ("gim", "me"), "lemme": ("lem", "me")},
}
_ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "co", "corp", "inc", "ltd", "vs", "no", "fig"}


def cmrc_exact_match(answer: str, reference: str) -> float:
    """1 if both are equal in lower case and without the signs that do not count, else 0."""
    return float(_without_uncounted_signs(answer) == _without_uncounted_signs(reference))


def cmrc_f1(answer: str, reference: str) -> float:
    """F1 (0..1) of the longest run of segments that both have in common; 0 if they share none. See `segments`."""
    found, wanted = segments(answer), segments(reference)
    match = SequenceMatcher(None, found, wanted, autojunk=False).find_longest_match()
    return 2 * match.size / (len(found) + len(wanted)) if match.size else 0.0


def segments(text: str) -> list[str]:
    """The tokens of a text, in order and in lower case: Chinese characters, words of other scripts, and signs, without
    the signs that do not count."""
    found: list[str] = []
    run = ""
    for character in _without_uncounted_signs(text):
        if _CHINESE.match(character):
            found += [*_words(run), character]
            run = ""
        else:
            run += character
    return [*found, *_words(run)]


def _without_uncounted_signs(text: str) -> str:
    """The text in lower case, stripped, without the signs that do not count."""
    return "".join(character for character in text.lower().strip() if character not in _LEFT_OUT)


def _words(run: str) -> Iterator[str]:
    """The words and signs of a run without Chinese characters, as Penn Treebank splits them."""
    for match in _TOKEN.finditer(run):
        word, before, after = match.group(), run[: match.start()], run[match.end() :]
        stop = []
        if word == '"':
            word = "''" if before and before[-1] not in " ([{<" else "``"
        elif len(word) > 1 and word[-1] == "." != word[-2] and _ends_a_sentence(word[:-1], after):
            word, stop = word[:-1], ["."]
        yield from (*_TWO_WORDS.get(word, (word,)), *stop)


def _ends_a_sentence(word: str, after: str) -> bool:
    """Whether the full stop after a word ends a sentence, and is not part of the word."""
    if _CLOSED.match(after):
        return True
    return after[:1].isspace() and len(word) > 1 and "." not in word and word not in _ABBREVIATIONS
