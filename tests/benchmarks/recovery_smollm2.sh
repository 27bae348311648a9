#!/bin/bash
# All rows of recovery_smollm2.py on one card, three processes at a time: MODEL, TEXTS and OUT are directories.
export PYTHONPATH=$PWD TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
measure() {
  timeout 320 python3 tests/benchmarks/recovery_smollm2.py "$MODEL" --texts "$TEXTS" --device "${DEVICE:-cuda}" \
    --output "$OUT/recovery_$1.json" --seconds "${SECONDS_EACH:-285}" --rows "$2" $EXTRA 2>&1 | grep -v "^{" &
}
measure 30 "distill 30 %;distill 30 %, twice the rate;full 30 %;distill 30 %, half the rate;distill 30 %, alpha 0.5"
measure 20 "distill 20 %;lora 30 %;norms 30 %;lora 30 %, towards the dense model"
measure 50 "distill 50 %;distill 50 %, twice the rate;distill 30 %, predictions written before"
wait
