"""The part of a stage that this process does: the whole stage, one shard, or one node of a training.

A shard (`--shard 1/4`) does every fourth document, adapter or chunk on its own; the command without `--shard` merges
the shards. A node is one of several machines that train the same adapter together.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.contract.errors import UsageError

SHARDED = ("preprocess", "train", "infer")
"""Stages that can run in shards."""


@dataclass(frozen=True)
class Shard:
    """Shard `index` (0-based) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        """The shard's name in console lines, such as `0/4`."""
        return str(self)

    @property
    def folder(self) -> str:
        """Name of the shard's folder, such as `0-of-4`."""
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Node:
    """One of `count` machines that train together, by its `rank` (0-based)."""

    rank: int
    count: int
    rendezvous: str
    """`host:port` of node 0, to which all nodes connect."""

    @property
    def label(self) -> str:
        """The machine's name in console lines, such as `node 0`."""
        return f"node {self.rank}"


Part = Shard | Node | None


def requested_part(stage: str, option: str | None, environment: Mapping[str, str]) -> Part:
    """The part that `--shard` or the environment asks for; None: the whole stage on one machine.

    `option` is the value of `--shard`; None: not given. Only train has nodes. Raises UsageError if a value is wrong or
    missing, if a shard and several nodes are asked for, and for a shard of a stage that cannot run in shards.
    """
    shard = _shard(option, environment)
    if shard is not None and stage not in SHARDED:
        raise UsageError(f"shard {shard}: {stage} has no shards; run it once, without --shard and LORRY_SHARD")
    node = _node(environment) if stage == "train" else None
    if shard is not None and node is not None:
        raise UsageError(
            f"shard {shard} on {node.count} nodes: a shard trains on one node; remove --shard or LORRY_NODES"
        )
    return shard or node


def _shard(option: str | None, environment: Mapping[str, str]) -> Shard | None:
    """The shard that the first of `--shard`, LORRY_SHARD and an Indexed Job's index names; None: no shards.

    Raises UsageError for a value that is not I/N with I below N.
    """
    index, count = environment.get("JOB_COMPLETION_INDEX"), environment.get("LORRY_SHARDS")
    if option is not None:
        text, name = option, "--shard"
    elif environment.get("LORRY_SHARD"):
        text, name = environment["LORRY_SHARD"], "LORRY_SHARD"
    elif index and count:  # an Indexed Job of Kubernetes; without LORRY_SHARDS it has no shards
        text, name = f"{index}/{count}", "JOB_COMPLETION_INDEX/LORRY_SHARDS"
    else:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"{name} {text}: not a shard I/N, counted from 0; for four shards write 0/4, 1/4, 2/4 or 3/4")
    return Shard(int(found[1]), int(found[2]))


def _node(environment: Mapping[str, str]) -> Node | None:
    """This machine's place in a training on several machines, from the environment; None if one machine trains alone.

    Raises UsageError if LORRY_NODES is wrong, or missing although one of the others is set. With several machines, also
    raises it if the rank (LORRY_NODE_RANK or JOB_COMPLETION_INDEX) or LORRY_RENDEZVOUS is wrong or missing.
    """
    count, rendezvous = environment.get("LORRY_NODES"), environment.get("LORRY_RENDEZVOUS")
    rank = environment.get("LORRY_NODE_RANK")
    if not count:
        if rank or rendezvous:
            raise UsageError(
                "LORRY_NODES: not set, but LORRY_NODE_RANK or LORRY_RENDEZVOUS is; set it to the number of machines"
            )
        return None
    rank = rank or environment.get("JOB_COMPLETION_INDEX")
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"LORRY_NODES {count}: not a whole number above 0; set it to the number of machines")
    if int(count) == 1:
        return None
    if not rank or not rank.isdecimal() or int(rank) >= int(count):
        last = int(count) - 1
        raise UsageError(
            f"LORRY_NODE_RANK: found {rank or 'no value'}; with LORRY_NODES {count} set it to a number from 0 to"
            f" {last}, a different one on each machine (an Indexed Job's JOB_COMPLETION_INDEX also counts)"
        )
    if not rendezvous or not re.fullmatch(r"[^\s:]+:[0-9]{1,5}", rendezvous):
        raise UsageError(
            f"LORRY_RENDEZVOUS: found {rendezvous or 'no value'}; set it to host:port of node 0, such as node-0:29500"
        )
    return Node(int(rank), int(count), rendezvous)
