"""A kubectl that talks to no cluster but to a folder: what `test_run_script.py` puts first on the PATH.

`kustomize` is the real one's. The folder ($FAKE_CLUSTER) has
  calls          every command line, in order
  jobs/<name>    a Job that exists: the conditions that it shows, one look after the other; the last one stays
  after/<name>   the same, for a Job that is yet to be made
  pods/<name>    "pod exit-code" lines of a Job
  failed-indexes the failed indexes of an Indexed Job
  refuse/<verb>  what the server says to that verb instead of doing it
"""

import os
import subprocess
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
        case "pvc":
            return "" if (CLUSTER / "claims").exists() else sys.exit("Error from server (NotFound)")
        case "pods":
            path = CLUSTER / "pods" / option(arguments, "--selector").partition("=")[2]
            pods = path.read_text() if path.is_file() else ""
            return pods if "exitCode" in output else "Running \n"
        case "job" if output == "name":
            return f"job.batch/{arguments[2]}\n" if (CLUSTER / "jobs" / arguments[2]).is_file() else ""
        case "job" if "failedIndexes" in output:
            path = CLUSTER / "failed-indexes"
            return path.read_text() if path.is_file() else ""
        case "job" if ".message" in output:
            return "PodFailurePolicy: Container lorry failed with exit code"
        case "job":
            return look(arguments[2])
        case other:
            sys.exit(f"the fake has no {other}")


def apply(arguments: list[str]) -> str:
    """Makes the Jobs that the selector takes, as a server would: one that exists cannot be changed."""
    import yaml  # a tenth of a second, which only this verb needs

    key, _, value = option(arguments, "--selector").partition("=")
    said = ""
    for document in yaml.safe_load_all(sys.stdin):
        name, kind = document["metadata"]["name"], document["kind"]
        if document["metadata"]["labels"].get(key) != value:
            continue
        if kind == "Job":
            path = CLUSTER / "jobs" / name
            if path.exists():
                sys.exit(f'The Job "{name}" is invalid: spec.template: field is immutable')
            if document["spec"]["suspend"]:
                sys.exit(f"{name} was made suspended, and would never start")
            script = CLUSTER / "after" / name
            path.write_text(script.read_text() if script.is_file() else "\nComplete ")
        said += f"{kind.lower()}/{name} created\n"
    return said


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--namespace=")]
    with (CLUSTER / "calls").open("a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    verb = arguments[0]
    refusal = CLUSTER / "refuse" / verb
    if refusal.is_file():
        sys.exit(refusal.read_text())
    match verb:
        case "version":
            said = "Client Version: v1.32.4\n"
        case "kustomize":
            sys.exit(subprocess.run([os.environ["REAL_KUBECTL"], *arguments], check=False).returncode)
        case "get":
            said = get(arguments)
        case "apply":
            said = apply(arguments)
        case "delete":
            (CLUSTER / "jobs" / arguments[2]).unlink()
            said = f"job.batch/{arguments[2]} deleted\n"
        case "logs":
            said = "error: data/questions.jsonl: no line can be used\n"
        case _:
            sys.exit(f"the fake has no {verb}")
    sys.stdout.write(said)


main()
