"""What `lorry launch --on kubernetes` renders: the Jobs of the overlays and the single files, for any run."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.recipe import load_recipe
from stages.hardware.targets import load_targets
from stages.host.kubernetes.jobs import (
    FINGERPRINT,
    INSTANCE,
    job_name,
    overlay_gpus,
    recipe_map,
    render_job,
    run_label,
    to_yaml,
)
from stages.host.kubernetes.launching import cluster_run
from stages.host.kubernetes.manifests import merge
from stages.host.kubernetes.needs import PodNeeds, pod_needs
from stages.host.kubernetes.settings import Settings, load_settings
from tests.k8s.checks import DNS_LABEL, GPU, LABEL_VALUE, STAGES, problems, quantity, schema_problems
from tests.k8s.manifests import K8S, REPOSITORY, Document, built_overlay, jobs, overlay_names, read
from tests.k8s.test_manifests import CLAIMS, NEWEST, OLDEST, VERSION

Run = Any


@pytest.fixture
def roots(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models of patent-qa are here, its data are not."""
    monkeypatch.setenv("LORRY_MODELS", str(models))
    monkeypatch.setenv("LORRY_DATA", str(models / "no-data"))
    monkeypatch.setenv("LORRY_RUNS", str(models / "no-runs"))
    monkeypatch.delenv("REGISTRY", raising=False)
    return models


def run_of(name: str | None = None, profile: str | None = None, data: str | None = None, *overrides: str) -> Run:
    return cluster_run(
        {"recipe": "patent-qa", "profile": profile, "data": data, "overrides": overrides, "run_name": name}
    )


def render(run: Run, target: str, gpus: str | None = None, settings: Settings | None = None) -> dict[str, Document]:
    """The Jobs of a run, by stage."""
    card = load_targets()[target]
    needs = pod_needs(run, card, STAGES, gpus, overlay_gpus(STAGES, card))
    return {
        stage: render_job(run, stage, card, needs, settings or Settings(), VERSION, "", None, False) for stage in STAGES
    }


def container_of(job: Document) -> Document:
    found: Document = job["spec"]["template"]["spec"]["containers"][0]
    return found


def values_of(job: Document) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container_of(job)["env"]}


def profile_of(target: str) -> str | None:
    """The profile of patent-qa that an overlay sets."""
    (train,) = (job for job in jobs(built_overlay(target)) if job["metadata"]["name"] == "lorry-train")
    return values_of(train).get("LORRY_PROFILE") or None


def plain(job: Document) -> Document:
    """A Job without its name, and without how it gets its recipe; lists of named things are mappings."""
    job = copy.deepcopy(job)
    job["metadata"].pop("annotations", None)
    assert job["metadata"].pop("name")
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        metadata["labels"].pop("app.kubernetes.io/managed-by", None)
    job["spec"].pop("suspend", None)
    pod, container = job["spec"]["template"]["spec"], container_of(job)
    environment = values_of(job)
    for name in ("LORRY_RECIPE", "LORRY_PROFILE"):
        environment.pop(name)
    container["env"] = environment
    container["volumeMounts"] = {m["mountPath"]: m for m in container["volumeMounts"] if m["mountPath"] != "/recipe"}
    pod["volumes"] = {volume["name"]: volume for volume in pod["volumes"] if volume["name"] != "recipe"}
    return job


@pytest.mark.parametrize("target", overlay_names())
def test_the_jobs_are_those_of_the_overlay(target: str, roots: Path) -> None:
    """With the number of GPUs for training that the overlay has; all else is as planned."""
    static = {job["metadata"]["name"].removeprefix("lorry-"): job for job in jobs(built_overlay(target))}
    count = container_of(static["train"])["resources"]["limits"].get(GPU)
    rendered = render(run_of(profile=profile_of(target)), target, f"auto:{count}" if count else None)
    assert {stage: plain(job) for stage, job in rendered.items()} == {stage: plain(static[stage]) for stage in rendered}


@pytest.mark.parametrize("stage", STAGES)
def test_the_jobs_are_those_of_the_single_files(stage: str, roots: Path) -> None:
    (static,) = read((K8S / f"{stage}-job.yaml").read_text())
    assert plain(render(run_of(), "a800", "auto:1")[stage]) == plain(static)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *((target, "专利-7") for target in [*overlay_names(), "v100-gptq"]),
        ("a800", "x" * 90),
        ("a800", "9"),
        ("a800", "-"),
    ],
)
def test_a_server_takes_them_whatever_the_run_is_called(target: str, name: str, roots: Path) -> None:
    run = run_of(name, profile_of(target.partition("-")[0]))
    for stage, job in render(run, target).items():
        assert problems(job, CLAIMS, VERSION) == []
        assert schema_problems(job, OLDEST) == []
        assert job["metadata"]["name"] == job_name(name, stage)
        label = job["spec"]["template"]["metadata"]["labels"][INSTANCE]
        assert values_of(job)["LORRY_RUN"] == (
            {"fieldRef": {"fieldPath": f"metadata.labels['{INSTANCE}']"}} if label == name else name
        )


