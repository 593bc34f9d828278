"""Nine adapters on nine data mixes, and their vote, on closed-world puzzles: five seeds through Lorry's own stages.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.vote [--seeds 0 1 2 3 4] [--seconds 480] [--set KEY=VALUE]

Needs SmolLM2-135M-Instruct, and a GPU to be done in minutes. Each seed makes its own puzzles
(recipes/data/make_logic_choice.py), with held-out ones that no adapter is trained, chosen or weighed on; its mixes are
random parts of what is left. The seeds run side by side, each in the four stages' commands one after the other; after
`--seconds` all are stopped as by SIGTERM, and the same command goes on where they were. A row is written when a seed is
done. Then the vote is held again in other ways: nothing is asked again for that.

`--probe 'KEY=VALUE;KEY=VALUE' ...` is for setting up: one adapter of the first seed with each of these settings, side
by side, and accuracy by kind of puzzle.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.made_data import maker
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.roots import Roots

ROOTS = Roots.from_environment()
OUT = Path(os.environ.get("OUT", ROOTS.runs))
"""Where rows are kept as they come."""

PROBLEMS = {"train": 3000, "test": 400, "more": 1200}
KINDS = ("week", "clubs")
MOST_OPTIONS = 4
"""Puzzles, and questions on them, that so small a model learns anything of in minutes; of others it learns to guess."""

ADAPTERS = 9
STAGES = ("preprocess", "train", "infer", "eval")
SETTINGS = (
    *("data.validation_fraction=0.05", "train.rank=32", "train.alpha=64"),
    # few modules of the upper layers: a step of so small a model costs as many kernels as LoRA has parts
    r"train.target_modules='.*\.layers\.[12][0-9]\..*(q_proj|v_proj|down_proj)'",
    *("train.learning_rate=2e-3", "train.epochs=1", "train.effective_batch=16", "train.micro_batch=16"),
    *("train.checkpoint_every=100000", "train.log_every=10", "infer.batch_size=256", "infer.chunk_size=1024"),
)
SHARDS = 2
"""Processes that share out a seed's adapters: one trains while another still imports its libraries."""

OTHER_VOTES = {
    "weights by validation": "infer.vote={weights: validation}",
    "chosen greedily": "infer.vote={adapters: greedy}",
    "second round": "infer.vote={second_round: true}",
}
"""Name of another way to vote, and its setting. Only the last asks anything."""


def mixes(seed: int, count: int) -> str:
    """The data mixes of a seed as `train.adapters` has them: parts of 40 to 60 % of what is trained on."""
    found = []
    for number in range(1, count + 1):
        draw = 100 * seed + number
        share = (0.4, 0.5, 0.6)[number % 3]
        parts = [{"source": "train", "fraction": share, "seed": draw}]
        parts += [{"source": "more", "fraction": round(1 - share, 1), "seed": draw}]
        found.append({"name": f"mix-{number}", "data": parts})
    return json.dumps(found)


