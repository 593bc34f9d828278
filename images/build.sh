#!/usr/bin/env bash
# build.sh TARGET [STAGE]: build the stage images of a target; `make images TARGET=… [STAGE=…]`.
# build.sh --push TARGET [STAGE]: tag the images for REGISTRY and push them; `make push TARGET=… REGISTRY=…`.
#
# It reads the target's facts from images/targets.toml, and the other variables of docker-bake.hcl from the environment:
# BASE_IMAGE, PIP_CONF (a file with index and credentials), CA_CERT (a file), HTTP_PROXY, HTTPS_PROXY, NO_PROXY. No
# image keeps these values.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

push=
if [ "${1-}" = --push ]; then
  push=yes
  shift
fi
target=${1-} stage=${2-}
targets=$(sed -nE 's/^\[([a-z0-9-]+)\]$/\1/p' images/targets.toml | paste -sd ' ')
[ -n "$target" ] || fail "no target given; add TARGET=a800; known targets: $targets"
[[ " $targets " == *" $target "* ]] || fail "no target '$target'; known targets: $targets"

fact() { # key: print the target's value in targets.toml
  sed -nE "/^\[$target\]/,/^\[/s/^$1 = \"([^\"]*)\".*/\1/p" images/targets.toml
}

LINE=$(fact cuda) ARCHITECTURE=$(fact capability) VARIANT=$(fact variant_of)
stages="preprocess train infer eval"
if [ -n "$VARIANT" ]; then # only train differs, and has wheels of its own
  stages=train LINE=$target
fi
: "${LINE:=cpu}"
if [ -n "$stage" ]; then
  [[ " $stages " == *" $stage "* ]] || fail "target $target has no stage '$stage'; its stages: $stages"
  stages=$stage
fi
for stage in $stages; do
  [ -s "images/$stage/$LINE.txt" ] || fail "no images/$stage/$LINE.txt, the lock of $stage for $target; write it: make lock"
done

case ${KERNELS:-none} in
  none | compiled) ;;
  *) fail "KERNELS=$KERNELS: no such value; known values: none compiled" ;;
esac
for name in PIP_CONF CA_CERT; do
  [ -z "${!name-}" ] || [ -f "${!name}" ] || fail "$name=${!name}: no such file; name another, or leave it out"
done

answer=$(docker info 2>&1) || case $answer in
  *"permission denied"*) fail "uid $(id -u) may not use the Docker socket; join the group docker, or use sudo" ;;
  *) fail "no Docker engine answers (${DOCKER_HOST:-/var/run/docker.sock}); start it: systemctl start docker" ;;
esac
docker buildx version > /dev/null 2>&1 || fail "this docker has no buildx; on Debian and Ubuntu: apt-get install docker-buildx"

VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
if [ -n "$push" ]; then
  [ -n "${REGISTRY-}" ] || fail "no registry given; add REGISTRY=registry.example/team"
  for stage in $stages; do
    image=lorry-$stage:$VERSION-$target
    docker image inspect "$image" > /dev/null 2>&1 || fail "no image $image; build it: make images TARGET=$target STAGE=$stage"
    docker tag "$image" "$REGISTRY/$image"
    docker push --quiet "$REGISTRY/$image"
  done
  exit
fi

REVISION=$(git rev-parse HEAD 2> /dev/null || true)
[ -z "$REVISION" ] || git diff --quiet HEAD || REVISION+=-dirty
LOCKS=$(cat images/*/*.txt | sha256sum | cut -d ' ' -f 1)
export BUILDX_BAKE_ENTITLEMENTS_FS=0 # newer buildx asks before it reads PIP_CONF and CA_CERT
export TARGET=$target LINE ARCHITECTURE VARIANT VERSION REVISION LOCKS REGISTRY=
if [ "$LINE" = cpu ] && [ -z "${PIP_CONF-}" ]; then # a base image may have its own pip.conf
  echo "note: target cpu needs an index that has the CPU build of torch; if the build finds none, add PIP_CONF=pip.conf" \
    "(docs/cards-and-images.md shows one)" >&2
fi
# shellcheck disable=SC2086 # one word for each stage
docker buildx bake --file images/docker-bake.hcl --load $stages
for stage in $stages; do
  image=lorry-$stage:$VERSION-$target
  docker image inspect "$image" --format "$image {{.Size}}" | awk '{printf "%s  %.2f GB\n", $1, $2 / 1e9}'
done
