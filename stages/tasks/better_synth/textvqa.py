"""TextVQA: its questions and human answers in the form of LLaVA's scripts, and its accuracy.

The accuracy is MMF's (`EvalAIAnswerProcessor` and `TextVQAAccuracyEvaluator` of Singh et al. 2019, 'Towards VQA
Models That Can Read'), which LLaVA, MGM and nearly all published figures use.

    <name>.jsonl        {"question_id": <image id>, "image": "<file>", "text": "<prompt>"}, one a line
    <annotations>.json  {"data": [{"image_id": ..., "question": "...", "answers": [10 texts]}]}
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.contract.errors import DataError
from stages.tasks.common.encodings import decode
from stages.tasks.common.json_lines import (
    BadRecordError,
    found_keys,
    is_given,
    lines_in,
    object_in,
    text_of,
    text_or_number,
)
from stages.tasks.common.tables import JsonFloat, Row
from stages.tasks.task import Skip

HUMANS = 10
"""Number of human answers of a question."""

Cleaning = Literal["mmf", "mended"]
"""`mmf`: exactly as MMF's program, including its bugs, which published figures include. `mended`: with the bugs fixed.

MMF's pattern for a lone period, `(?!<=\\d)(\\.)(?!\\d)`, is meant to look behind for a digit, but the misspelt
lookbehind always succeeds: "3." becomes "3". MMF also passes `re.UNICODE`, which is 32, as the number of periods to
remove. A third bug, that its table of numbers adds every word it meets, changes no answer.
"""

Annotations = Mapping[tuple[str, str], Sequence[str]]
"""Human answers by image id and lower-case question."""


@dataclass(frozen=True)
class TextVqaQuestion:
    """A question about the text in a picture."""

    question_id: str
    """The picture's id, which several questions may share."""
    image: str
    """File name of the picture, as in the questions file."""
    prompt: str
    """The text of the prompt, possibly with OCR words."""
    question: str
    """The question alone in lower case, by which its annotation is found."""
    answers: tuple[str, ...]
    """Ten human answers, with repetitions; empty without annotations."""
    where: str
    """File and line."""


# -- the accuracy ------------------------------------------------------------------------------------------------

