"""make demo: the stages on 2,500 images of CIFAR-10 with the embedded models, with and without generated views.

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
PRETRAIN, EVALUATE = ('pretrain.py', 'yamls/pretrain/demo.yaml'), ('linear_eval.py', 'yamls/linear_eval/demo.yaml')
STAGES = [
    ('foreground proportions', 'fg_proportion.py', 'yamls/fg_proportion/demo.yaml'),
    ('quality component', 'fg_proportion.py', 'yamls/fg_proportion/demo_quality.yaml'),
    ('synthetic views', 'gen_views.py', 'yamls/gen_views/demo.yaml'),
    ('test set', 'gen_views.py', 'yamls/gen_views/demo_test.yaml'),
    ('baseline', *PRETRAIN, 'data.alpha=0', 'quality.enabled=false', f'output={RUN}/baseline'),
    ('GenView', *PRETRAIN, f'output={RUN}/genview'),
    ('evaluation', *EVALUATE, f'checkpoint={RUN}/baseline/backbone_init.pt', f'output={RUN}/untrained_eval'),
    ('evaluation', *EVALUATE, f'checkpoint={RUN}/baseline/backbone.pt', f'output={RUN}/baseline_eval'),
    ('evaluation', *EVALUATE, f'checkpoint={RUN}/genview/backbone.pt', f'output={RUN}/genview_eval'),
]


def main():
    seconds = {}
    for title, *command in STAGES:
        print(f"\n=== {title}: python {' '.join(command)}", flush=True)
        start = time.time()
        if code := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(f'demo: {command[0]} ended with exit code {code}; its message stands above')
        seconds[title] = seconds.get(title, 0) + time.time() - start

    here = ROOT / RUN
    levels = np.load(here / 'fg/fg_proportion.npz')['noise_level']
    print('\n' + '=' * 80)
    print('GenView on 2,500 images of CIFAR-10 (10 classes: guessing is right for 10 %)\n')
    print('  seconds   ' + ', '.join(f'{t} {s:.0f}' for t, s in seconds.items())
          + f'; in all {sum(seconds.values()):.0f}')
    print('  levels    ' + ', '.join(f'{n} images at noise level {level}' for level, n in
                                     zip(*np.unique(levels, return_counts=True))))
    print(f"  pictures  {RUN}/views/pairs.png      images (above) and what the generator made of them (below)\n"
          f"            {RUN}/fg/foreground.png    what counts as foreground\n"
          f"            {RUN}/genview/loss.png     the loss curve")
    print('\n  accuracy on 5,000 test images                   nearest neighbours   linear probe')
    for name, folder in (('encoder as initialised', 'untrained_eval'),
                         ('pretrained on two crops of each image', 'baseline_eval'),
                         ('pretrained on image and generated view', 'genview_eval')):
        result = json.loads((here / folder / 'results.json').read_text())
        print(f"    {name:<45} {result['knn']['top1']:>10.1f} %  {result['linear']['top1']:>12.1f} %")
    print('\nA small encoder, few images, few epochs, one seed: differences of one or two points between the last two\n'
          'lines are chance. docs/effect.md says what larger runs have shown and how to make them;\n'
          'README.md tells how to run the full protocol and your own images.')


if __name__ == '__main__':
    main()
