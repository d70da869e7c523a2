#!/usr/bin/env bash
# Set up, train on the generated shop and recommend; then the same on MovieLens-1M, by title.
# Without a network it stops after the shop, with success. About 20 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
mtrec="${VENV:-.venv}/bin/mtrec"
out="${DEMO_DIR:-demo}"
mkdir -p "$out"

echo "== The generated shop: clicks, purchases and likes with a known best possible AUC"
"$mtrec" run shop --data "$out/data" --prepared "$out/prepared/shop" --run "$out/runs/shop"
"$mtrec" recommend "$out/runs/shop" --users u00001 u00002 --k 5

echo
echo "== MovieLens-1M: next item, like (4 stars or more) and rating together"
status=0
"$mtrec" data ml-1m --to "$out/data" || status=$?
if [ "$status" = 3 ]; then
  echo "No network: MovieLens-1M cannot be fetched. The demo ends here; the shop above is complete."
  exit 0
elif [ "$status" != 0 ]; then
  exit "$status"
fi
"$mtrec" prepare ml-1m --data "$out/data" --out "$out/prepared/ml-1m"
"$mtrec" train ml-1m --prepared "$out/prepared/ml-1m" --run "$out/runs/ml-1m"
"$mtrec" evaluate "$out/runs/ml-1m"
"$mtrec" recommend "$out/runs/ml-1m" --users 1m_1 1m_2 --k 10
