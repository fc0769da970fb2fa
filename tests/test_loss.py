"""loss.py against slow references, its edge cases, and two processes against one."""
import doctest
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import loss  # noqa: E402
from loss import foreground_map, info_nce, pair_quality, quality_weights  # noqa: E402


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_doctests():
    assert doctest.testmod(loss).failed == 0
    assert all('>>>' in f.__doc__ for f in (info_nce, foreground_map, pair_quality, quality_weights))


def test_imports_torch_only():
    code = ('import sys, torch; before = set(sys.modules); import loss; '
            'print([m for m in set(sys.modules) - before if m.split(".")[0] not in ("torch", "loss")])')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout == '[]\n'


# ---------------------------------------------------------------------------------------------------
# info_nce

def test_info_nce_equals_slow_reference():
    query, positive, queue = unit(5, 7), unit(5, 7, seed=1), unit(11, 7, seed=2)
    got = info_nce(query, positive, queue, 0.2)
    q, p, n = (t.double().numpy() for t in (query, positive, queue))
    for i in range(5):
        similar = np.exp(q[i] @ p[i] / 0.2)
        others = sum(np.exp(q[i] @ n[k] / 0.2) for k in range(11))
        assert got[i].item() == pytest.approx(-np.log(similar / (similar + others)), abs=1e-5)


def test_info_nce_gradient_reaches_query_and_positive_and_survives_an_enqueue():
    query, positive, queue = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_(), unit(6, 4, seed=2)
    value = info_nce(query, positive, queue, 0.5).sum()
    queue[:3] = 0  # what MoCo does before backward
    value.backward()
    other, negatives = query.detach().clone().requires_grad_(), unit(6, 4, seed=2)
    logits = torch.cat([(other * positive.detach()).sum(1, keepdim=True), other @ negatives.T], 1) / 0.5
    torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction='sum').backward()
    torch.testing.assert_close(query.grad, other.grad)
    assert positive.grad.abs().sum() > 0


def test_info_nce_is_float32_under_autocast():
    query, positive, queue = unit(4, 64), unit(4, 64, seed=1), unit(32, 64, seed=2)
    expected = info_nce(query, positive, queue, 0.07)
    with torch.autocast('cpu', torch.bfloat16):
        got = info_nce(query, positive, queue, 0.07)
        halved = query @ queue.T
    assert halved.dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_info_nce_extreme_logits_and_zero_vectors_are_finite():
    query = unit(2, 4)
    assert torch.isfinite(info_nce(query, -query, query.repeat(3, 1), 1e-3)).all()
    zero = torch.zeros(2, 4)
    torch.testing.assert_close(info_nce(zero, zero, torch.zeros(3, 4), 0.2), torch.full((2,), float(np.log(4))))


# ---------------------------------------------------------------------------------------------------
# foreground_map, pair_quality

def numpy_quality(features_1, features_2, pc):
    """Eq. 10-12, image by image."""
    values = []
    for pair in zip(features_1.double().numpy(), features_2.double().numpy()):
        pooled = []
        for tokens in pair:
            rows = tokens.reshape(len(tokens), -1).T            # (H*W, K)
            projection = rows @ pc.double().numpy()
            attention = (projection - projection.min()) / (projection.max() - projection.min())
            pooled.append([sum(a * row for a, row in zip(m, rows)) for m in (attention, 1 - attention)])
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*pooled)]
        values.append(cosine[0] - cosine[1])
    return np.array(values)


def test_foreground_map_equals_numpy():
    features, pc = torch.randn(3, 6, 4, 5), torch.randn(6)
    got = foreground_map(features, pc)
    projection = np.einsum('bkhw,k->bhw', features.double().numpy(), pc.double().numpy())
    low, high = projection.min((1, 2), keepdims=True), projection.max((1, 2), keepdims=True)
    np.testing.assert_allclose(got, (projection - low) / (high - low), atol=1e-5)
    assert got.shape == (3, 4, 5) and got.amin() == 0 and got.amax() == 1
    torch.testing.assert_close(foreground_map(features, pc[:, None]), got)               # (K, 1), as published
    torch.testing.assert_close(foreground_map(features, pc, torch.randn(6)), got, atol=1e-5, rtol=0)  # the mean drops


def test_foreground_map_of_equal_tokens_is_half():
    token = torch.randn(2, 640, 1, 1).expand(2, 640, 7, 7)
    assert (foreground_map(token, torch.randn(640)) == 0.5).all()
    assert (foreground_map(torch.zeros(1, 8, 3, 3), torch.randn(8)) == 0.5).all()


