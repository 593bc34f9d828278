#!/usr/bin/env bash
# with_engine.sh COMMAND...: run a command where a Docker engine with BuildKit and Compose answers.
#
# An engine that answers is used as it is. Where none does (CI, as root on Debian), Debian's is installed, started on a
# socket of its own, and given a base image made of Debian's packages, since no registry may be in reach; the engine, its
# images and all that it wrote are gone at the end. In both cases the builds find the CPU build of torch, which the
# ordinary index does not have, where this machine's pip finds it.
set -euo pipefail
cd "$(dirname "$0")/../.."

home=$(mktemp -d /tmp/lorry-engine.XXXXXX)
server=
# shellcheck disable=SC2317,SC2329 # called by the trap
clean_up() {
  [ -z "$server" ] || kill "$server" 2> /dev/null || true
  if [ -s "$home/pid" ]; then
    kill "$(cat "$home/pid")" || true
    tail --pid="$(cat "$home/pid")" -f /dev/null || true
  fi
  for _ in 1 2 3 4 5; do # a mount of the engine's may take a moment to go
    rm -rf "$home" 2> /dev/null && break
    sleep 1
  done
  true
}
trap clean_up EXIT

answers() { docker buildx version && docker compose version && docker info; } > /dev/null 2>&1

install_engine() {
  local suffix='' mirror
  # bookworm has no buildx and no Compose 2: these packages come from trixie, and what they need stays as it is
  if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
    suffix=/trixie
    mirror=$(sed -nE 's#^(URIs:|deb)( \[[^]]*\])? *(https?://[^ ]*/debian)/?( .*)?$#\3#p' \
      /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null | head -n 1 || true)
    printf 'Types: deb\nURIs: %s\nSuites: trixie\nComponents: main\nSigned-By: %s\n' \
      "${mirror:-http://deb.debian.org/debian}" /usr/share/keyrings/debian-archive-keyring.gpg \
      > /etc/apt/sources.list.d/lorry-engine.sources
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 50\n' > /etc/apt/preferences.d/lorry-engine
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "docker.io$suffix" "docker-cli$suffix" \
    "docker-buildx$suffix" "docker-compose$suffix" iptables mmdebstrap > /dev/null
  rm -f /etc/apt/sources.list.d/lorry-engine.sources /etc/apt/preferences.d/lorry-engine
}

start_engine() {
  [ "$(id -u)" = 0 ] || { echo "error: no Docker engine answers, and only root can start one here; start yours" >&2; exit 2; }
  if ! { [ -x /usr/sbin/dockerd ] && /usr/bin/docker buildx version && /usr/bin/docker compose version \
    && command -v mmdebstrap; } > /dev/null 2>&1; then
    install_engine
  fi
  mkdir "$home/bin"
  ln -s /usr/bin/docker "$home/bin/docker" # before a client without plugins that may come first
  export PATH="$home/bin:$PATH"
  if ! answers; then # where systemd runs, installing it has started it
    export DOCKER_HOST="unix://$home/docker.sock"
    dockerd --data-root "$home/data" --exec-root "$home/exec" --host "$DOCKER_HOST" --pidfile "$home/pid" \
      > "$home/log" 2>&1 &
    for _ in $(seq 60); do
      ! answers || break
      sleep 1
    done
    docker info > /dev/null || { tail -n 20 "$home/log" >&2; exit 1; }
  fi
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$home/base.tar"
  docker import "$home/base.tar" lorry-local/debian:bookworm > /dev/null
  rm "$home/base.tar"
  export BASE_IMAGE=lorry-local/debian:bookworm CA_CERT="${CA_CERT:-/etc/ssl/certs/ca-certificates.crt}"
}

serve_torch() {
  local gateway port=
  mkdir "$home/wheels"
  .venv/bin/python -m pip download --quiet --no-deps --dest "$home/wheels" torch==2.13.0
  gateway=$(docker network inspect bridge --format '{{(index .IPAM.Config 0).Gateway}}')
  .venv/bin/python -u -m http.server --bind "$gateway" --directory "$home/wheels" 0 > "$home/http.log" 2>&1 &
  server=$!
  for _ in $(seq 100); do
    port=$(sed -nE 's/.* port ([0-9]+) .*/\1/p' "$home/http.log")
    [ -z "$port" ] || break
    sleep 0.1
  done
  printf '[global]\nfind-links = http://%s:%s/\ntrusted-host = %s\ntimeout = 180\n' "$gateway" "$port" "$gateway" \
    > "$home/pip.conf"
  export PIP_CONF="$home/pip.conf"
}

answers || start_engine
[ -n "${PIP_CONF-}" ] || serve_torch
"$@"
