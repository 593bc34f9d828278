#!/bin/sh
# install.sh LOCK: install locked wheels into the image's environment.
# install.sh --wheels LOCK: build wheels from locked sources into /wheels; without the lock, do nothing.
#
# The Dockerfiles call it in RUN, with pip's configuration and a CA bundle mounted as secrets if the builder has them. No
# layer keeps these.
set -eu
cd "$(dirname "$0")"
export PIP_CACHE_DIR=/root/.cache/pip # a cache mount; the default is below /caches, in the layer
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
if [ "$1" = --wheels ]; then
  mkdir /wheels
  [ ! -e "$2" ] || pip wheel --no-deps --require-hashes --no-build-isolation --wheel-dir /wheels --requirement "$2"
else
  pip install --no-deps --require-hashes --only-binary :all: --requirement "$1"
fi