class Seed:
    """One seed's run."""

    def __init__(
        self,
        seed: int,
        problems: dict[str, int],
        kinds: list[str],
        most_options: int,
        adapters: int,
        sets: tuple[str, ...],
        name: str,
    ) -> None:
        self.seed, self.most_options, self.name = seed, most_options, name
        self.sets = (*SETTINGS, f"seed={seed}", f"train.adapters={mixes(seed, adapters)}", *sets)
        self.data = ROOTS.runs / "vote-data" / "-".join(map(str, [seed, *problems.values(), *kinds, most_options]))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = False
        self.seconds: dict[str, float] = defaultdict(float)
        if not self.data.is_dir():
            maker("logic_choice").make(
                self.data, seed, **problems, answers=True, kinds=kinds, most_options=most_options
            )

    def stage(self, stage: str, *more: str) -> bool:
        """Run a stage's command; whether it was done."""
        if self.stopped:
            return False
        began = time.monotonic()
        code = 0
        if stage == "train":
            code = max(self._run(stage, more, [f"{index}/{SHARDS}" for index in range(SHARDS)]))
        if code == 0:
            (code,) = self._run(stage, more, [None])
        self.seconds[stage] += round(time.monotonic() - began, 1)
        print(f"seed {self.seed}: {stage} ended with {code} after {time.monotonic() - began:.0f} s", flush=True)
        if code not in (0, 75):
            print((ROOTS.runs / f"{self.name}.log").read_text(errors="replace")[-1500:], flush=True)
        return code == 0

    def _run(self, stage: str, more: tuple[str, ...], shards: list[str | None]) -> list[int]:
        """Exit codes of a stage's command, one for each shard, all at once; None is the plain command."""
        sets = [word for value in (*self.sets, *more) for word in ("--set", value)]
        command = [sys.executable, "-m", f"entrypoints.{stage}", "logic-choice", "--profile", "tiny"]
        command += ["--run", self.name, "--data", str(self.data), *sets]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        with (ROOTS.runs / f"{self.name}.log").open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    [*command, *(["--shard", shard] if shard else [])],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                for shard in shards
            ]
            return [process.wait() for process in self.processes]

    def stop(self) -> None:
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def work(self) -> dict[str, Any] | None:
        """All stages, and the row; None where it was not done. An earlier start's row is kept as it is."""
        kept = ROOTS.runs / f"vote-row-{self.seed}.json"
        row = read_json(kept)
        if row is None and all(self.stage(stage) for stage in STAGES):
            row = self.with_other_votes(self.row())
            if not self.stopped:  # else the other votes are still to be held
                write_json(kept, row)
        if row is not None:
            write_json(OUT / kept.name, row)
        return row

    def with_other_votes(self, row: dict[str, Any]) -> dict[str, Any]:
        for name, vote in OTHER_VOTES.items():
            if self.stage("infer", vote) and self.stage("eval", vote):
                row["other votes"][name] = read_json(self.folder("eval") / "scores.json")["vote"]["accuracy"]["value"]
        return row

    def probe(self) -> None:
        """All stages, and accuracy by kind of puzzle."""
        if all(self.stage(stage) for stage in STAGES):
            print("PROBE", self.sets[len(SETTINGS) + 2 :], dict(self.seconds), flush=True)
            self.by_kind()

    def folder(self, stage: str) -> Path:
        return ROOTS.runs / self.name / stage

    def row(self) -> dict[str, Any]:
        scores = {name: one["accuracy"] for name, one in read_json(self.folder("eval") / "scores.json").items()}
        vote = read_json(self.folder("eval") / "vote.json")
        single = {name: one["value"] for name, one in scores.items() if name not in ("base", "vote")}
        best = max(single, key=lambda name: single[name])
        (gain,) = vote["over_best"].values()
        train = read_json(self.folder("train") / "manifest.json")["counts"]
        return {
            "seed": self.seed,
            "options of a question, at most": self.most_options,
            "kinds of puzzles": sorted({row["id"].split("-")[1] for row in read_jsonl(self.data / "test.jsonl")}),
            "held-out problems": len(read_jsonl(self.data / "test.jsonl")),
            "questions": scores["vote"]["n"],
            "samples an adapter": [train[f"{name} samples"] for name in single],
            "base": scores["base"]["value"],
            "adapters": single,
            "mean of the adapters": round(fmean(single.values()), 4),
            "best single adapter": single[best],
            "vote": scores["vote"]["value"],
            "vote, 95% interval": [scores["vote"]["low"], scores["vote"]["high"]],
            "vote no worse than the best single adapter": scores["vote"]["value"] >= single[best],
            "vote over the best by validation, 95% interval": [gain["value"], gain["low"], gain["high"]],
            "decided by": vote["decided_by"],
            "agreement": vote["agreement"],
            "other votes": {},
            "seconds": dict(self.seconds),
        }

    def by_kind(self) -> None:
        """Print the accuracy of base, adapters and vote by kind of puzzle and number of options of a question."""
        test = read_jsonl(self.folder("preprocess") / "samples" / "test.jsonl")
        kinds = {sample["id"]: f"{sample['id'].split('-')[1]}, {sample['meta']['kind']}" for sample in test}
        right = {sample["id"]: sample["references"][0] for sample in test}
        for path in sorted((self.folder("infer") / "predictions").glob("*.jsonl")):
            hits = defaultdict(list)
            for record in read_jsonl(path):
                hits[kinds[record["id"]]].append(record["answer"] == right[record["id"]])
            print(path.stem, {kind: round(100 * fmean(each), 1) for kind, each in sorted(hits.items())}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--problems", type=int, nargs=3, metavar=("TRAIN", "TEST", "MORE"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of puzzles")
    parser.add_argument("--most-options", type=int, default=MOST_OPTIONS, help="of a question")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop all after this long")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for all seeds")
    parser.add_argument("--probe", nargs="+", metavar="SETTINGS", help="see above")
    chosen = parser.parse_args()
    problems = dict(zip(PROBLEMS, chosen.problems, strict=True)) if chosen.problems else PROBLEMS
    ROOTS.runs.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    sets = tuple(chosen.set)
    if chosen.probe:
        names = [f"vote-probe-{chosen.most_options}-{number}" for number in range(len(chosen.probe))]
        made = [
            (chosen.seeds[0], 1, (*sets, *each.split(";")), name)
            for each, name in zip(chosen.probe, names, strict=True)
        ]
    else:
        made = [(seed, chosen.adapters, sets, f"vote-{seed}") for seed in chosen.seeds]
    puzzles = (problems, chosen.kinds, chosen.most_options)
    seeds = [Seed(seed, *puzzles, adapters, own, name) for seed, adapters, own, name in made]
    timer = threading.Timer(min(chosen.seconds, 86_400), lambda: [seed.stop() for seed in seeds])
    timer.start()
    with ThreadPoolExecutor(len(seeds)) as pool:
        found = list(pool.map(Seed.probe if chosen.probe else Seed.work, seeds))
    timer.cancel()
    rows = [row for row in found if row is not None]
    if rows:
        no_worse = sum(row["vote no worse than the best single adapter"] for row in rows)
        summary = {"seeds": len(rows), "vote no worse than the best single adapter": no_worse}
        write_rows("vote", [*rows, summary], "python -m benchmarks.vote")
    if not chosen.probe:
        print(f"{len(rows)} of {len(seeds)} seeds are done; the same command goes on with the others", flush=True)


if __name__ == "__main__":
    main()
