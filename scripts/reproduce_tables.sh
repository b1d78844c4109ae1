#!/usr/bin/env bash
# The paper's Tables 2, 3 and 4, one subset after another; everything after the script's name is passed on.
#   scripts/reproduce_tables.sh                          in miniature, offline (about half an hour on 2 cores)
#   scripts/reproduce_tables.sh source=published device=cuda metrics.activation_distance.images=IMAGENET_VAL ...
set -euo pipefail
cd "$(dirname "$0")/.."
for subset in vit stable_diffusion mistral_sft mistral_dpo; do
  python -m lowra.run subset="$subset" "$@"
done
