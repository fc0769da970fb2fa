#!/bin/bash
# All benchmarks that have a row for a GPU, one after the other in under ten minutes; the table goes to
# runs/gpu/table.md with the card's name, what each printed to runs/gpu/*.log.
#
#     bash benchmarks/gpu.sh                 # or, to try it out: DEVICE=cpu bash benchmarks/gpu.sh
cd "$(dirname "$0")/.." || exit 1
device=${DEVICE:-cuda} python=${PYTHON:-.venv/bin/python} out=runs/gpu
mkdir -p $out
rm -f $out/*.log
while read -r seconds name arguments; do
    echo "== $name $arguments"
    # shellcheck disable=SC2086
    timeout "$seconds" "$python" "benchmarks/$name.py" $arguments > "$out/$name.log" 2>&1 \
        || echo "$name: ended with code $? (124: not done after $seconds s); see $out/$name.log"
done <<END
150 step device=$device rounds=5
60 quality device=$device rounds=5 variants=channels_last,compile
150 gen_views device=$device rounds=2
90 online rounds=2
60 loader size=224 seconds=4
END
"$python" - $out <<'END' | tee $out/table.md
import json, sys
from pathlib import Path
import torch
print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, torch {torch.__version__}\n")
print('| benchmark | figures |\n|---|---|')
for path in sorted(Path(sys.argv[1]).glob('*.log')):
    last = (path.read_text().splitlines() or [''])[-1]
    found = json.loads(last) if last.startswith('{') else {'no result': last[:100]}
    print(f"| {path.stem} | {', '.join(f'{k} {v}' for k, v in found.items() if not isinstance(v, (list, dict, str)))} |")
END
