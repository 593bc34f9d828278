#!/bin/sh
# install.sh LOCK: install locked wheels into the image's environment.
# install.sh --wheels LOCK: make wheels of locked sources in /wheels instead; the lock may be absent.
#
# For RUN in the Dockerfiles, which mount pip's configuration and a CA bundle as secrets where the builder gave them;
# neither stays in a layer.
set -eu
cd "$(dirname "$0")"
export PIP_CACHE_DIR=/root/.cache/pip # the mount; else it would be below /caches, in the layer
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
if [ "$1" = --wheels ]; then
  mkdir /wheels
  [ ! -e "$2" ] || pip wheel --no-deps --require-hashes --no-build-isolation --wheel-dir /wheels --requirement "$2"
else
  pip install --no-deps --require-hashes --only-binary :all: --requirement "$1"
fi