def test_pair_quality_equals_numpy():
    pc = torch.randn(8)
    features_1, features_2 = torch.randn(4, 8, 5, 5) + 1, torch.randn(4, 8, 3, 4) + 1     # maps may differ in size
    np.testing.assert_allclose(pair_quality(features_1, features_2, pc), numpy_quality(features_1, features_2, pc),
                               atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        got = pair_quality(features_1, features_2, pc)
    np.testing.assert_allclose(got, numpy_quality(features_1, features_2, pc), atol=1e-5)


def scene(subject, background, K=6):
    """(1, K, 4, 4): `subject` in the middle, `background` around it; feature 0 says which is the subject."""
    features = torch.zeros(1, K, 4, 4)
    features[:, background] = 1
    features[:, :, 1:3, 1:3] = 0
    features[:, 0, 1:3, 1:3] = 2
    features[:, subject, 1:3, 1:3] = 2
    return features


def test_same_subject_before_another_background_weighs_most():
    pc = torch.zeros(6)
    pc[0] = 1
    source = scene(subject=1, background=3)
    views = {'same subject, new background': scene(1, 4), 'the same picture': scene(1, 3),
             'new subject, new background': scene(2, 4), 'new subject, same background': scene(2, 3)}
    quality = torch.cat([pair_quality(source, view, pc) for view in views.values()])
    weights = quality_weights(quality)
    order = [list(views)[i] for i in weights.argsort(descending=True)]
    assert order[0] == 'same subject, new background' and order[-1] == 'new subject, same background'
    assert quality[0] == pytest.approx(1) and quality[3] == pytest.approx(-0.5)
    # with the component turned round the subject counts as background, and the order falls
    assert pair_quality(source, views['same subject, new background'], -pc) == pytest.approx(-1)


def test_pair_quality_of_zeros_and_constants_is_finite():
    features, zero, constant = torch.randn(1, 4, 3, 3), torch.zeros(1, 4, 3, 3), torch.ones(1, 4, 3, 3)
    for first, second in ((zero, zero), (zero, features), (constant, constant), (constant, features)):
        assert torch.isfinite(pair_quality(first, second, torch.randn(4))).all()
    assert pair_quality(constant, constant, torch.ones(4)) == 0
    assert torch.isfinite(pair_quality(features, features, torch.zeros(4))).all()


# ---------------------------------------------------------------------------------------------------
# quality_weights

def test_weights_are_a_softmax_with_mean_one_and_without_gradient():
    quality = torch.randn(9, requires_grad=True)
    for temperature in (1.0, 0.3):
        weights = quality_weights(quality, temperature)
        torch.testing.assert_close(weights, torch.softmax(quality.detach() / temperature, 0) * 9)
        assert weights.mean().item() == pytest.approx(1) and not weights.requires_grad
    assert torch.isfinite(quality_weights(torch.tensor([1000.0, -1000.0]))).all()
    assert quality_weights(torch.zeros(1)) == 1


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from loss import info_nce, quality_weights
generator = torch.Generator().manual_seed(0)
x, positive, queue = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (8, 8, 10))
quality = torch.randn(8, generator=generator)
rank = None
if len(sys.argv) > 3:
    dist.init_process_group('gloo')
    rank = dist.get_rank()
result = {}
for name, cut in {'even': 4, 'uneven': 3}.items():
    mine = slice(None) if rank is None else slice(cut) if rank == 0 else slice(cut, None)
    projector = torch.ones(6, 6).triu().requires_grad_()
    weights = quality_weights(quality[mine], 0.7)
    (weights * info_nce(x[mine] @ projector, positive[mine], queue, 0.2)).mean().backward()
    result[name] = {'weights': weights, 'gradient': projector.grad}
torch.save(result, f'{sys.argv[2]}.{rank or 0}')
"""


def test_two_processes_equal_one(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    for name, launcher in (('one', []), ('two', ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'])):
        job = subprocess.run([sys.executable, *launcher, tmp_path / 'worker.py', ROOT, tmp_path / name,
                              *(['distributed'] if launcher else [])], capture_output=True, text=True, timeout=300,
                             env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
        assert job.returncode == 0, job.stderr
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ('one.0', 'two.0', 'two.1'))
    for name in ('even', 'uneven'):
        torch.testing.assert_close(torch.cat([first[name]['weights'], second[name]['weights']]), one[name]['weights'])
    halves = (first['even']['gradient'] + second['even']['gradient']) / 2
    torch.testing.assert_close(halves, one['even']['gradient'])
    assert one['even']['gradient'].abs().sum() > 0
