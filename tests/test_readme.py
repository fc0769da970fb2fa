"""The README's commands for a folder of images, run to the letter on a drawn one."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent


def draw_folder(root):
    """Light discs and dark bars on noise: 40 images of each for training, 10 to measure on, no two of one size."""
    for part, count in (('train', 40), ('val', 10)):
        for kind in ('disc', 'bar'):
            (root / part / kind).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([i, count, kind == 'bar'])
                image = Image.fromarray(rng.integers(90, 150, (48 + i, 64, 3), dtype=np.uint8))
                x, y = rng.integers(4, 24, 2).tolist()
                if kind == 'disc':
                    ImageDraw.Draw(image).ellipse((x, y, x + 28, y + 28), fill=(230, 220, 200))
                else:
                    ImageDraw.Draw(image).rectangle((x, y, x + 10, y + 40), fill=(20, 30, 60))
                image.save(root / part / kind / f'{i}.jpg')


def test_commands_for_a_folder_of_images(tmp_path):
    text = (ROOT / 'README.md').read_text()
    commands = re.findall(r'^    (python \S+\.py +yamls/\w+/folder_small\w*\.yaml.*)$', text, re.MULTILINE)
    assert len(commands) == 6
    for name in (*(p.name for p in ROOT.glob('*.py')), 'yamls', 'tiny'):
        (tmp_path / name).symlink_to(ROOT / name)
    draw_folder(tmp_path / 'data/images')
    environment = {**os.environ, 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        command += ' epochs=3' * ('pretrain.py' in command)  # of 20
        run = subprocess.run(['bash', '-c', command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f'{command}\n{run.stdout}\n{run.stderr}'
    result = json.loads((tmp_path / 'runs/folder_small/eval/results.json').read_text())
    assert (result['train_images'], result['test_images'], result['classes'], result['image_size']) == (80, 20, 2, 32)
    assert result['linear']['top1'] >= 80 and result['knn']['top1'] >= 80  # guessing: 50
    for picture in ('fg/foreground.png', 'views/pairs.png', 'pretrain/loss.png'):
        assert (tmp_path / 'runs/folder_small' / picture).stat().st_size > 10_000
