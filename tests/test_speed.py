"""What is computed in another way than written, because it is faster, has the numbers of what is written; and the
benchmarks of the training step run to their last line."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402
from loss import vicreg  # noqa: E402


@pytest.mark.parametrize('samples, dim', [(6, 12), (6, 11), (5, 64)])
def test_covariance_of_vicreg_over_rows_and_over_columns(samples, dim):
    """Both ways against the formula in float64: from D = 2 N on the products of the rows stand for those of columns."""
    torch.manual_seed(0)
    views = [torch.randn(samples, dim, requires_grad=True) for _ in range(2)]
    _, variance, covariance = vicreg(*views)
    (variance + covariance).backward()
    copies = [view.detach().double().requires_grad_() for view in views]
    expected = [sum(torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2 for z in copies),
                sum((torch.cov(z.T) * (1 - torch.eye(dim, dtype=z.dtype))).square().sum() / dim for z in copies)]
    sum(expected).backward()
    for got, value in zip((variance, covariance), expected):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-6)
    for view, copy in zip(views, copies):
        torch.testing.assert_close(view.grad.double(), copy.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_sgd_in_one_kernel_is_sgd(momentum):
    """Channels last, a parameter that learns from the second step on, and a state that goes from one to the other."""
    torch.manual_seed(0)
    start = [torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(5), torch.randn(7, 2)]
    sets = [[nn.Parameter(value.clone()) for value in start] for _ in range(2)]
    settings = dict(lr=0.1, momentum=momentum)
    optimizers = [build([{'params': parameters, 'weight_decay': 0.01}], **settings)
                  for build, parameters in zip((pretrain.sgd, torch.optim.SGD), sets)]
    for step in range(4):
        gradients = [torch.randn_like(value) for value in start]
        for parameters, optimizer in zip(sets, optimizers):
            for k, (parameter, gradient) in enumerate(zip(parameters, gradients)):
                parameter.grad = gradient.clone() if step or k < 2 else None
            optimizer.step()
        for ours, plain in zip(*sets):
            torch.testing.assert_close(ours, plain)
    old = torch.optim.SGD(sets[1], **settings).state_dict()  # of a run before the first step, without momenta
    optimizer = pretrain.sgd([{'params': sets[0]}], **settings)
    optimizer.load_state_dict(old)
    optimizer.step()


def test_memory_is_kept():
    """The same block again costs no page faults, once there is room for it."""
    code = ('import resource, torch; from common import keep_memory; keep_memory()\n'
            'def faults():\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
            '    torch.ones(10_000_000)\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
            'print(*[faults() for _ in range(20)])')
    found = list(map(int, subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                                         check=True).stdout.split()))
    assert sum(found[10:]) < max(found)  # without it each takes as many


def test_step_benchmark():
    output = subprocess.run([sys.executable, 'benchmarks/step.py', 'methods=mocov2,swav', 'rounds=1', 'batch=4',
                             'crops=1', 'size=14'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert [row['method'] for row in result['rows']] == ['mocov2', 'swav']
    assert all(row['limit'][0] == pytest.approx(row['bare'] / row['ours'], rel=0.02) for row in result['rows'])
    if result['ratio']:                                  # lightly is there
        assert result['ratio'] == pytest.approx(min(row['lightly'] / row['ours'] for row in result['rows']), rel=0.02)


def test_quality_benchmark():
    output = subprocess.run([sys.executable, 'benchmarks/quality.py', 'rounds=1', 'batch=4', 'steps=1',
                             'variants=channels_last'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert list(result['ms']) == ['without', 'encoder alone', 'as it is', 'channels_last']
    assert result['ratio'] == pytest.approx(result['ms']['without'] / result['ms']['as it is'], rel=0.02)
    assert 0 < result['limit'] and result['cost'] == pytest.approx(1 / result['ratio'], rel=0.02)
