# Every stage image for every target. `make images TARGET=a800 [STAGE=train]` calls this; by hand:
#
#   docker buildx bake -f images/docker-bake.hcl a800          the four images of a target
#   docker buildx bake -f images/docker-bake.hcl train-a800    one of them
#
# Images of one line of wheels share their layers: v100, a800 and rtx4090 differ in labels and environment only.

variable "VERSION" { default = "0.1.0" }    # as in pyproject.toml
variable "REVISION" { default = "" }        # git revision of the code
variable "LOCKS" { default = "" }           # sha256 over all lock files
variable "REGISTRY" { default = "" }        # prefix of the tags, such as registry.example/team
variable "BASE_IMAGE" { default = "debian:bookworm-slim" }

# Files that the builds read and that stay in no layer: pip's configuration (index, credentials) and a CA bundle.
variable "PIP_CONF" { default = "" }
variable "CA_CERT" { default = "" }
variable "HTTP_PROXY" { default = "" }
variable "HTTPS_PROXY" { default = "" }
variable "NO_PROXY" { default = "" }

# Kernels compiled for the target's architecture into the train image (images/train/Dockerfile): none, or compiled with
# CUDA_TOOLKIT, a build context that has the line's CUDA in /usr/local/cuda.
variable "KERNELS" { default = "none" }
variable "CUDA_TOOLKIT" { default = "" }    # docker-image://nvidia/cuda:12.8.1-devel-ubuntu22.04, or a folder
variable "PACKAGES" { default = "flash-attn deepspeed" }
variable "JOBS" { default = "1" }           # FlashAttention wants 9 GB of memory for each

variable "ARCHITECTURE_OF_TARGET" { default = { cpu = "", v100 = "7.0", a800 = "8.0", rtx4090 = "8.9", h100 = "9.0" } }

variable "LINE_OF_TARGET" {
  default = { cpu = "cpu", v100 = "cu128", a800 = "cu128", rtx4090 = "cu128", h100 = "cu130", v100-gptq = "v100-gptq" }
}

group "cpu" { targets = ["preprocess-cpu", "train-cpu", "infer-cpu", "eval-cpu"] }
group "v100" { targets = ["preprocess-v100", "train-v100", "infer-v100", "eval-v100"] }
group "a800" { targets = ["preprocess-a800", "train-a800", "infer-a800", "eval-a800"] }
group "rtx4090" { targets = ["preprocess-rtx4090", "train-rtx4090", "infer-rtx4090", "eval-rtx4090"] }
group "h100" { targets = ["preprocess-h100", "train-h100", "infer-h100", "eval-h100"] }
group "v100-gptq" { targets = ["train-v100-gptq"] }

target "common" {
  context = "."
  args = {
    HTTP_PROXY  = HTTP_PROXY == "" ? null : HTTP_PROXY
    HTTPS_PROXY = HTTPS_PROXY == "" ? null : HTTPS_PROXY
    NO_PROXY    = NO_PROXY == "" ? null : NO_PROXY
  }
  secret = compact([
    PIP_CONF == "" ? "" : "id=pip_conf,src=${PIP_CONF}",
    CA_CERT == "" ? "" : "id=ca,src=${CA_CERT}",
  ])
}

target "system" {
  inherits   = ["common"]
  dockerfile = "images/base/Dockerfile"
  target     = "system"
  args       = { BASE_IMAGE = BASE_IMAGE }
}

target "code" {
  inherits   = ["common"]
  dockerfile = "images/base/Dockerfile"
  target     = "code"
}

target "base" {
  matrix     = { layer = ["light", "torch"], line = ["cpu", "cu128", "cu130"] }
  name       = "${layer}-${line}"
  inherits   = ["common"]
  dockerfile = "images/base/Dockerfile"
  target     = layer
  args       = { BASE_IMAGE = BASE_IMAGE, LINE = line }
}

target "stage" {
  matrix     = { stage = ["preprocess", "train", "infer", "eval"], card = ["cpu", "v100", "a800", "rtx4090", "h100"] }
  name       = "${stage}-${card}"
  inherits   = ["common"]
  dockerfile = "images/${stage}/Dockerfile"
  contexts = {
    lorry-light = "target:light-${LINE_OF_TARGET[card]}"
    lorry-torch = "target:torch-${LINE_OF_TARGET[card]}"
    lorry-code  = "target:code"
    cuda        = CUDA_TOOLKIT == "" ? "target:system" : CUDA_TOOLKIT
  }
  args = {
    LINE     = LINE_OF_TARGET[card], TARGET = card
    KERNELS  = KERNELS, ARCHITECTURE = ARCHITECTURE_OF_TARGET[card], JOBS = JOBS, PACKAGES = PACKAGES
    VERSION  = VERSION
    REVISION = REVISION
    LOCKS    = LOCKS
  }
  tags = ["${REGISTRY == "" ? "" : "${REGISTRY}/"}lorry-${stage}:${VERSION}-${card}"]
}

# GPTQ training on V100 with auto-gptq: a frozen set of its own, which shares no layer of wheels.
target "train-v100-gptq" {
  inherits   = ["common"]
  dockerfile = "images/train/Dockerfile"
  contexts   = { lorry-torch = "target:system", lorry-code = "target:code" }
  args       = { LINE = "v100-gptq", TARGET = "v100-gptq", VERSION = VERSION, REVISION = REVISION, LOCKS = LOCKS }
  tags       = ["${REGISTRY == "" ? "" : "${REGISTRY}/"}lorry-train:${VERSION}-v100-gptq"]
}
