#!/bin/sh
# Runs a command on a node of the Ray cluster at RAY_ADDRESS.
#
# A Ray driver has to run on a node of its cluster, so this machine joins it first. It gives no
# CPUs: the work belongs to the Ray workers.
set -eu
: "${RAY_ADDRESS:?the address of the Ray head, host:port}"
ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats
exec "$@"
