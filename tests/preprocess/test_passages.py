"""Passages of a page's text: nothing of it is beyond an embedder's window."""

import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from stages.preprocess.passages import sentence_window, split_text


def spans_of_words(text: str) -> list[tuple[int, int]]:
    """A token for every three characters of a word."""
    return [
        (start, min(start + 3, match.end()))
        for match in re.finditer(r"\S+", text)
        for start in range(match.start(), match.end(), 3)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_word_is_in_a_passage_and_every_passage_in_the_window(seed: int) -> None:
    chance = random.Random(seed)
    words = [f"w{number}" + "x" * chance.randint(0, 12) for number in range(chance.randint(1, 400))]
    text = " ".join(words)
    passages = split_text(text, spans_of_words, 40)
    assert all(len(spans_of_words(passage)) <= 40 for passage in passages)
    assert set(words) <= {word for passage in passages for word in passage.split()}
    assert all(passage in text for passage in passages)
    for before, after in pairwise(passages):
        assert set(before.split()) & set(after.split()), "neighbours share words"


def test_a_text_that_fits_is_one_passage_as_it_is() -> None:
    assert split_text(" a b ", spans_of_words, 40) == [" a b "]
    assert split_text("", spans_of_words, 40) == [""]


def test_a_word_longer_than_the_window_is_cut_not_lost() -> None:
    passages = split_text("x" * 600, spans_of_words, 40)
    assert all(len(spans_of_words(passage)) <= 40 for passage in passages) and len(passages) >= 5


def test_the_real_embedders_window(embedder: Path) -> None:
    window = sentence_window(embedder)
    assert window.tokens == 254, "256 with the two that its tokenizer adds"
    text = "".join(f"部件{number}位于阀体的左侧，" for number in range(200))
    passages = window.passages(text)
    assert len(passages) > 5 and "部件199" in passages[-1]
    assert not any(map(window.is_longer, passages))
    assert window.is_longer(text)


def test_a_window_is_as_large_as_the_models_own_rule_says(embedder: Path, tmp_path: Path) -> None:
    """Without sentence_bert_config.json; the vocabulary as older models have it; the model in a folder below."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedder / name, tmp_path)
    assert sentence_window(tmp_path).tokens == 510, "the smaller of model_max_length and max_position_embeddings"
    shutil.copy(embedder / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert sentence_window(tmp_path).tokens == 510
    whole = tmp_path / "whole"
    shutil.copytree(embedder, whole / "0_Transformer")
    (whole / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]')
    assert sentence_window(whole).tokens == 254
