#!/usr/bin/env bash
# with_engine.sh COMMAND...: run a command where a Docker engine with BuildKit and Compose answers.
#
# An engine that answers is used as it is. Where none does (CI, as root on Debian), Debian's is installed, started on a
# socket of its own, and given a base image made of Debian's packages, since no registry may be in reach; all of it but
# the packages is gone at the end. The images' builds then find this machine's CA bundle, and its CPU build of torch.
set -euo pipefail

if docker buildx version > /dev/null 2>&1 && docker compose version > /dev/null 2>&1 && docker info > /dev/null 2>&1; then
  exec "$@"
fi
[ "$(id -u)" = 0 ] || { echo "error: no Docker engine answers, and only root can start one here; start yours" >&2; exit 2; }

install_engine() {
  local source=()
  # bookworm has no buildx and no Compose 2: these packages come from trixie, and what they need stays as it is
  if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
    printf 'Types: deb\nURIs: http://deb.debian.org/debian\nSuites: trixie\nComponents: main\nSigned-By: %s\n' \
      /usr/share/keyrings/debian-archive-keyring.gpg > /etc/apt/sources.list.d/lorry-engine.sources
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 50\n' > /etc/apt/preferences.d/lorry-engine
    source=(docker.io/trixie docker-cli/trixie docker-buildx/trixie docker-compose/trixie)
  else
    source=(docker.io docker-cli docker-buildx docker-compose)
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${source[@]}" iptables mmdebstrap > /dev/null
}

if ! { [ -x /usr/sbin/dockerd ] && /usr/bin/docker buildx version && /usr/bin/docker compose version \
  && command -v mmdebstrap; } > /dev/null 2>&1; then
  install_engine
fi

home=$(mktemp -d /tmp/lorry-engine.XXXXXX)
servers=()
# shellcheck disable=SC2317,SC2329 # called by the trap
clean_up() {
  [ ${#servers[@]} = 0 ] || kill "${servers[@]}" 2> /dev/null || true
  if [ -s "$home/pid" ]; then
    kill "$(cat "$home/pid")" || true
    tail --pid="$(cat "$home/pid")" -f /dev/null || true
  fi
  rm -rf "$home"
}
trap clean_up EXIT
mkdir "$home/bin"
ln -s /usr/bin/docker "$home/bin/docker" # before a client without plugins that may come first
export PATH="$home/bin:$PATH" DOCKER_HOST="unix://$home/docker.sock"
dockerd --data-root "$home/data" --exec-root "$home/exec" --host "$DOCKER_HOST" --pidfile "$home/pid" > "$home/log" 2>&1 &
for _ in $(seq 60); do
  docker info > /dev/null 2>&1 && break
  sleep 1
done
docker info > /dev/null || { tail -n 20 "$home/log" >&2; exit 1; }

mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$home/base.tar"
docker import "$home/base.tar" lorry-local/debian:bookworm > /dev/null
rm "$home/base.tar"
export BASE_IMAGE=lorry-local/debian:bookworm

# the CPU build of torch is not in the ordinary index: this machine's pip knows where, a build's pip is told
mkdir "$home/wheels"
python3 -m pip download --quiet --no-deps --dest "$home/wheels" torch==2.13.0
gateway=$(docker network inspect bridge --format '{{(index .IPAM.Config 0).Gateway}}')
python3 -u -m http.server --bind "$gateway" --directory "$home/wheels" 0 > "$home/http.log" 2>&1 &
servers+=($!)
for _ in $(seq 50); do
  port=$(sed -nE 's/.* port ([0-9]+) .*/\1/p' "$home/http.log")
  [ -z "$port" ] || break
  sleep 0.1
done
printf '[global]\nfind-links = http://%s:%s/\ntrusted-host = %s\ntimeout = 180\n' "$gateway" "$port" "$gateway" > "$home/pip.conf"
export PIP_CONF="$home/pip.conf" CA_CERT="${CA_CERT:-/etc/ssl/certs/ca-certificates.crt}"

status=0
"$@" || status=$?
exit $status
