#!/bin/bash
# To a running Ray cluster whose nodes have this package and share /shared:
#   RAY_ADDRESS=http://head:8265 bash ray-submit.sh
set -euo pipefail

ray job submit --no-wait -- \
    gd-infer --ray auto --workers 8 --backend cuda --model /shared/models/bundle --prompts /shared/prompts.jsonl --out /shared/dataset
