#!/usr/bin/env bash
# Run the whole workflow on the sample from a fresh clone. This takes about ten minutes on two CPU
# cores, including the installation. It needs neither a GPU nor an account.
#
#   bash sample/run.sh              # start from scratch and replace the results in sample/run/
#   bash sample/run.sh --resume     # continue an interrupted run, with the same other arguments
#
# All other arguments, such as --seed 43, are passed to the training script.
set -euo pipefail
cd "$(dirname "$0")/.."

resume=()
training=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,8s/^# \{0,1\}//p' sample/run.sh
            exit
            ;;
        --resume) resume=(--resume) ;;
        *) training+=("$argument") ;;
    esac
done
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: this needs Python 3.11 or newer, but python3 is $(python3 --version)" >&2
    exit 1
fi
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
        if [ $code -ne 2 ]; then # 2 means that the arguments were wrong
            printf '\nTo continue: bash sample/run.sh --resume'
            printf '%s\n' "${training[*]:+ ${training[*]}}"
        fi
        exit $code
    }
    times+=("$(printf '%5d s  %s' $((SECONDS - start)) "$1")")
}
SECONDS=0
evaluation=(--model ../tiny-gemma-3 --batch-size 96 --max-new-tokens 160)
step prepare_function_calling_dataset.py --dataset ../hermes_sample.json
step evaluation.py --baseline "${evaluation[@]}" ${resume[@]+"${resume[@]}"}
# The tiny model is hundreds of times smaller than Gemma 3. It needs a higher learning rate, a
# higher rank and more epochs than the published settings.
step function_calling_train.py --model ../tiny-gemma-3 --dtype float32 --epochs 5 \
    --learning-rate 6e-3 --lora-rank 32 --lora-alpha 128 --lora-dropout 0 \
    ${resume[@]+"${resume[@]}"} ${training[@]+"${training[@]}"}
step evaluation.py "${evaluation[@]}" ${resume[@]+"${resume[@]}"}

echo
printf '%s\n' "${times[@]}" "$(printf '%5d s  total' $SECONDS)"
adapter=sample/run/LoRA_tiny-gemma-3-function_calling
results=sample/run/evaluation_results/tiny-gemma-3
echo "Plots       $adapter/loss.png: training and validation loss"
echo "            $results/fine-tuned/comparison.png: baseline and fine-tuned model"
