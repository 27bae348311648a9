#!/bin/bash
# Rows of recovery_smollm2.py on one card, at most three processes: MODEL, TEXTS (with windows.pt) and OUT are directories.
# Each process stops by itself: SECONDS_EACH, 165 unless given.
export PYTHONPATH=$PWD TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
each=${SECONDS_EACH:-165}
measure() {
  timeout $((each + 5)) python3 tests/benchmarks/recovery_smollm2.py "$MODEL" --texts "$TEXTS" --device "${DEVICE:-cuda}" \
    --output "$OUT/recovery_$1.json" --seconds "$each" --rows "$2" $EXTRA 2>&1 | grep -v "^{" > "$OUT/recovery_$1.log" &
}
measure 30 "distill 30 %;distill 30 %, twice the rate;full 30 %;lora 30 %;norms 30 %;distill 30 %, alpha 0.5"
measure 20 "distill 20 %;lora 30 %;norms 30 %"
measure 50 "distill 50 %;distill 50 %, twice the rate"
wait
tail -n 12 "$OUT"/recovery_*.log
