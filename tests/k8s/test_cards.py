"""What the pods need of cards: the nodes that they land on, what they are given, and that it fits by the plan."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from stages.contract.run import Run
from stages.hardware.targets import Target, load_targets
from stages.host.needs import CLASSIFIER, preprocess_models
from stages.host.planning import plan
from stages.host.runs import open_run
from stages.models.embedder import weights_bytes
from stages.models.shape import planned_shape
from tests.k8s.checks import GPU, STAGES, quantity
from tests.k8s.manifests import K8S, Document, built_overlay, jobs, manifest_files, overlay_names, read
from tests.k8s.nodes import NODES, preference, takes

OWN_RECIPE = "/data/nine-adapters.yaml"
"""The recipe of adapters-indexed.yaml, which its user writes; here patent-qa with nine adapters stands for it."""
NINE = f"train.adapters=[{', '.join(f'{{name: a{n}}}' for n in range(9))}]"


def all_jobs() -> list[tuple[str, str]]:
    """Source and name of each Job of the overlays, the single files and scale-out. Overlays are not built yet."""
    found = [(f"overlays/{overlay}", f"lorry-{stage}") for overlay in overlay_names() for stage in STAGES]
    for path in manifest_files():
        found += [(str(path.relative_to(K8S)), job["metadata"]["name"]) for job in jobs(read(path.read_text()))]
    return found


@pytest.fixture(params=all_jobs(), ids=": ".join)
def job(request: pytest.FixtureRequest) -> Document:
    source, name = request.param
    kind, _, overlay = source.partition("/")
    documents = built_overlay(overlay) if kind == "overlays" else read((K8S / source).read_text())
    (found,) = [job for job in jobs(documents) if job["metadata"]["name"] == name]
    return found


def pod_of(job: Document) -> Document:
    found: Document = job["spec"]["template"]["spec"]
    return found


def stage_of(job: Document) -> str:
    return str(job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"])


def target_of(pod: Document) -> Target:
    return load_targets()[pod["containers"][0]["image"].rpartition(":")[2].partition("-")[2]]


def gpus_of(job: Document) -> int:
    return int(pod_of(job)["containers"][0]["resources"]["limits"].get(GPU, 0))


def run_of(job: Document, models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that a Job's variables name."""
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, str(models))
    given = {one["name"]: one.get("value", "") for one in pod_of(job)["containers"][0]["env"]}
    recipe, overrides = given["LORRY_RECIPE"], tuple(given["LORRY_SET"].split())
    if recipe == OWN_RECIPE:
        recipe, overrides = "patent-qa", (NINE, *overrides)
    return open_run(recipe, given["LORRY_PROFILE"] or None, None, overrides, "r")


def planned(lines: Generator[Any, None, int]) -> list[str]:
    return "\n".join(str(line) for line in lines).splitlines()


def test_pods_land_on_their_targets_cards_and_on_no_others(job: Document) -> None:
    pod = pod_of(job)
    target = target_of(pod)
    landed = {node.product for node in NODES if takes(node, pod)}
    everywhere = {node.product for node in NODES}
    if target.capability is None:
        assert landed == {""}, "a pod for CPUs tolerates no GPU node"
    elif gpus_of(job) or stage_of(job) == "preprocess":  # the first that mounts the volumes stays with the others
        assert landed == {node.product for node in NODES if node.is_for(target)}
        assert target.node_label is None or target.node_label in landed
    else:
        assert landed == everywhere, "it follows the volumes"


@pytest.mark.parametrize(
    ("name", "lands", "does_not"),
    [
        ("v100", ["Tesla-V100S-PCIE-32GB"], ["Tesla-V100-SXM2-16GB", "Tesla-T4"]),
        (
            "a800",
            ["NVIDIA-A100-80GB-PCIe", "NVIDIA-A800-80GB-PCIe", "NVIDIA-A100-SXM4-80GB-SHARED"],
            ["NVIDIA-A100-SXM4-80GB-MIG-7g.80gb", "NVIDIA-A100-SXM4-40GB", "Tesla-V100-SXM2-32GB"],
        ),
        ("rtx4090", ["NVIDIA-L40S"], ["NVIDIA-L4", "NVIDIA-A40"]),
        ("h100", ["NVIDIA-H100-PCIe", "NVIDIA-H200"], ["NVIDIA-A800-SXM4-80GB", "NVIDIA-GeForce-RTX-4090"]),
    ],
)
def test_products_by_name(name: str, lands: list[str], does_not: list[str]) -> None:
    (job,) = [job for job in jobs(built_overlay(name)) if stage_of(job) == "train"]
    landed = {node.product for node in NODES if takes(node, pod_of(job))}
    assert {*lands} <= landed and not {*does_not} & landed


