#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of under ten minutes: tests, benchmarks, figures in the full
# protocol. Needs only python3 with torch and the package's requirements; no network, no installation.
# The tests also want pytest and hypothesis, and some figures kronfluence, transformers with
# sentence-transformers, bm25s or faiss; a piece says which is missing. One that is done is skipped, and one
# that was cut off goes on where it stopped: call it again until every line says so. Leave the code alone
# meanwhile: what was kept of a figure belongs to the code that made it.
#
#   bash bench/gpu.sh            all pieces
#   bash bench/gpu.sh NAME ...   these pieces
#   FORCE=1 do them again · RESULTS=dir where to write (bench/results) · PYTHON=... which interpreter (python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RESULTS=${RESULTS:-bench/results}
export PYTHON=${PYTHON:-python3}
export INFOTDA_CACHE=${INFOTDA_CACHE:-$PWD/out/cache}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$RESULTS"

declare -A PIECES=(
  [tests]="$PYTHON -m pytest $(grep -l mark.gpu tests/test_*.py | tr '\n' ' ')-m gpu -q -p no:cacheprovider" # other test files want packages that need not be there
)
ORDER=(tests)
for name in device train_many; do  # benchmarks; their own records lie beside this script's
  PIECES[bench-$name]="$PYTHON bench/$name.py --out $RESULTS/gpu_$name.json"
  ORDER+=("bench-$name")
done
for figure in nbs/figures/*.ipynb; do  # every figure in the full protocol; a piece that was cut goes on from its parts when it is run again
  name=figure-$(basename "$figure" .ipynb)
  PIECES[$name]="INFOTDA_PROFILE=paper $PYTHON bench/plain.py $figure"
  ORDER+=("$name")
done

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device here"' || { echo "bench/gpu.sh: nothing was run (PYTHON=$PYTHON)"; exit 1; }

failed=0
for name in "${@:-${ORDER[@]}}"; do
  command=${PIECES[$name]:-}
  [ -n "$command" ] || { echo "$name: no such piece; there are: ${ORDER[*]}"; failed=1; continue; }
  record="$RESULTS/gpu-$name.json"
  if [ -z "${FORCE:-}" ] && grep -q '"exit": 0' "$record" 2>/dev/null; then echo "$name: done before, skipped ($record)"; continue; fi
  started=$SECONDS
  timeout 590 bash -c "$command" >"$RESULTS/gpu-$name.log" 2>&1
  code=$?
  "$PYTHON" - "$record" "$name" "$command" "$code" "$((SECONDS - started))" "$RESULTS/gpu-$name.log" <<'PY'
import json, sys
from infotda.core import environment
path, name, command, code, seconds, log = sys.argv[1:]
last = [line for line in open(log, encoding="utf-8").read().splitlines() if line.strip()][-1:]
record = dict(piece=name, command=command, exit=int(code), seconds=int(seconds), last_line="".join(last), environment=environment())
json.dump(record, open(path, "w", encoding="utf-8"), indent=2)
PY
  echo "$name: exit $code after $((SECONDS - started)) s: $(tail -n 1 "$RESULTS/gpu-$name.log")"
  [ "$code" = 0 ] || failed=1
done
exit $failed