def test_no_two_runs_share_a_name() -> None:
    names = [
        "a",
        "A",
        "a.",
        "a_",
        "ä",
        "a-b",
        "a_b",
        "a.b",
        "专利",
        "专 利",
        "",
        "x" * 90,
        "x" * 91,
        "a-train",
        "train",
    ]
    labels = [run_label(name) for name in names]
    assert len({*labels}) == len(names)
    assert all(DNS_LABEL.fullmatch(label) and LABEL_VALUE.fullmatch(label) for label in labels)
    jobs_of_all = [job_name(name, stage) for name in names for stage in STAGES]
    assert len({*jobs_of_all}) == len(jobs_of_all) and all(map(DNS_LABEL.fullmatch, jobs_of_all))


def test_the_recipe_goes_with_it_resolved(roots: Path, tmp_path: Path) -> None:
    run = run_of("专利", "text", "documents/专利", "train.epochs=3")
    document = recipe_map(run, "lab")
    assert schema_problems(document, NEWEST) == []
    assert document["metadata"]["namespace"] == "lab"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_load(to_yaml([document]))["data"]["recipe.yaml"])
    read_there = load_recipe(path)
    assert read_there == run.recipe
    assert (read_there.profile, read_there.train.epochs) == ("text", 3)
    assert read_there.data.path == "/data/documents/专利"
    job = render(run, "a800")["train"]
    (volume,) = [one for one in job["spec"]["template"]["spec"]["volumes"] if one["name"] == "recipe"]
    assert volume["configMap"]["name"] == document["metadata"]["name"]
    assert values_of(job)["LORRY_RECIPE"] == "/recipe/recipe.yaml"
    assert values_of(job)["LORRY_PROFILE"] == values_of(job)["LORRY_SET"] == ""


@pytest.mark.parametrize(
    ("target", "profile", "gpus", "expected"),
    [
        ("a800", None, None, {"preprocess": 1, "train": 1, "infer": 1}),
        ("a800", None, "auto:4", {"preprocess": 1, "train": 4, "infer": 1}),
        ("rtx4090", "text", "auto", {"train": 1, "infer": 1}),
        ("cpu", "tiny", None, {}),
    ],
)
def test_gpus_by_the_plan(
    target: str, profile: str | None, gpus: str | None, expected: dict[str, int], roots: Path
) -> None:
    rendered = render(run_of(profile=profile), target, gpus)
    asked = {stage: container_of(job)["resources"]["limits"].get(GPU) for stage, job in rendered.items()}
    assert {stage: count for stage, count in asked.items() if count} == expected


def test_cores_and_memory_grow_with_the_gpus(roots: Path) -> None:
    resources = {n: container_of(render(run_of(), "a800", f"auto:{n}")["train"])["resources"] for n in (1, 8)}
    for kind in ("requests", "limits"):
        assert quantity(resources[8][kind]["memory"]) == 8 * quantity(resources[1][kind]["memory"])
    assert quantity(resources[8]["requests"]["cpu"]) > quantity(resources[1]["requests"]["cpu"])


def test_a_count_for_preprocess_alone_is_its_own(roots: Path) -> None:
    needs = pod_needs(run_of(), load_targets()["a800"], ("preprocess",), "auto:4", {})
    assert needs.gpus == {"preprocess": 4}


