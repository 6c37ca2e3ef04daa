#!/usr/bin/env bash
# The whole workflow on the sample, from a fresh clone: some five minutes on two CPU cores besides installing, no GPU, no account.
#
#   bash sample/run.sh              # from scratch; replaces the results in sample/run/
#   bash sample/run.sh --resume     # continue an interrupted run (with the same other arguments)
#
# Other arguments go to the training, such as --seed 43.
set -euo pipefail
cd "$(dirname "$0")/.."

resume=() training=()
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' sample/run.sh; exit ;;
        --resume) resume=(--resume) ;;
        *) training+=("$argument") ;;
    esac
done
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, python3 is " + sys.version)'
if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    python3 -m venv .venv
fi
echo "Installing  requirements.txt into .venv/"
.venv/bin/python -m pip install --quiet --requirement requirements.txt

if [ ${#resume[@]} -eq 0 ]; then
    rm -rf sample/run
fi
mkdir -p sample/run
cd sample/run
times=()
step() {
    printf '\n(in sample/run)$ python ../../%s\n' "$*"
    local start=$SECONDS
    ../../.venv/bin/python "../../$1" "${@:2}" || {
        local code=$?
        [ $code -eq 2 ] || printf '\nTo continue: bash sample/run.sh --resume%s\n' "${training[*]:+ ${training[*]}}"
        exit $code
    }
    times+=("$(printf '%5d s  %s' $((SECONDS - start)) "$1")")
}
SECONDS=0
step prepare_function_calling_dataset.py --dataset ../hermes_sample.json
step evaluation.py --model ../tiny-gemma-3 --baseline --batch-size 96 --max-new-tokens 160 ${resume[@]+"${resume[@]}"}
# A model hundreds of times smaller than Gemma wants a higher learning rate and rank and more epochs than the published ones.
step function_calling_train.py --model ../tiny-gemma-3 --learning-rate 6e-3 --epochs 5 --lora-rank 32 --lora-alpha 128 --lora-dropout 0 \
    --dtype float32 ${resume[@]+"${resume[@]}"} ${training[@]+"${training[@]}"}
step evaluation.py --model ../tiny-gemma-3 --batch-size 96 --max-new-tokens 160 ${resume[@]+"${resume[@]}"}

echo
printf '%s\n' "${times[@]}" "$(printf '%5d s  in all' $SECONDS)"
echo "Pictures    sample/run/LoRA_tiny-gemma-3-function_calling/loss.png: the losses"
echo "            sample/run/evaluation_results/tiny-gemma-3/fine-tuned/comparison.png: baseline and fine-tuned"
