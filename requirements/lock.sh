#!/bin/sh
# Writes host.txt, cpu.txt, gptq.txt, dev.txt, zero.txt, nf4.txt and trackers.txt from their .in files. Needs `uv`; called by `make lock`.
#
# Not emitted into the lock, though something asks for them:
#   torch                               installed first by `make setup`: which build fits is the machine's affair
#   torchvision torchaudio torchcodec   have no CPU build; everything used here imports without them
#   av                                  qwen-vl-utils reads videos with it
#   streamlit, gitpython, uv and what only they need
#                                       Data-Juicer's web page, and what it would install missing packages with
#   oss2 and what only it needs         cloud storage of one vendor, needs a C compiler to install
set -eu
cd "$(dirname "$0")"
export UV_FIND_LINKS="${UV_FIND_LINKS-${PIP_FIND_LINKS-}}" # where this machine's pip finds the CPU build of torch
common="--python-version 3.11 --generate-hashes --no-header --quiet"
# shellcheck disable=SC2086
uv pip compile $common cpu.in -o cpu.txt \
  --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
  --no-emit-package streamlit --no-emit-package altair --no-emit-package pydeck --no-emit-package watchdog \
  --no-emit-package itsdangerous --no-emit-package gitpython --no-emit-package gitdb --no-emit-package smmap \
  --no-emit-package uv \
  --no-emit-package av --no-emit-package oss2 --no-emit-package crcmod --no-emit-package aliyun-python-sdk-core \
  --no-emit-package aliyun-python-sdk-kms --no-emit-package pycryptodome
# shellcheck disable=SC2086
uv pip compile $common --constraints cpu.txt host.in -o host.txt
# shellcheck disable=SC2086
uv pip compile $common dev.in -o dev.txt
# shellcheck disable=SC2086
uv pip compile $common --no-deps gptq.in -o gptq.txt
# shellcheck disable=SC2086
uv pip compile $common --no-deps zero.in -o zero.txt
# shellcheck disable=SC2086
uv pip compile $common --no-deps nf4.in -o nf4.txt
# shellcheck disable=SC2086
uv pip compile $common --no-deps trackers.in -o trackers.txt
