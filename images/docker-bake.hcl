# The stage images of one target. `make images TARGET=a800 [STAGE=train]` calls this with the target's facts from
# images/targets.toml. By hand:
#
#   TARGET=a800 LINE=cu128 ARCHITECTURE=8.0 docker buildx bake -f images/docker-bake.hcl          the four images
#   TARGET=a800 LINE=cu128 ARCHITECTURE=8.0 docker buildx bake -f images/docker-bake.hcl train    one of them
#
# Targets of one line of wheels share their layers. Their images differ only in labels and environment.

variable "TARGET" { default = "" }
variable "LINE" { default = "" }            # of wheels: cpu, or `cuda` in targets.toml; a variant has its own
variable "ARCHITECTURE" { default = "" }    # compute capability, for kernels that are compiled on request
variable "VARIANT" { default = "" }         # not empty: wheels for train that share no layer with other images

variable "VERSION" { default = "0.1.0" }    # as in pyproject.toml
variable "REVISION" { default = "" }        # git revision of the code
variable "LOCKS" { default = "" }           # sha256 over all lock files
variable "REGISTRY" { default = "" }        # prefix of the tags, such as registry.example/team
variable "BASE_IMAGE" { default = "debian:bookworm-slim" }

# Files that builds read, and that no layer keeps: pip's configuration (index, credentials) and a CA bundle.
variable "PIP_CONF" { default = "" }
variable "CA_CERT" { default = "" }
variable "HTTP_PROXY" { default = "" }
variable "HTTPS_PROXY" { default = "" }
variable "NO_PROXY" { default = "" }

# Kernels in the train image (images/train/Dockerfile): none, or compiled for the target's architecture with
# CUDA_TOOLKIT, a build context that has the line's CUDA in /usr/local/cuda.
variable "KERNELS" { default = "none" }
variable "CUDA_TOOLKIT" { default = "" }    # docker-image://nvidia/cuda:12.8.1-devel-ubuntu22.04, or a folder
variable "PACKAGES" { default = "flash-attn deepspeed" }
variable "JOBS" { default = "1" }           # compilers at a time; FlashAttention takes 9 GB of memory for each

group "default" { targets = ["preprocess", "train", "infer", "eval"] }

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
  matrix     = { layer = ["light", "torch"] }
  name       = layer
  inherits   = ["common"]
  dockerfile = "images/base/Dockerfile"
  target     = layer
  args       = { BASE_IMAGE = BASE_IMAGE, LINE = LINE }
}

target "stage" {
  matrix     = { stage = ["preprocess", "train", "infer", "eval"] }
  name       = stage
  inherits   = ["common"]
  dockerfile = "images/${stage}/Dockerfile"
  contexts = {
    lorry-light = VARIANT == "" ? "target:light" : "target:system"
    lorry-torch = VARIANT == "" ? "target:torch" : "target:system"
    lorry-code  = "target:code"
    cuda        = CUDA_TOOLKIT == "" ? "target:system" : CUDA_TOOLKIT
  }
  args = {
    LINE     = LINE, TARGET = TARGET
    KERNELS  = VARIANT == "" ? KERNELS : "none", ARCHITECTURE = ARCHITECTURE, JOBS = JOBS, PACKAGES = PACKAGES
    VERSION  = VERSION
    REVISION = REVISION
    LOCKS    = LOCKS
  }
  tags = ["${REGISTRY == "" ? "" : "${REGISTRY}/"}lorry-${stage}:${VERSION}-${TARGET}"]
}
