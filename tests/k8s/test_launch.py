"""`lorry launch --on kubernetes` against a stand-in for a cluster's API (api_server.py)."""

import copy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from entrypoints.launch import launch
from stages.host.kubernetes import launching, watch
from tests.k8s.api_server import ACTIVE, COMPLETE, Api, Server, all_claims, container_of, failed
from tests.k8s.checks import STAGES
from tests.k8s.manifests import K8S, read
from tests.k8s.test_manifests import VERSION

JOBS = [f"lorry-mine-{stage}" for stage in STAGES]


class Launcher:
    """Launches patent-qa with the profile tiny on CPUs, as the run `mine`, on the cluster."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def __call__(self, *more: str, stage: str = "eval", run: str = "mine", target: str = "cpu") -> SimpleNamespace:
        arguments = [
            stage,
            "patent-qa",
            "--profile",
            "tiny",
            "--on",
            "kubernetes",
            "--run",
            run,
            "--target",
            target,
            *more,
        ]
        done = CliRunner().invoke(launch, arguments, catch_exceptions=False)
        return SimpleNamespace(code=done.exit_code, output=done.output, error=done.stderr, printed=done.stdout)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Iterator[Api]:
    """A cluster with the claims, whose Jobs complete; its configuration is the current one."""
    api = Api(VERSION, claims=all_claims())
    with Server(api) as server:
        for name in ("NAMESPACE", "REGISTRY", "GPUS", "TARGET", "LORRY_SHARD", "LORRY_SET", "LORRY_VERSION"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "config", "lab")))
        monkeypatch.setenv("LORRY_MODELS", str(models))
        monkeypatch.setattr(watch, "POLL", 0.0)
        yield api


@pytest.fixture
def launched(api: Api) -> Launcher:
    return Launcher(api)


def test_four_stages_in_order(api: Api, launched: Launcher) -> None:
    done = launched()
    assert done.code == 0, done.output
    assert api.calls == [
        "PATCH configmaps/lorry-mine-recipe in lab",
        *(f"PATCH jobs/{name} in lab" for name in JOBS),
    ]
    assert done.printed == "results: /runs/mine on the claim lorry-runs; copy it through `lorry launch load`\n"
    assert "profile: tiny" in api.maps["lorry-mine-recipe"]["data"]["recipe.yaml"]
    assert [container_of(api.jobs[name])["image"] for name in JOBS] == [
        f"lorry-{stage}:{VERSION}-cpu" for stage in STAGES
    ]


def test_only_the_stages_that_are_needed(api: Api, launched: Launcher) -> None:
    assert launched(stage="train").code == 0
    assert list(api.jobs) == JOBS[:2]


def test_namespace_registry_and_force(api: Api, launched: Launcher) -> None:
    assert launched("--namespace", "other", "--registry", "registry.example/team", "--force", stage="train").code == 0
    assert api.calls and all(call.endswith(" in other") for call in api.calls)
    containers = [container_of(api.jobs[name]) for name in JOBS[:2]]
    assert [one["image"].partition(":")[0] for one in containers] == [
        f"registry.example/team/lorry-{stage}" for stage in STAGES[:2]
    ]
    assert [one.get("args") for one in containers] == [None, ["--force"]]


def test_a_dry_run_prints_what_would_be_applied_and_asks_no_cluster(
    api: Api, launched: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched().code == 0
    applied = [api.maps["lorry-mine-recipe"], *(api.jobs[name] for name in JOBS)]
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    done = launched("--dry-run")
    assert done.code == 0, done.output
    printed = list(yaml.safe_load_all(done.printed))
    for document in applied:
        document.pop("status", None)
        for key in ("namespace", "creationTimestamp", "uid", "resourceVersion"):
            document["metadata"].pop(key)
    assert printed == applied


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_a_failure_ends_it_with_the_stages_code(api: Api, launched: Launcher, code: int) -> None:
    api.scripts[JOBS[1]] = [ACTIVE, failed()]
    api.add_pod(JOBS[1], code=75)
    api.add_pod(JOBS[1], code=code)
    done = launched()
    assert done.code == code
    assert list(api.jobs) == JOBS[:2], "no stage after it is started"


def test_two_runs_in_one_namespace(api: Api, launched: Launcher) -> None:
    """Neither touches the other's Jobs, ConfigMap or folder."""
    assert launched().code == 0
    kept = copy.deepcopy((api.jobs, api.maps))
    api.calls.clear()
    assert launched("--set", "seed=7", "--data", "other", run="Mine").code == 0
    assert len(api.jobs) == 8 and len(api.maps) == 2
    assert not any(f"{name} in" in call for call in api.calls for name in (*JOBS, "lorry-mine-recipe"))
    assert (kept[0], kept[1]) == (
        {name: job for name, job in api.jobs.items() if name in kept[0]},
        {name: found for name, found in api.maps.items() if name in kept[1]},
    )
    folders = set()
    for job in api.jobs.values():
        values = {one["name"]: one.get("value") for one in container_of(job)["env"]}
        folders.add(values["LORRY_RUN"] or job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/instance"])
    assert folders == {"mine", "Mine"}


@pytest.mark.parametrize("ended", [COMPLETE, failed(), {"conditions": [{"type": "Suspended", "status": "True"}]}])
def test_earlier_jobs_of_the_run_give_way(api: Api, launched: Launcher, ended: dict[str, object]) -> None:
    """Ended, or suspended by somebody: a Job's template cannot be changed."""
    assert launched().code == 0
    for name in JOBS:
        api.scripts[name] = [ended]
        api.jobs[name]["spec"]["suspend"] = "conditions" in ended and "Suspended" in str(ended)
    api.calls.clear()
    assert launched("--set", "seed=7").code == 0
    assert [call for call in api.calls if "jobs" in call] == [
        f"{verb} jobs/{name} in lab" for name in JOBS for verb in ("DELETE", "PATCH")
    ]


def start_and_leave(api: Api, launched: Launcher, number: int) -> None:
    """A launch that was left while the Job of that number was under way."""
    assert launched().code == 0
    for name in JOBS[number + 1 :]:
        del api.jobs[name], api.scripts[name]
    api.scripts[JOBS[number]] = [ACTIVE, ACTIVE, ACTIVE, COMPLETE]
    api.calls.clear()


def test_a_second_launch_goes_on_with_the_job_that_is_under_way(api: Api, launched: Launcher) -> None:
    start_and_leave(api, launched, 1)
    done = launched()
    assert done.code == 0, done.output
    assert "train: job/lorry-mine-train is under way; goes on with it" in done.error
    assert [call for call in api.calls if "jobs" in call] == [f"PATCH jobs/{name} in lab" for name in JOBS[2:]]


def test_a_job_that_runs_with_other_settings_is_left_alone(api: Api, launched: Launcher) -> None:
    start_and_leave(api, launched, 1)
    api.add_pod(JOBS[1])
    done = launched("--set", "seed=7")
    assert done.code == 75
    assert (
        "error: job/lorry-mine-train: runs with other settings; wait until it ends, choose another --run" in done.error
    )
    assert api.calls == []


def test_a_job_whose_pod_never_started_is_replaced(api: Api, launched: Launcher) -> None:
    """After an image that could not be pulled, the second command has the REGISTRY."""
    start_and_leave(api, launched, 0)
    api.add_pod(JOBS[0], waiting="ImagePullBackOff")
    assert launched("--registry", "registry.example").code == 0
    assert api.calls[1:3] == [f"DELETE jobs/{JOBS[0]} in lab", f"PATCH jobs/{JOBS[0]} in lab"]
    assert container_of(api.jobs[JOBS[0]])["image"].startswith("registry.example/")


def test_the_same_command_replaces_a_job_whose_image_could_not_be_pulled(api: Api, launched: Launcher) -> None:
    """It has been pushed since; the pod itself would try again minutes later."""
    start_and_leave(api, launched, 0)
    api.add_pod(JOBS[0], waiting="ImagePullBackOff")
    assert launched().code == 0
    assert api.calls[1:3] == [f"DELETE jobs/{JOBS[0]} in lab", f"PATCH jobs/{JOBS[0]} in lab"]


def test_an_earlier_stage_waits_while_a_later_one_is_under_way(api: Api, launched: Launcher) -> None:
    """That one reads the samples which the earlier stage writes, and the same ConfigMap."""
    start_and_leave(api, launched, 1)
    for more in ((), ("--set", "seed=7")):
        done = launched(*more, stage="preprocess")
        assert done.code == 75
        assert "error: job/lorry-mine-train: a later stage of this run is under way; wait until it ends" in done.error
        assert api.calls == []


def test_a_job_that_another_launch_started_meanwhile_is_left_alone(
    api: Api, launched: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_and_leave(api, launched, 1)
    api.add_pod(JOBS[1])
    monkeypatch.setattr("stages.host.kubernetes.launching._first_to_start", lambda *_: 1)  # that look is hours old
    done = launched("--set", "seed=7", stage="train")
    assert (done.code, "runs with other settings" in done.error) == (75, True)
    assert not any("jobs" in call for call in api.calls)


def test_a_job_that_is_being_deleted_is_not_gone_on_with(api: Api, launched: Launcher) -> None:
    start_and_leave(api, launched, 0)
    api.jobs[JOBS[0]]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert launched().code == 0
    assert f"PATCH jobs/{JOBS[0]} in lab" in api.calls


def test_a_refusal_that_lasts_is_no_interruption(api: Api, launched: Launcher) -> None:
    api.refusals["PATCH", "configmaps"] = (404, 'namespaces "lab" not found')
    done = launched()
    assert (done.code, "not found); correct --namespace" in done.error) == (2, True)


def test_gpus_for_a_stage_that_needs_none_are_refused(api: Api, launched: Launcher) -> None:
    done = launched("--gpus", "auto:2", stage="preprocess", target="a800")
    assert done.code == 2 and "need no GPU; leave GPUS out" in done.error, done.output


def test_a_job_in_kueues_queue_keeps_its_place(api: Api, launched: Launcher, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text("queue: team\n")
    assert launched("--kubernetes", str(settings), stage="preprocess").code == 0
    api.scripts[JOBS[0]] = [{"conditions": [{"type": "Suspended", "status": "True"}]}] * 3 + [COMPLETE]
    api.jobs[JOBS[0]]["spec"]["suspend"] = True
    api.calls.clear()
    assert launched("--kubernetes", str(settings), stage="preprocess").code == 0
    assert api.calls == ["PATCH configmaps/lorry-mine-recipe in lab"]


def test_ctrl_c_leaves_the_job(api: Api, launched: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    api.scripts[JOBS[0]] = [ACTIVE]
    # the watch's own clock: threads of other tests in this process may sleep too
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(watch, "time", clock)
    done = launched()
    assert done.code == 75
    assert (
        "error: preprocess: job/lorry-mine-preprocess goes on in the cluster; run the same command again" in done.error
    )
    assert JOBS[0] in api.jobs


def test_missing_claims_are_named_and_never_created(api: Api, launched: Launcher) -> None:
    api.claims = ["lorry-runs", "lorry-caches"]
    done = launched()
    assert (done.code, api.calls) == (2, [])
    assert (
        "error: namespace lab: no volume claim lorry-data, lorry-models; create the claims with `kubectl" in done.error
    )


@pytest.mark.parametrize(
    ("verb", "kind", "refusal", "expected"),
    [
        (
            "GET",
            "persistentvolumeclaims",
            (403, "cannot list"),
            "claims in namespace lab: the cluster refused it (cannot",
        ),
        ("GET", "jobs", (401, "Unauthorized"), "the cluster refused it (Unauthorized); log in to the cluster again"),
        (
            "PATCH",
            "jobs",
            (403, "exceeded quota"),
            "job/lorry-mine-preprocess: the cluster refused it (exceeded quota)",
        ),
        ("PATCH", "configmaps", (422, "too long"), "(too long); correct that field in --kubernetes FILE or k8s/"),
        ("PATCH", "jobs", (500, ".spec.x: field not declared in schema"), "correct that field in --kubernetes FILE"),
        ("PATCH", "jobs", (503, "overloaded"), "(overloaded); run the same command again"),
    ],
)
def test_a_refusal_is_one_line(
    api: Api, launched: Launcher, verb: str, kind: str, refusal: tuple[int, str], expected: str
) -> None:
    api.refusals[verb, kind] = refusal
    done = launched()
    (line,) = [line for line in done.error.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert done.code == (75 if "run the same command again" in line else 2)


def test_a_misspelt_field_of_the_settings_is_refused_by_the_server(
    api: Api, launched: Launcher, tmp_path: Path
) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text("pod: {runtimeClas: nvidia}\n")
    done = launched("--kubernetes", str(settings))
    assert done.code == 2 and "runtimeClas" in done.error
    assert api.jobs == {}


def test_the_servers_warnings_are_printed(api: Api, launched: Launcher) -> None:
    api.warnings = ['would violate PodSecurity "restricted:latest"']
    assert "would violate PodSecurity" in launched(stage="preprocess").error


def load(*more: str, target: str = "a800") -> SimpleNamespace:
    done = CliRunner().invoke(launch, ["load", "--on", "kubernetes", "--target", target, *more], catch_exceptions=False)
    return SimpleNamespace(code=done.exit_code, error=done.stderr, printed=done.stdout)


def test_the_load_pod_is_that_of_its_file_and_is_started_once(api: Api) -> None:
    for _ in range(2):
        done = load()
        assert (done.code, api.calls) == (0, ["PATCH pods/lorry-load in lab"])
        assert done.printed == (
            "pod/lorry-load is ready: kubectl --namespace lab cp FOLDER lorry-load:/data/NAME, or /models/NAME\n"
        )
    (static,) = read((K8S / "load-pod.yaml").read_text())
    assert api.load_pod is not None and api.load_pod["spec"] == static["spec"]


def test_the_load_pod_of_another_target(api: Api, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text("pull_secrets: [regcred]\nclaims: {data: lorry-data}\n")
    more = ("--registry", "registry.example", "--kubernetes", str(settings), "--dry-run")
    (on_cpu,) = read(load(*more, target="cpu").printed)
    assert on_cpu["spec"]["containers"][0]["image"] == f"registry.example/lorry-eval:{VERSION}-cpu"
    assert not {"affinity", "tolerations"} & {*on_cpu["spec"]}
    (on_v100,) = read(load(*more, target="v100").printed)
    preferred, _ = on_v100["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert {"key": "nvidia.com/gpu.compute.major", "operator": "In", "values": ["7"]} in preferred["preference"][
        "matchExpressions"
    ]
    assert on_v100["spec"]["imagePullSecrets"] == [{"name": "regcred"}]
    assert api.calls == []


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]},
            "pod/lorry-load: 0/3 nodes are available; mend that, and delete it: kubectl --namespace lab delete pod",
        ),
        (
            {
                "containerStatuses": [
                    {
                        **{"name": "lorry", "image": "i", "imageID": "", "ready": False, "restartCount": 0},
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
                    }
                ]
            },
            "pod/lorry-load: no such image; mend that",
        ),
    ],
)
def test_a_load_pod_that_does_not_start(
    api: Api, monkeypatch: pytest.MonkeyPatch, status: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(launching, "LOAD_SECONDS", 0.0)
    api.load_status = status
    done = load()
    assert done.code == 2 and expected in done.error


@pytest.mark.parametrize(
    ("config", "expected"),
    [("/nowhere", "KUBECONFIG: no cluster to talk to ("), (None, "no cluster answers (")],
    ids=["no configuration", "no server"],
)
def test_no_cluster(
    launched: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None, expected: str
) -> None:
    with Server(Api(VERSION)) as gone:
        path = gone.write_kubeconfig(tmp_path / "gone")
    monkeypatch.setenv("KUBECONFIG", config or str(path))
    done = launched()
    (line,) = [line for line in done.error.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and expected in line


def test_without_the_client_a_dry_run_still_prints(launched: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert launched("--dry-run").code == 0
    done = launched()
    assert (done.code, done.error) == (
        2,
        "error: kubernetes: Python's client is not installed here; run `make setup`\n",
    )


def test_the_number_of_gpus_is_said(launched: Launcher) -> None:
    assert launched("--dry-run", target="a800", stage="infer").error == "GPUs (a800): train 1, infer 1\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--on", "kubernetes", "patent-qa"), "--target: not given; name the kind of card in the cluster, one of cpu"),
        (("--on", "kubernetes", "--target", "cpu"), "RECIPE: not given, and a cluster's runs are not here"),
        (("--on", "kubernetes", "patent-qa", "--shard", "0/2"), "--shard 0/2: not with --on kubernetes"),
        (("load",), "load: only with --on kubernetes; add that, or name a stage: preprocess, train"),
        (("patent-qa", "--dry-run"), "--dry-run: only with --on kubernetes"),
        (("patent-qa", "--namespace", "lab"), "--namespace: only with --on kubernetes"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], expected: str, api: Api) -> None:
    stage = () if arguments[0] == "load" else ("eval",)
    done = CliRunner().invoke(launch, [*stage, *arguments])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert expected in done.stderr
