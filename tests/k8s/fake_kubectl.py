"""A kubectl that talks to no cluster but to a folder: what `test_wait_script.py` puts first on the PATH.

The folder ($FAKE_CLUSTER) has
  calls          every command line, in order
  jobs/<name>    a Job: the conditions that it shows, one look after the other; the last one stays
  pods/<name>    "pod exit-code" lines of a Job
  state          phase and waiting reason of the newest pod; without it, it runs
  events         "object reason: message" lines of warnings
  failed-indexes the failed indexes of an Indexed Job
"""

import os
import sys
from pathlib import Path

CLUSTER = Path(os.environ["FAKE_CLUSTER"])


def option(arguments: list[str], name: str) -> str:
    """The value of --name value or --name=value; empty where it is not given."""
    for number, argument in enumerate(arguments):
        if argument == name:
            return arguments[number + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def content(name: str) -> str:
    """The content of a file of the folder; empty without it."""
    path = CLUSTER / name
    return path.read_text() if path.is_file() else ""


def look(name: str) -> str:
    """The conditions of a Job that exists, and on to what it shows at the next look."""
    path = CLUSTER / "jobs" / name
    if not path.is_file():
        sys.exit(f'Error from server (NotFound): jobs.batch "{name}" not found')
    now, *later = path.read_text().split("\n")
    if later:
        path.write_text("\n".join(later))
    if now == "unanswered":
        sys.exit("Unable to connect to the server: dial tcp: i/o timeout")
    if now == "deleted":
        path.unlink()
        return look(name)
    return now


def get(arguments: list[str]) -> str:
    output = option(arguments, "--output")
    match arguments[1]:
        case "pods":
            path = CLUSTER / "pods" / option(arguments, "--selector").partition("=")[2]
            pods = path.read_text() if path.is_file() else ""
            return pods if "exitCode" in output else content("state") or "Running \n"
        case "events":
            return content("events")
        case "job" if "failedIndexes" in output:
            return content("failed-indexes")
        case "job" if ".message" in output:
            return "PodFailurePolicy: Container lorry failed with exit code"
        case "job":
            return look(arguments[2])
        case other:
            sys.exit(f"the fake has no {other}")


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--namespace=")]
    with (CLUSTER / "calls").open("a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    verb = arguments[0]
    match verb:
        case "get":
            said = get(arguments)
        case "logs":
            said = "error: data/questions.jsonl: no line can be used\n"
        case _:
            sys.exit(f"the fake has no {verb}")
    sys.stdout.write(said)


main()
