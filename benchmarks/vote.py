"""Nine adapters on nine data mixes, and their vote, on closed-world puzzles: five seeds through Lorry's stages.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.vote [--seeds 0 1 2 3 4] [--seconds 480] [--set KEY=VALUE]

Needs SmolLM2-135M-Instruct. Takes minutes on a GPU. Each seed makes its own puzzles
(recipes/data/make_logic_choice.py): a few of every kind in train.jsonl, many of one kind in each file of sources/, and
held-out ones of every kind, on which no adapter is trained, chosen or weighed. A mix has train.jsonl and parts of all
sources but one, so none of the nine knows everything. A tenth adapter, which does not vote, has parts of all sources:
the alternative to training nine.

The seeds run side by side on all GPUs; each runs the four stages' commands one after the other. After `--seconds` all
get SIGTERM, and the same command resumes them. Each seed writes its row when it is done, after voting again in other
ways. Of these, only the second round prompts a model again.

`--probe 'KEY=VALUE;KEY=VALUE' ...` is for choosing settings. It runs the first seed with each of these settings, side
by side, with one adapter per source, trained on train.jsonl and that source, and prints accuracy by kind of puzzle.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from benchmarks.made_data import load_maker
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.roots import Roots

ROOTS = Roots.from_environment()
OUT = Path(os.environ.get("OUT", ROOTS.runs))
"""Folder of a second copy of each finished row."""

PROBLEMS = {"train": 300, "test": 400, "source": 1500}
"""Problems in train.jsonl, in test.jsonl, and in each file of sources/."""
KINDS = ("chain", "clubs", "family")
MOST_OPTIONS = 7
"""Kinds of puzzles, and the maximum number of options per question. SmolLM2 learns these kinds in minutes; of other
kinds, it only learns to guess."""

ADAPTERS = 9
SHARE = 0.7
"""Share of a source in a mix."""
EVERYTHING = "everything"
"""Name of the adapter on all sources."""
STAGES = ("preprocess", "train", "infer", "eval")
SETTINGS = (
    *("data.validation_fraction=0.3", "train.rank=32", "train.alpha=64"),
    # few modules of the upper layers: the time per step of such a small model grows with the number of LoRA modules
    r"train.target_modules='.*\.layers\.[12][0-9]\..*(q_proj|v_proj|down_proj)'",
    *("train.learning_rate=2e-3", "train.epochs=2", "train.effective_batch=16"),
    *("train.checkpoint_every=100000", "train.log_every=10", "infer.batch_size=256", "infer.chunk_size=1024"),
)
OTHER_VOTES = {
    "weights by validation": "{weights: validation}",
    "second round": "{second_round: true}",
    "chosen greedily, of all ten": "{adapters: greedy}",
}
"""Keys of `infer.vote` for other ways to vote, by name, as YAML. The last may choose among all ten adapters."""


def make_mixes(seed: int, count: int, kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the data mixes of a seed, by adapter.

    `count` mixes have parts of all sources but one, which changes from mix to mix. The last mix, EVERYTHING, has parts
    of all sources. Every mix also has train.jsonl.
    """
    found = {}
    for number in range(1, count + 1):
        left_out = kinds[number % len(kinds)]
        found[f"mix-{number}"] = parts([kind for kind in kinds if kind != left_out], 100 * seed + number)
    return {**found, EVERYTHING: parts(kinds, 100 * seed)}


def parts(kinds: Sequence[str], draw: int) -> list[dict[str, Any]]:
    """Return a mix of train.jsonl and a part of each source in `kinds`, in the form of an adapter's `data` key.

    `draw` is the seed with which the parts are drawn.
    """
    return [{"source": "train"}, *({"source": kind, "fraction": SHARE, "seed": draw} for kind in kinds)]


def make_data(folder: Path, seed: int, problems: dict[str, int], kinds: Sequence[str], most_options: int) -> None:
    """Write a data folder: train.jsonl and test.jsonl with answers, and a file in sources/ for each kind of puzzle.

    `problems` has the number of problems by file, as PROBLEMS. Problems of test.jsonl are left out of the other files,
    which may therefore have fewer.
    """
    made = load_maker("logic_choice")
    some = {"train": problems["train"], "test": problems["test"], "more": 0}
    made.make(folder, seed, **some, answers=True, kinds=kinds, most_options=most_options)
    known = {problem["problem"] for problem in read_jsonl(folder / "test.jsonl")}
    for kind in kinds:
        found = made.make_file(seed, "more", problems["source"], [kind], most_options)
        made.write(folder / "sources" / f"{kind}.jsonl", [one for one in found if one["problem"] not in known])
    (folder / "sources" / "more.jsonl").unlink()


