"""Default members of a task's module: it reads no documents, no records, and has no settings of its own."""

from stages.contract.recipe import Section

READS_DOCUMENTS = False

READS_RECORDS = False

COMPONENTS: tuple[str, ...] = ()


class Samples(Section):
    """`preprocess.samples`: no settings."""


class Passes(Section):
    """`infer.passes`: no settings."""


class Scoring(Section):
    """`eval.scoring`: no settings."""