BY_HUMANS = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Accuracy of an answer by how many humans gave it, 4 meaning 4 or more: the mean of min(1, matches / 3) over the ten
ways to leave one human out."""


def accuracy(answer: str, references: Sequence[str], cleaning: Cleaning = "mmf") -> float:
    """The accuracy of one answer in 0..1 against ten human answers. Raises DataError if there are not ten."""
    if len(references) != HUMANS:
        raise DataError(f"a TextVQA question has {len(references)} human answers; its accuracy needs {HUMANS}")
    cleaned = clean(answer, cleaning)
    agree = sum(clean(reference, cleaning) == cleaned for reference in references)
    return BY_HUMANS[min(agree, len(BY_HUMANS) - 1)]


PUNCTUATION = r';/[]"{}()=+\_-><@`,?!'

_LONE_PERIOD = {"mmf": re.compile(r"\.(?!\d)"), "mended": re.compile(r"(?<!\d)\.(?!\d)")}
_MOST_PERIODS = {"mmf": int(re.UNICODE), "mended": 0}
"""Number of lone periods that are removed; 0: all."""

_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

_ARTICLES = ("a", "an", "the")


def clean(text: str, cleaning: Cleaning = "mmf") -> str:
    """An answer normalised for comparison by MMF's rules.

    In this order: lower case; remove commas and question marks; put a blank before `'s`; remove each sign of
    PUNCTUATION if it touches a blank anywhere in the text, else replace it by a blank; remove lone periods; write
    number words up to ten as digits; remove articles; add apostrophes to contractions. (MMF also has a rule for texts
    such as "1,000", which never applies because all commas are removed before.)
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    touching = {sign for sign in PUNCTUATION if f"{sign} " in text or f" {sign}" in text}
    text = "".join(("" if sign in touching else " ") if sign in PUNCTUATION else sign for sign in text)
    text = _LONE_PERIOD[cleaning].sub("", text, count=_MOST_PERIODS[cleaning])
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_TABLE = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
oughtnt:oughtn't 'ows'at:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've
shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've
theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll
whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
"""
_CONTRACTIONS = dict(pair.split(":") for pair in _TABLE.split())
"""MMF's table, including its one entry that removes an apostrophe. It omits entries that never match a cleaned word:
with a capital (so "Im" stays "im") or with `'s`; and entries that change nothing."""


# -- files -------------------------------------------------------------------------------------------------------


def read_questions(path: Path, annotations: Annotations | None, skip: Skip) -> Iterator[TextVqaQuestion]:
    """The questions of a file, read one at a time. Unusable lines go to `skip`, including questions without an
    annotation.

    `annotations` is None if the questions are not scored; then none needs an annotation.
    """
    for place, line in lines_in(path):
        where = f"{path.name}:{place}"
        try:
            yield _question(line, annotations, where)
        except BadRecordError as error:
            skip(where, error.reason, str(error))


def _question(line: Row, annotations: Annotations | None, where: str) -> TextVqaQuestion:
    """The question in a line. Raises BadRecordError if the line is unusable, or if `annotations` lacks the question or
    has another number of answers than HUMANS for it."""
    record = object_in(line)
    name, image = _id(record, "question_id"), text_of(record, "image")
    text_of(record, "text")
    prompt = str(record["text"])  # not stripped: its annotation has the same blanks
    question = question_in(prompt)
    answers: Sequence[str] = ()
    if annotations is not None:
        if (name, question) not in annotations:
            raise BadRecordError("no annotation for the question", f"image {name}: {question}"[:200])
        answers = annotations[name, question]
        if answers and len(answers) != HUMANS:
            raise BadRecordError(f"not {HUMANS} human answers", f"found {len(answers)}")
    return TextVqaQuestion(name, image, prompt, question, tuple(answers), where)


def question_in(prompt: str) -> str:
    """The question in one of LLaVA's prompts, in lower case. Raises BadRecordError for a prompt of another form.

    By the rules of LLaVA's eval_textvqa.py: the text between "Question: " and " Short answer:" if OCR words come first;
    the first of two lines; or, of three lines, the one before or after the line with OCR words.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise BadRecordError("unknown form of prompt", prompt[:100])


def read_annotations(path: Path) -> dict[tuple[str, str], list[str]]:
    """Human answers by image id and lower-case question, empty for a question without any. If a question occurs twice,
    the last occurrence counts, as in LLaVA. Raises DataError for a file of another form."""
    try:
        content = json.loads(decode(path.read_bytes()), parse_float=JsonFloat)
        return {
            (_id(each, "image_id"), each["question"].lower()): _texts(each.get("answers")) for each in content["data"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadRecordError) as error:
        raise DataError(
            f"{path}: not TextVQA's annotations ({type(error).__name__}: {error}); it needs `data`, a list of objects"
            " with image_id, question and answers"
        ) from error


def _texts(values: object) -> list[str]:
    """Human answers, texts or numbers, as texts. A missing answer becomes an empty text; if all are missing, the list
    is empty. Raises TypeError for other values."""
    if not is_given(values):
        return []
    if not isinstance(values, list):
        raise TypeError(f"answers are not a list of texts or numbers, found {values!r}"[:200])
    if not any(map(is_given, values)):
        return []
    found = [text_or_number(value) if is_given(value) else "" for value in values]
    if None in found:
        raise TypeError(f"answers are not a list of texts or numbers, found {values!r}"[:200])
    return [str(text) for text in found]


def _id(record: Mapping[str, object], field: str) -> str:
    """An id of a record as text. Raises BadRecordError if it is neither a string nor an integer."""
    value = record.get(field)
    if type(value) not in (str, int):
        raise BadRecordError(
            f"no {field}" if value is None else f"{field} is neither a string nor an integer",
            found_keys(record) if value is None else repr(value)[:100],
        )
    return str(value)
