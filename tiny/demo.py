"""make demo: the five stages on 4,000 images of CIFAR-10 with the embedded models, and a summary of what came out.

    .venv/bin/python tiny/demo.py

Runs the same commands a user would type (they are printed); results stay in runs/demo, and a second call goes on where
the first one stopped.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUN = Path('runs/demo')
STAGES = [
    ('foreground proportions', 'fg_proportion.py', 'yamls/fg_proportion/demo.yaml'),
    ('synthetic views', 'gen_views.py', 'yamls/gen_views/demo.yaml'),
    ('test set', 'gen_views.py', 'yamls/gen_views/demo_test.yaml'),
    ('pretraining', 'pretrain.py', 'yamls/pretrain/demo.yaml'),
    ('evaluation', 'linear_eval.py', 'yamls/linear_eval/demo.yaml', f'output={RUN}/linear_eval'),
    ('evaluation, untrained', 'linear_eval.py', 'yamls/linear_eval/demo.yaml',
     f'checkpoint={RUN}/pretrain/backbone_init.pt', f'output={RUN}/linear_eval_untrained'),
]


def main():
    seconds = {}
    for title, *command in STAGES:
        print(f"\n=== {title}: python {' '.join(command)}", flush=True)
        start = time.time()
        if code := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(f'demo: {command[0]} ended with exit code {code}; its message stands above')
        seconds[title] = time.time() - start

    here = ROOT / RUN
    levels = np.load(here / 'fg/fg_proportion.npz')['noise_level']
    trained, untrained = (json.loads((here / folder / 'results.json').read_text())
                          for folder in ('linear_eval', 'linear_eval_untrained'))
    print('\n' + '=' * 80)
    print('GenView on 4,000 images of CIFAR-10 (10 classes: guessing is right for 10 %)\n')
    print('  seconds   ' + ', '.join(f'{t} {s:.0f}' for t, s in seconds.items()) + f'; in all {sum(seconds.values()):.0f}')
    print('  levels    ' + ', '.join(f'{n} images at noise level {level}' for level, n in
                                     zip(*np.unique(levels, return_counts=True))))
    print(f"  pictures  {RUN}/views/pairs.png      images (above) and what the generator made of them (below)\n"
          f"            {RUN}/fg/foreground.png    what counts as foreground\n"
          f"            {RUN}/pretrain/loss.png    the loss curve")
    print('\n  accuracy on 2,000 test images        nearest neighbours   linear probe')
    for name, result in (('encoder as initialised', untrained), ('after pretraining without labels', trained)):
        print(f"    {name:<34} {result['knn']['top1']:>10.1f} %  {result['linear']['top1']:>12.1f} %")
    print('\nA small encoder, few images, few epochs, one seed: this shows that the chain works, not how good the method\n'
          'is. README.md tells how to run the full protocol and your own images.')


if __name__ == '__main__':
    main()
