"""Short answers in words: how they are read, and the scores of the tasks that ask for them."""

from collections.abc import Callable, Sequence

from stages.contract.records import Sample
from stages.tasks.common import metrics
from stages.tasks.common.cmrc import cmrc_exact_match, cmrc_f1
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.common.wording import is_chinese


def on_one_line(text: str) -> str:
    """The text, stripped, with one blank for each run of white space. Models learn answers in this form."""
    return " ".join(text.split())


def learnt_answer(answers: Sequence[str]) -> str | None:
    """The first answer on one line, for training to learn instead of the answer as given. None if both are equal, or if
    there is no answer."""
    line = on_one_line(answers[0]) if answers else None
    return line if answers and line != answers[0] else None


def first_lines(text: str, sample: Sample) -> str:
    """The first lines of a completion without its reasoning, as many as the longest reference has, without blank lines;
    one line if there is no reference. The rest is left out, because models add explanations or further questions after
    the answer."""
    count = max((len(_lines(reference)) for reference in sample["references"]), default=1)
    return "\n".join(_lines(without_reasoning(text))[: max(count, 1)])


def scores(
    answer: str, sample: Sample, plain: Callable[[str], str] = str, squad_first: Callable[[str], str] = str
) -> dict[str, float]:
    """Exact match and F1 (0..1) by the rules of SQuAD, of CMRC 2018 for Chinese samples, and of Lorry; each the best
    over all references. Raises ValueError if there are none.

    Of an answer, as many lines count as the reference has. Lines are joined by blanks, and `plain` is applied to answer
    and reference. For SQuAD's scores, `squad_first` is then applied to both.
    """
    pairs = [
        (plain(" ".join(_lines(answer)[: len(lines) or 1])), plain(" ".join(lines)))
        for lines in map(_lines, sample["references"])
    ]
    if not pairs:
        raise ValueError("references: empty, so the answer cannot be scored; pass at least one")

    def highest_score(metric: Callable[[str, str], float], first: Callable[[str], str] = str) -> float:
        """The best score over all references, after `first` is applied to answer and reference."""
        return max(metric(first(given), first(reference)) for given, reference in pairs)

    chinese = (
        {"cmrc_exact_match": highest_score(cmrc_exact_match), "cmrc_f1": highest_score(cmrc_f1)}
        if is_about_chinese(sample)
        else {}
    )
    return {
        "exact_match": highest_score(metrics.exact_match, squad_first),
        "f1": highest_score(metrics.token_f1, squad_first),
        **chinese,
        "character_exact_match": highest_score(metrics.character_exact_match),
        "character_f1": highest_score(metrics.character_f1),
    }


def is_about_chinese(sample: Sample) -> bool:
    """Whether the question or a reference contains a Chinese character."""
    return any(map(is_chinese, [sample["meta"].get("question", ""), *sample["references"]]))


def score_notes(samples: Sequence[Sample]) -> list[str]:
    """Sentences on the rules by which each metric is computed, and on the number of samples with a reference that is
    empty after SQuAD's normalisation."""
    chinese = sum(map(is_about_chinese, samples))
    cmrc = (
        f" CMRC 2018's: cmrc_exact_match, cmrc_f1 ({chinese} of {len(samples)} samples, in Chinese);" if chinese else ""
    )
    notes = [f"SQuAD's: exact_match, f1;{cmrc} Lorry's own: character_exact_match, character_f1"]
    empty = [sample["id"] for sample in samples if not all(map(metrics.normalize, sample["references"]))]
    if empty:
        notes.append(
            f"SQuAD's rules leave nothing of a reference in {len(empty)} of {len(samples)} samples, such as {empty[0]}:"
            " f1 equals exact_match there, and any answer of which they leave nothing is right"
        )
    return notes


def _lines(text: str) -> list[str]:
    """The lines of a text, stripped, with one blank for each run of white space, without empty lines."""
    return [line for line in map(on_one_line, text.splitlines()) if line]
