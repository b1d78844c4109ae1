#!/usr/bin/env bash
# The paper's tables and figures, the tracks of the leaderboard, and the page of them all.
#   scripts/reproduce.sh mini        every family in miniature, offline, from nothing
#   scripts/reproduce.sh beyond      kinds of fine-tuning beyond LoRA, and defences, in miniature
#   scripts/reproduce.sh synthetic   the exact method at the true layer shapes, weights only
#   scripts/reproduce.sh published   LoWRA-Bench: scripts/reproduce.sh published device=cuda source.path=...
#   scripts/reproduce.sh page        only the page, from what is in runs/
#   scripts/reproduce.sh export      put what is in runs/ under results/, to be committed; price the defences
# What comes after the first word goes to every lowra.run, and to the pricing. Stopped, it goes on where it was; what is
# there is not computed again. mini, synthetic and published end with runs/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-mini}
shift || true
all=vit,stable_diffusion,mistral_sft,mistral_dpo
extra=("$@")

run() {
  echo "== $((SECONDS / 60)) min: $*" >&2
  python -m lowra.run --multirun "$@" "${extra[@]}"
}

folders() { find runs -type d -name records -printf '%h\n' | sort; }

# Kinds of fine-tuning and defences have pages of their own (scripts/beyond_lora.py).
is_beyond() { [[ $1 =~ ^runs/(kinds|defences|defended_all|defended_pairs)/ ]]; }

page() {
  local found=()
  for folder in $(folders); do is_beyond "$folder" || found+=("$folder"); done
  python -m lowra.report "${found[@]}" --page runs/report.html
}

case "$what" in
  mini)
    # Few commands: each imports torch. The one whose tables stay in the folder of a subset comes last.
    run experiment=three,one_short,released,fig7 subset=$all
    run experiment=steps_200 subset=vit,stable_diffusion
    paper=table2,table3,table4_sft,table4_dpo                             # also Figs. 2, 3, 4, 14 to 17, and by layer
    run experiment=$paper,fig8,fig9,fig10,fig11,fig5,fig6,fig12,fig13,defended,dpo_sft_adapter,dpo_base
    page
    echo "== $((SECONDS / 60)) min in all" >&2
    ;;
  beyond)
    run experiment=kinds,kinds_sft builder.kind=lora,rslora,dora,pissa,mica,ia3,loha,lokr,vera,oft,full
    run experiment=defences defence=none,shared_component,rank_padding,rotation,scaling
    run experiment=defences defence=noise defence.size=1e-4,1e-3,1e-2
    run experiment=defences defence=rounding defence.format=bfloat16,float8,int8 defence.stochastic=false,true
    run experiment=defences builder.shared_a=true results_dir=runs/defended_all
    run experiment=defences builder.shared_a=true builder.shared_among=2 results_dir=runs/defended_pairs
    ;;
  synthetic)
    run experiment=three subset=$all source=synthetic trials=1 'methods=[mean_lora,subspace_intersection]'
    page
    ;;
  published)
    run experiment=table2,table3,table4_sft,table4_dpo source=published
    run experiment=three,one_short,released,fig7 subset=$all source=published
    run experiment=fig8,fig9,fig10,fig11 source=published
    run experiment=fig5,fig6,fig12,fig13 source=published
    run experiment=steps_200 subset=vit,stable_diffusion source=published
    page
    ;;
  page)
    page
    ;;
  export)
    folders | while read -r folder; do
      to=results/${folder#runs/}
      python -m lowra.report "$folder" --to "$to" > /dev/null
      # The records make the rest again, and nobody looks at figures of so many settings.
      if is_beyond "$folder"; then
        rm -f "$to"/*.png "$to"/*.svg "$to"/*.parquet "$to"/table.csv "$to"/table.tex
        sed -i '/^!\[/,+1d' "$to/table.md"
      fi
      echo "$to"
    done
    if [ -d runs/defences ]; then
      python scripts/beyond_lora.py price "${extra[@]}"
      python scripts/beyond_lora.py page
    fi
    page
    cp runs/report.html results/report.html
    ;;
  *)
    echo "error: $what is none of mini, beyond, synthetic, published, page, export." >&2
    exit 2
    ;;
esac