class Seed:
    """The run of one seed, or of one setting of a probe."""

    def __init__(
        self,
        seed: int,
        problems: dict[str, int],
        kinds: list[str],
        most_options: int,
        adapters: dict[str, list[dict[str, Any]]],
        shards: int,
        sets: tuple[str, ...],
        name: str,
        card: int,
    ) -> None:
        self.seed, self.most_options, self.name = seed, most_options, name
        self.shards, self.card, self.adapters = shards, card, adapters
        matrix = json.dumps([{"name": name, "data": data} for name, data in adapters.items()])
        self.voters = [name for name in adapters if name != EVERYTHING]
        self.sets = (*SETTINGS, f"seed={seed}", f"train.adapters={matrix}", self._vote_setting(), *sets)
        self.data = ROOTS.runs / "vote-data" / "-".join(map(str, [seed, *problems.values(), *kinds, most_options]))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = False
        self.seconds: dict[str, float] = defaultdict(float)
        if not self.data.is_dir():
            make_data(self.data, seed, problems, kinds, most_options)

    def _vote_setting(self, otherwise: str = "{}") -> str:
        """Return the override of `infer.vote`, as KEY=VALUE, by which all adapters but EVERYTHING vote.

        `otherwise` has keys, as YAML, that are added or replace others.
        """
        return f"infer.vote={json.dumps({'adapters': self.voters, **yaml.safe_load(otherwise)})}"

    def run_stage(self, stage: str, *more: str) -> bool:
        """Run a stage's command with the overrides `more`. Returns whether the stage is done.

        For train, first runs all shards at once. After `stop`, returns False and starts nothing.
        """
        if self.stopped:
            return False
        began = time.monotonic()
        code = 0
        if stage == "train":
            code = max(self._run_processes(stage, more, [f"{index}/{self.shards}" for index in range(self.shards)]))
        if code == 0:
            (code,) = self._run_processes(stage, more, [None])
        self.seconds[stage] += round(time.monotonic() - began, 1)
        took = time.monotonic() - began
        print(f"vote: {stage} of seed {self.seed} ended with exit code {code} after {took:.0f} s", flush=True)
        if code not in (0, 75):
            print((ROOTS.runs / f"{self.name}.log").read_text(errors="replace")[-1500:], flush=True)
        return code == 0

    def _run_processes(self, stage: str, more: tuple[str, ...], shards: list[str | None]) -> list[int]:
        """Run a stage's command once for each of `shards`, all at the same time. Returns the exit codes.

        None in `shards` is a command without --shard. The output is appended to the run's log.
        """
        sets = [word for value in (*self.sets, *more) for word in ("--set", value)]
        command = [sys.executable, "-m", f"entrypoints.{stage}", "logic-choice", "--profile", "tiny"]
        command += ["--run", self.name, "--data", str(self.data), *sets]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.card)
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
        """Send SIGTERM to the stage's running processes, and keep further stages from starting."""
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def run_stages(self) -> dict[str, Any] | None:
        """Run all stages, vote in the other ways too, and write the row. Returns the row; None if a stage is not done.

        If an earlier start wrote the row, only copies that row to OUT and returns it. After `stop`, the row may lack
        other votes; it is then written to OUT only, so that the next start completes it.
        """
        kept = ROOTS.runs / f"vote-row-{self.seed}.json"
        row = read_json(kept)
        if row is None and all(self.run_stage(stage) for stage in STAGES):
            row = self.add_other_votes(self.finished_row())
            if not self.stopped:  # the row of a stopped seed lacks some of the other votes
                write_json(kept, row)
        if row is not None:
            write_json(OUT / kept.name, row)
        return row

    def add_other_votes(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run infer and eval again for each of OTHER_VOTES, and add the accuracy of those that succeed to the row.

        Returns the row.
        """
        for name, vote in OTHER_VOTES.items():
            if self.run_stage("infer", self._vote_setting(vote)) and self.run_stage("eval", self._vote_setting(vote)):
                row["other votes"][name] = read_json(self.folder("eval") / "scores.json")["vote"]["accuracy"]["value"]
        return row

    def run_probe(self) -> None:
        """Run all stages and, if they are done, print the accuracy by kind of puzzle."""
        if all(self.run_stage(stage) for stage in STAGES):
            print(f"vote: probe of {self.sets[len(SETTINGS) + 3 :]}: seconds {dict(self.seconds)}", flush=True)
            self.print_accuracies()

    def folder(self, stage: str) -> Path:
        """Return a stage's folder in the run."""
        return ROOTS.runs / self.name / stage

    def finished_row(self) -> dict[str, Any]:
        """Return the row of this seed's finished run, with no other votes yet."""
        scores = {name: one["accuracy"] for name, one in read_json(self.folder("eval") / "scores.json").items()}
        vote = read_json(self.folder("eval") / "vote.json")
        single = {name: scores[name]["value"] for name in self.voters}
        best = max(single, key=lambda name: single[name])
        (gain,) = vote["over_best"].values()
        train = read_json(self.folder("train") / "manifest.json")["counts"]
        return {
            "seed": self.seed,
            "options of a question, at most": self.most_options,
            "kinds of puzzles": sorted({row["id"].split("-")[1] for row in read_jsonl(self.data / "test.jsonl")}),
            "held-out problems": len(read_jsonl(self.data / "test.jsonl")),
            "questions": scores["vote"]["n"],
            "samples an adapter": [train[f"{name} samples"] for name in self.adapters],
            "base": scores["base"]["value"],
            "adapters": single,
            "sources of an adapter": {name: [one["source"] for one in self.adapters[name]] for name in single},
            "one adapter on all sources": scores[EVERYTHING]["value"],
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

    def print_accuracies(self) -> None:
        """Print the accuracy, in percent, of each model by kind of puzzle and number of options of a question."""
        test = read_jsonl(self.folder("preprocess") / "samples" / "test.jsonl")
        kinds = {sample["id"]: f"{sample['id'].split('-')[1]}, {sample['meta']['kind']}" for sample in test}
        right = {sample["id"]: sample["references"][0] for sample in test}
        for path in sorted((self.folder("infer") / "predictions").glob("*.jsonl")):
            hits = defaultdict(list)
            for record in read_jsonl(path):
                hits[kinds[record["id"]]].append(record["answer"] == right[record["id"]])
            print(path.stem, {kind: round(100 * fmean(each), 1) for kind, each in sorted(hits.items())}, flush=True)


def main() -> None:
    """Run all seeds, and write a row for each finished seed and a summary of them. `--probe` only prints accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Seeds to run. Default: 0 to 4.")
    parser.add_argument("--adapters", type=int, default=ADAPTERS, help="Number of voting adapters. Default: 9.")
    parser.add_argument("--shards", type=int, default=2, help="Processes that share a seed's adapters. Default: 2.")
    parser.add_argument(
        "--problems",
        type=int,
        nargs=3,
        metavar=("TRAIN", "TEST", "SOURCE"),
        help="Problems in train.jsonl, in test.jsonl, and in each file of sources/. Default: 300 400 1500.",
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), help="Kinds of puzzles. Default: chain clubs family."
    )
    parser.add_argument("--most-options", type=int, default=MOST_OPTIONS, help="Most options per question. Default: 7.")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="Seconds after which all seeds stop. Default: never."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Recipe override for all seeds; may be repeated.",
    )
    parser.add_argument(
        "--probe", nargs="+", metavar="SETTINGS", help="Settings to compare; this module's docstring says how."
    )
    chosen = parser.parse_args()
    problems = dict(zip(PROBLEMS, chosen.problems, strict=True)) if chosen.problems else PROBLEMS
    ROOTS.runs.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    sets = tuple(chosen.set)
    puzzles = (problems, chosen.kinds, chosen.most_options)
    if chosen.probe:
        alone = {kind: parts([kind], 0) for kind in chosen.kinds}
        made = [
            (chosen.seeds[0], alone, (*sets, *each.split(";")), f"vote-probe-{number}")
            for number, each in enumerate(chosen.probe)
        ]
    else:
        made = [(seed, make_mixes(seed, chosen.adapters, chosen.kinds), sets, f"vote-{seed}") for seed in chosen.seeds]
    cards = max(torch.cuda.device_count(), 1)
    seeds = [
        Seed(seed, *puzzles, adapters, chosen.shards, own, name, place % cards)
        for place, (seed, adapters, own, name) in enumerate(made)
    ]
    timer = threading.Timer(min(chosen.seconds, 86_400), lambda: [seed.stop() for seed in seeds])
    timer.start()
    with ThreadPoolExecutor(len(seeds)) as pool:
        found = list(pool.map(Seed.run_probe if chosen.probe else Seed.run_stages, seeds))
    timer.cancel()
    rows = [row for row in found if row is not None]
    if rows:
        no_worse = sum(row["vote no worse than the best single adapter"] for row in rows)
        summary = {"seeds": len(rows), "vote no worse than the best single adapter": no_worse}
        write_rows("vote", [*rows, summary], "python -m benchmarks.vote")
    if not chosen.probe:
        cure = "; run the same command again to resume the others" if len(rows) < len(seeds) else ""
        print(f"vote: {len(rows)} of {len(seeds)} seeds are done{cure}", flush=True)


if __name__ == "__main__":
    main()
