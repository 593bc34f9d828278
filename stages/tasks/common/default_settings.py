"""Default members of a task's module: it reads questions from its own files, and has no settings of its own."""

from stages.contract.recipe import Section

READS_DOCUMENTS = False

READS_RECORDS = False

READS_CONVERSATIONS = False

COMPONENTS: tuple[str, ...] = ()


class Samples(Section):
    """Settings of `preprocess.samples`: none."""


class Passes(Section):
    """Settings of `infer.passes`: none."""


class Scoring(Section):
    """Settings of `eval.scoring`: none."""
