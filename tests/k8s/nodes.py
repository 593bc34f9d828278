"""Nodes with the labels that NVIDIA's GPU feature discovery writes, and which pods a scheduler would put on them."""

from dataclasses import dataclass, field
from typing import Any

from stages.hardware.probe import Gpu
from stages.hardware.targets import Target, gpu_target, load_targets
from tests.k8s.manifests import Document

GPU = "nvidia.com/gpu"
TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Node:
    """A node with eight GPUs of one kind and the usual taint; without GPUs if it has no product."""

    product: str = ""
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    """Memory of a GPU in MiB, as the label has it."""
    more: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        if not self.product:
            return {"kubernetes.io/arch": "amd64"}
        return {
            "nvidia.com/gpu.product": self.product,
            "nvidia.com/gpu.compute.major": str(self.capability[0]),
            "nvidia.com/gpu.compute.minor": str(self.capability[1]),
            "nvidia.com/gpu.memory": str(self.memory),
            "nvidia.com/gpu.count": "8",
            "nvidia.com/gpu.replicas": "1",
            **self.more,
        }

    def is_for(self, target: Target) -> bool:
        """Whether Lorry would take these GPUs for the target's, and they have the memory that it plans with."""
        if not self.product or "nvidia.com/gpu.slices.gi" in self.more:
            return False
        gpu = Gpu(0, "", self.product, self.capability, self.memory << 20, self.memory << 20, "")
        found = gpu_target(gpu, load_targets())
        # cards that are sold with 80 GB have 79.6 to 80 GiB
        return found is not None and found.name == target.name and self.memory > (target.memory_gib or 0) * 1000


SHARED = {"nvidia.com/gpu.replicas": "4", "nvidia.com/gpu.sharing-strategy": "time-slicing"}
SLICE = {"nvidia.com/gpu.slices.gi": "7", "nvidia.com/gpu.slices.ci": "7", "nvidia.com/mig.strategy": "single"}

NODES = (
    Node(),
    Node("Tesla-V100-SXM2-32GB", (7, 0), 32768),
    Node("Tesla-V100S-PCIE-32GB", (7, 0), 32510),
    Node("Tesla-V100-SXM2-16GB", (7, 0), 16384),
    Node("Tesla-T4", (7, 5), 15360),
    Node("NVIDIA-A800-SXM4-80GB", (8, 0), 81920),
    Node("NVIDIA-A800-80GB-PCIe", (8, 0), 81920),
    Node("NVIDIA-A100-SXM4-80GB", (8, 0), 81920),
    Node("NVIDIA-A100-80GB-PCIe", (8, 0), 81920),
    Node("NVIDIA-A100-SXM4-80GB-SHARED", (8, 0), 81920, SHARED),
    Node("NVIDIA-A100-SXM4-80GB-MIG-7g.80gb", (8, 0), 81000, SLICE),
    Node("NVIDIA-A100-SXM4-40GB", (8, 0), 40960),
    Node("NVIDIA-A30", (8, 0), 24576),
    Node("NVIDIA-A10", (8, 6), 23028),
    Node("NVIDIA-A40", (8, 6), 46068),
    Node("NVIDIA-GeForce-RTX-4090", (8, 9), 24564),
    Node("NVIDIA-L4", (8, 9), 23034),
    Node("NVIDIA-L40S", (8, 9), 46068),
    Node("NVIDIA-H100-80GB-HBM3", (9, 0), 81559),
    Node("NVIDIA-H100-PCIe", (9, 0), 81559),
    Node("NVIDIA-H100-80GB-HBM3-MIG-7g.80gb", (9, 0), 81000, SLICE),
    Node("NVIDIA-H200", (9, 0), 143771),
    Node("NVIDIA-B200", (10, 0), 183359),
    Node("NVIDIA-GeForce-RTX-5090", (12, 0), 32607),
)


def takes(node: Node, pod: Document) -> bool:
    """Whether a scheduler may put a pod on a node: by labels, taint and GPUs, not by its other resources."""
    asked = int(pod["containers"][0]["resources"].get("limits", {}).get(GPU, 0))
    if node.product and not any(_tolerates(one) for one in pod.get("tolerations") or []):
        return False
    if asked > (8 if node.product else 0):
        return False
    if any(node.labels.get(key) != value for key, value in pod.get("nodeSelector", {}).items()):
        return False
    required = _node_affinity(pod).get("requiredDuringSchedulingIgnoredDuringExecution")
    return required is None or any(_matches(node, term) for term in required["nodeSelectorTerms"])


def preference(node: Node, pod: Document) -> int:
    """The sum of the weights with which a pod prefers a node."""
    preferred = _node_affinity(pod).get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return sum(one["weight"] for one in preferred if _matches(node, one["preference"]))


def _node_affinity(pod: Document) -> Document:
    found: Document = (pod.get("affinity") or {}).get("nodeAffinity", {})
    return found


def _tolerates(toleration: Document) -> bool:
    same_value = toleration.get("operator") == "Exists" or toleration.get("value") == TAINT["value"]
    return toleration.get("key") == TAINT["key"] and same_value and toleration.get("effect") in (None, TAINT["effect"])


def _matches(node: Node, term: Document) -> bool:
    """Whether a node has what all expressions of a term ask for, as k8s.io/component-helpers decides it."""
    return all(_holds(node.labels.get(one["key"]), one) for one in term["matchExpressions"])


def _holds(value: str | None, expression: dict[str, Any]) -> bool:
    values = expression.get("values", [])
    match expression["operator"]:
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
        case other:
            raise ValueError(other)
