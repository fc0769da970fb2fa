"""What a start takes: a mistake in the YAML is answered before torch is imported, and slow packages wait."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import linear_eval  # noqa: E402
import models  # noqa: E402
import pretrain  # noqa: E402
import train_walker  # noqa: E402
import view_eval  # noqa: E402

STAGES = ('fg_proportion', 'gen_views', 'pretrain', 'linear_eval', 'semi_eval', 'detect_eval', 'view_eval',
          'train_walker', 'train_discriminator')


def python(code):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize('stage', STAGES)
def test_a_mistake_is_answered_before_torch_is_there(stage):
    example = sorted((ROOT / 'yamls' / stage).glob('*.yaml'))[0]
    for change, answer in (('sed=1', "unknown key 'sed'"), ('seed=-1', 'seed: -1 must be a whole number')):
        run = python(f'import runpy, sys; sys.argv = ["{stage}.py", {str(example)!r}, {change!r}]\n'
                     f'try:\n    runpy.run_path("{stage}.py", run_name="__main__")\n'
                     'finally:\n    print("torch" in sys.modules)')
        assert run.returncode == 2 and answer in run.stderr and run.stderr.count('\n') == 1
        assert run.stdout == 'False\n'


def test_no_stage_imports_what_is_slow_and_may_not_be_needed():
    run = python(f'import sys, {", ".join(STAGES)}\n'
                 'print([n for n in ("timm", "torchmetrics", "diffusers") if n in sys.modules])')
    assert run.stdout == '[]\n', run.stderr


def test_what_pretraining_accepts_is_what_there_is():
    assert list(pretrain.BLOCKS) == list(models.METHODS)
    assert pretrain.ALLOWED['arch'] == [*models.BLOCKS, *models.VITS]
    assert pretrain.ALLOWED['optimizer.name'] == list(pretrain.OPTIMIZERS)
    assert linear_eval.ALLOWED['optimizer'] == list(linear_eval.OPTIMIZERS)
    assert set(train_walker.ALLOWED['normalization']) == set(train_walker.NORMALIZATIONS)
    assert view_eval.ALLOWED['size'][0] == view_eval.SMALLEST
    assert [name for name, method in models.METHODS.items() if not method.sync_bn] == ['mocov2']
