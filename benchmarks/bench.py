"""What benchmarks share: the project's modules within reach, options, stages as a user runs them, the hardware's name.

Import it before the project's modules."""
import fcntl
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.stats import ttest_ind

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]
from common import precision_dtype  # noqa: E402
from files import save_json  # noqa: E402


def options(**defaults):
    """The defaults, changed by what the command line says: key=value, of the default's type."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition('=')
        if key not in defaults:
            sys.exit(f'unknown option {key!r}; known are {", ".join(defaults)}')
        defaults[key] = type(defaults[key])(value)
    return defaults


def stage(script, *arguments):
    """Run a stage; returns how many seconds it took."""
    print(f"\n=== python {script} {' '.join(arguments)}", flush=True)
    start = time.time()
    if code := subprocess.run([sys.executable, script, *arguments], cwd=ROOT).returncode:
        sys.exit(f'{script} ended with exit code {code}; its message stands above. The same command goes on from here')
    return time.time() - start


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = [line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')] \
        if Path('/proc/cpuinfo').exists() else [platform.processor()]
    return f'{model[0]}, {torch.get_num_threads()} threads'


def results(path):
    return json.loads(path.read_text()) if path.exists() else []


def measure(path, run, row, seed, pretraining, probing):
    """Pretrains and probes a row of a table with a seed, if that has not been done, and notes it in `path`: a list of
    {row, seed, precision, knn, linear, seconds, hardware}. pretraining, probing: arguments of pretrain.py and
    linear_eval.py."""
    folder = run / f'{row}_{seed}'
    if (ROOT / folder / 'linear_eval/results.json').exists():
        return
    undisturbed = not (ROOT / folder).exists()
    seconds = stage('pretrain.py', *pretraining, f'seed={seed}', f'output={folder}')
    stage('linear_eval.py', *probing, f'checkpoint={folder}/backbone.pt', f'output={folder}/linear_eval')
    measured = json.loads((ROOT / folder / 'linear_eval/results.json').read_text())
    found = yaml.safe_load((ROOT / folder / 'config.yaml').read_text())['precision']
    precision = str(precision_dtype(found, torch.device('cuda' if torch.cuda.is_available() else 'cpu')))[6:]
    key, value = dict(row=row, seed=seed, precision=precision), dict(
        knn=measured['knn']['top1'], linear=measured['linear']['top1'],
        seconds=round(seconds) if undisturbed else None, hardware=device_name())
    path.parent.mkdir(exist_ok=True)
    with open(ROOT / run / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        save_json(path, [*(r for r in results(path) if {k: r[k] for k in key} != key), key | value])


def table(done, titles, base):
    """Prints kNN and linear top-1 of every row of titles {row: title} that `done`, what measure() noted, has: mean +-
    standard deviation over the seeds, and the differences to row `base` with their 95 % intervals (Student's t, pooled
    variance, rows taken as independent, not corrected for how many there are). Seeds vary the pretraining; images and
    views are the same for all. One table for each precision."""
    for precision in sorted({r['precision'] for r in done}):
        print(f'\npretrained in {precision}')
        _table([r for r in done if r['precision'] == precision], titles, base)


def _table(done, titles, base):
    print('\n| row | n | kNN top-1 | difference (95 %) | linear top-1 | difference (95 %) | minutes a run |\n'
          '|---|---|---|---|---|---|---|')
    for row, title in titles.items():
        runs = [r for r in done if r['row'] == row]
        if not runs:
            continue
        cells = [title, str(len(runs))]
        for key in ('knn', 'linear'):
            values, others = (np.array([r[key] for r in done if r['row'] == name]) for name in (row, base))
            mean, difference = f'{values.mean():.2f}', ''
            if len(values) > 1:
                mean += f' ± {values.std(ddof=1):.2f}'
            if row != base and len(others):
                difference = f'{values.mean() - others.mean():+.2f}'
                if min(len(values), len(others)) > 1:
                    found = ttest_ind(values, others).confidence_interval()
                    difference += f' ({found.low:+.2f} to {found.high:+.2f})'
            cells += [mean, difference]
        seconds = [r['seconds'] for r in runs if r['seconds']]
        print('| ' + ' | '.join([*cells, f'{np.mean(seconds) / 60:.1f}' if seconds else '']) + ' |')
