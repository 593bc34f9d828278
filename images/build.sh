#!/usr/bin/env bash
# build.sh TARGET [STAGE]: build the stage images of a target; `make images TARGET=… [STAGE=…]`.
# build.sh --push TARGET [STAGE]: tag them for REGISTRY and push them; `make push TARGET=… REGISTRY=…`.
#
# From the environment, besides docker-bake.hcl's variables: BASE_IMAGE (a mirror's, an internal one), PIP_CONF (a file:
# index, credentials), CA_CERT (a file), HTTP_PROXY, HTTPS_PROXY, NO_PROXY. None of them stays in an image.
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
[ -n "$target" ] || fail "name a target: TARGET=a800; there are: $targets"
[[ " $targets " == *" $target "* ]] || fail "no target '$target'; there are: $targets"
case $target in v100-gptq) stages=train ;; *) stages="preprocess train infer eval" ;; esac
if [ -n "$stage" ]; then
  [[ " $stages " == *" $stage "* ]] || fail "no stage '$stage' for target $target; there are: $stages"
  stages=$stage
fi

case $target in cpu | v100-gptq) line=$target ;; *)
  line=$(sed -nE "/^\[$target\]/,/^\[/s/^cuda = \"(.*)\"/\1/p" images/targets.toml) ;;
esac
bake=()
for stage in $stages; do
  [ -s "images/$stage/$line.txt" ] || fail "images/$stage/$line.txt, the lock of $stage for $target, is missing: make lock"
  bake+=("$stage-$target")
done

answer=$(docker info 2>&1) || case $answer in
  *"permission denied"*) fail "the Docker socket does not admit uid $(id -u): join the group docker, or use sudo" ;;
  *) fail "no Docker engine answers (${DOCKER_HOST:-/var/run/docker.sock}); start it: systemctl start docker" ;;
esac
docker buildx version > /dev/null 2>&1 || fail "this docker has no buildx; on Debian and Ubuntu: apt-get install docker-buildx"

VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
if [ -n "$push" ]; then
  [ -n "${REGISTRY-}" ] || fail "name the registry: REGISTRY=registry.example/team"
  for stage in $stages; do
    image=lorry-$stage:$VERSION-$target
    docker image inspect "$image" > /dev/null 2>&1 || fail "no image $image: make images TARGET=$target STAGE=$stage"
    docker tag "$image" "$REGISTRY/$image"
    docker push --quiet "$REGISTRY/$image"
  done
  exit
fi

REVISION=$(git rev-parse HEAD 2> /dev/null || true)
[ -z "$REVISION" ] || git diff --quiet HEAD || REVISION+=-dirty
LOCKS=$(cat images/*/*.txt | sha256sum | cut -d ' ' -f 1)
export VERSION REVISION LOCKS BUILDX_BAKE_ENTITLEMENTS_FS=0 # newer buildx asks before it reads PIP_CONF and CA_CERT
REGISTRY='' docker buildx bake --file images/docker-bake.hcl --load "${bake[@]}"
for stage in $stages; do
  image=lorry-$stage:$VERSION-$target
  docker image inspect "$image" --format "$image {{.Size}}" | awk '{printf "%s  %.2f GB\n", $1, $2 / 1e9}'
done