def test_without_the_model_here_nothing_is_planned_and_a_line_says_so(
    roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_MODELS", str(tmp_path))
    card = load_targets()["a800"]
    needs = pod_needs(run_of(), card, STAGES, None, overlay_gpus(STAGES, card))
    assert needs.gpus == {"preprocess": 1, "train": 4, "infer": 1}
    (note,) = needs.notes
    assert note.startswith("nothing is planned (") and "no such model folder" in note


@pytest.mark.parametrize(
    ("target", "gpus", "error", "text"),
    [
        ("v100", None, DoesNotFitError, "preprocess: its largest model takes "),
        (
            "a800",
            "0,2",
            UsageError,
            "GPUS=0,2: names GPUs of a machine, but Kubernetes gives out numbers of them; write",
        ),
        ("a800", "auto:17", UsageError, "GPUS=auto:17: train can use 16 GPUs at most (train.effective_batch)"),
        ("cpu", "auto:2", UsageError, "GPUS=auto:2: target cpu has no GPUs"),
    ],
)
def test_what_cannot_be_asked_for(target: str, gpus: str | None, error: type, text: str, roots: Path) -> None:
    with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
        render(run_of(), target, gpus)


def test_a_training_that_fits_on_no_number_of_gpus(roots: Path) -> None:
    run = run_of(None, None, None, "train.sharding=none")
    with pytest.raises(
        DoesNotFitError, match=r"train: Qwen2.5-VL-32B-Instruct does not fit on 8 x rtx4090; `lorry plan`"
    ):
        pod_needs(run, load_targets()["rtx4090"], ("train",), None, {})


SETTINGS = """
pull_secrets: [regcred]
service_account: tuner
priority_class: batch
queue: team
node_selector: {pool: big}
tolerations: [{key: team, operator: Exists, effect: NoSchedule}]
environment: {HTTPS_PROXY: "http://proxy:3128"}
claims: {data: team-data}
resources: {train: {cpu: "32", memory: 300Gi}}
pod: {runtimeClassName: nvidia, affinity: null}
"""


def test_settings_of_the_cluster_reach_every_pod(roots: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(SETTINGS)
    rendered = render(run_of(), "a800", None, load_settings(str(path)))
    for stage, job in rendered.items():
        pod = job["spec"]["template"]["spec"]
        assert schema_problems(job, NEWEST) == []
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
        assert pod["imagePullSecrets"] == [{"name": "regcred"}]
        assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("tuner", "batch")
        assert pod["nodeSelector"] == {"pool": "big"}
        assert [one["key"] for one in pod["tolerations"]] == [GPU, "team"]
        assert pod["runtimeClassName"] == "nvidia" and "affinity" not in pod
        assert values_of(job)["HTTPS_PROXY"] == "http://proxy:3128"
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if len(v) == 2 and "persistentVolumeClaim" in v
        }
        assert claims == {"data": "team-data", "models": "lorry-models", "runs": "lorry-runs", "caches": "lorry-caches"}
        resources = container_of(job)["resources"]
        assert (
            (resources["limits"]["memory"] == "300Gi") == (resources["requests"]["cpu"] == "32") == (stage == "train")
        )


def test_a_quota_on_limits_cpu_and_a_cluster_that_chooses_the_uid(roots: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text('limit_cpu: true\narbitrary_uid: true\nresources: {train: {cpu: "32"}}\n')
    for stage, job in render(run_of(), "a800", None, load_settings(str(path))).items():
        resources = container_of(job)["resources"]
        assert resources["limits"]["cpu"] == resources["requests"]["cpu"]
        assert stage != "train" or resources["limits"]["cpu"] == "32"
        security = job["spec"]["template"]["spec"]["securityContext"]
        assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert schema_problems(job, NEWEST) == []


def test_the_docs_show_every_setting(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "kubernetes.md").read_text(), flags=re.S)
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    shown = load_settings(str(path)).model_dump()
    assert all(value != shown[key] for key, value in Settings().model_dump().items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("claim: {}", "unknown key 'claim'; known keys: pull_secrets, service_account"),
        ("claims: {datas: x}", "unknown key 'claims.datas'"),
        ("pod: {containers: [{env: [{name: A, value: b}]}]}", "pod: an element of containers has no name; add it"),
        ("pod: {containers: [{name: stage, env: [{value: b}]}]}", "pod: an element of env has no name; add it"),
        ("pull_secrets: regcred", "pull_secrets: found 'regcred'; it must be a valid list"),
        ("resources: {tran: {cpu: '1'}}", "resources.tran: no such stage; use preprocess, train, infer, eval"),
        ("[a]", "found a list"),
        ("a: b: c", "not YAML"),
    ],
)
def test_settings_that_are_wrong(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        load_settings(str(path))
    assert str(raised.value).startswith(f"{path}: ") and expected in str(raised.value)
    with pytest.raises(UsageError, match="cannot read the settings"):
        load_settings(str(tmp_path / "none.yaml"))


def test_whatever_changes_the_work_changes_the_fingerprint(roots: Path) -> None:
    def of(run: Run, needs: PodNeeds, registry: str = "") -> str:
        job = render_job(run, "train", load_targets()["a800"], needs, Settings(), VERSION, registry, None, False)
        return str(job["metadata"]["annotations"][FINGERPRINT])

    one = PodNeeds({"train": 1})
    same = of(run_of("r"), one)
    assert of(run_of("r"), one) == same
    others = [
        of(run_of("r", None, None, "seed=7"), one),
        of(run_of("r"), PodNeeds({"train": 2})),
        of(run_of("r"), one, "h"),
    ]
    assert len({same, *others}) == 4


def test_merging_is_kustomizes() -> None:
    base = {"a": 1, "gone": {"b": 2}, "env": [{"name": "X", "value": "1"}], "tolerations": [1, 2]}
    patch = {"gone": None, "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": None}], "tolerations": [3]}
    before = copy.deepcopy((base, patch))
    assert merge(base, patch) == {"a": 1, "env": [{"name": "X"}, {"name": "Y", "value": "2"}], "tolerations": [3]}
    assert (base, patch) == before


@pytest.mark.parametrize("data", ["/home/me/docs", "../docs", "/data/../etc"])
def test_data_of_this_machine(data: str) -> None:
    with pytest.raises(UsageError, match="not on the cluster; copy it to the claim of the data"):
        run_of(data=data)