@pytest.mark.parametrize("name", overlay_names())
def test_stages_can_follow_volumes_that_the_first_pod_has_bound(name: str) -> None:
    """With WaitForFirstConsumer the first pod's node decides where the volumes are: all later ones can go there."""
    pods = {stage_of(job): pod_of(job) for job in jobs(built_overlay(name))}
    homes = [node for node in NODES if takes(node, pods["preprocess"])]
    assert homes
    for node in homes:
        assert all(takes(node, pod) for pod in pods.values()), node


@pytest.mark.parametrize("name", overlay_names())
def test_the_server_lands_where_its_run_was_trained(name: str) -> None:
    (server,) = [document for document in built_overlay(name) if document["kind"] == "Deployment"]
    (train,) = [job for job in jobs(built_overlay(name)) if stage_of(job) == "train"]
    assert [takes(node, pod_of(server)) for node in NODES] == [takes(node, pod_of(train)) for node in NODES]


def test_the_load_pod_prefers_a_home_of_the_jobs_and_can_run_anywhere() -> None:
    (pod,) = [document["spec"] for document in read((K8S / "load-pod.yaml").read_text())]
    assert all(takes(node, pod) for node in NODES), "a cluster without GPUs, or with those of another target"
    target = target_of(pod)
    best = max(preference(node, pod) for node in NODES)
    assert {node.product for node in NODES if preference(node, pod) == best} == {
        node.product for node in NODES if node.is_for(target)
    }
    assert all(bool(preference(node, pod)) == bool(node.product) for node in NODES)


def test_what_a_pod_asks_for_fits_by_the_plan(job: Document, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, target, gpus = stage_of(job), target_of(pod_of(job)), gpus_of(job)
    run = run_of(job, models, monkeypatch)
    is_merge = job["metadata"]["name"].endswith("-merge")
    if stage == "eval" or (is_merge and stage != "preprocess") or target.capability is None:
        assert gpus == 0
        return
    needed = preprocess_models(run)
    if stage == "preprocess":  # a merge only classifies
        assert bool(gpus) == (CLASSIFIER in needed if is_merge else bool(needed))
    machines = int(
        next((one["value"] for one in pod_of(job)["containers"][0]["env"] if one["name"] == "LORRY_NODES"), 1)
    )
    lines = planned(plan(run, target.name, max(gpus, 1) * machines, None))
    fits = {
        "preprocess": "preprocess fits: " if gpus else "preprocess needs no GPU",
        "train": "fits",
        "infer": "inference fits: ",
    }
    assert any(line.startswith(fits[stage]) for line in lines), lines
    assert stage != "train" or not any(line.startswith("does not fit") for line in lines), lines


@pytest.mark.parametrize("job", [one for one in all_jobs() if "preprocess" in one[1]], indirect=True, ids=": ".join)
def test_preprocess_has_memory_for_the_weights_that_pass_through_it(
    job: Document, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads them into memory, and then moves them to the GPU. Shards do not classify."""
    run = run_of(job, models, monkeypatch)
    names = {key: name for key, name in preprocess_models(run).items() if gpus_of(job)}
    if job["spec"].get("completionMode") == "Indexed":
        names.pop(CLASSIFIER, None)
    sizes = [planned_shape(models / name)[0].served_bytes for name in names.values()]
    sizes += [weights_bytes(models / "all-MiniLM-L6-v2")]
    resources = pod_of(job)["containers"][0]["resources"]
    assert max(sizes) + 2**30 < quantity(resources["requests"]["memory"])
