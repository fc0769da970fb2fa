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
from loss import (foreground_map, info_nce, info_nce_batch, negative_cosine, nnclr, nt_xent,  # noqa: E402
                  pair_quality, quality_weights, sinkhorn, sup_con, swapped_prediction, vicreg)


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_doctests():
    assert doctest.testmod(loss).failed == 0
    functions = [f for f in vars(loss).values() if getattr(f, '__module__', '') == 'loss' and f.__name__[0] != '_']
    assert len(functions) == 12 and all('>>>' in f.__doc__ for f in functions)


def test_imports_torch_only():
    code = ('import sys, torch; before = set(sys.modules); import loss; '
            'print([m for m in set(sys.modules) - before if m.split(".")[0] not in ("torch", "loss")])')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout == '[]\n'


# ---------------------------------------------------------------------------------------------------
# info_nce

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
    centred = features - torch.randn(1, 6, 1, 1)
    torch.testing.assert_close(foreground_map(centred, pc), got, atol=1e-5, rtol=0)      # the mean drops out


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


# ---------------------------------------------------------------------------------------------------
# Every loss against a slow reference in double precision, with its gradient

LABELS = torch.tensor([3, 1, 3, 3, 0, 1])


def slow_info_nce_rows(q, k, T):
    e = torch.exp
    return [-(e(q[i] @ k[i] / T) / sum(e(q[i] @ k[j] / T) for j in range(len(k)))).log() for i in range(len(q))]


def slow_sup_con(z1, z2, labels, T):
    rows, labels = [*z1, *z2], [*labels.tolist()] * 2
    anchors = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        total = sum(torch.exp(rows[i] @ rows[j] / T) for j in others)
        positives = [j for j in others if labels[j] == labels[i]]
        anchors.append(sum(-(torch.exp(rows[i] @ rows[j] / T) / total).log() for j in positives) / len(positives))
    return [(a + b) / 2 for a, b in zip(anchors, anchors[len(z1):])]


def slow_mixed(z1, z2, T, share, partner):
    rows, n, anchors = [*z1, *z2], len(z1), []
    for i in range(2 * n):
        own = i, (i + n) % (2 * n)
        negatives = [rows[j] if partner[j] in own else share * rows[j] + (1 - share) * rows[partner[j]]
                     for j in range(2 * n) if j not in own]
        positive = torch.exp(rows[i] @ rows[own[1]] / T)
        anchors.append(-(positive / (positive + sum(torch.exp(rows[i] @ row / T) for row in negatives))).log())
    return [(a + b) / 2 for a, b in zip(anchors, anchors[n:])]


def partners(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(4))


def slow_sinkhorn(scores, epsilon, iterations=3):
    """The official code: multiplications, on the transpose."""
    Q = torch.exp(scores.detach().double() / epsilon).T.clone()
    Q /= Q.sum()
    for _ in range(iterations):
        for k in range(len(Q)):
            Q[k] /= Q[k].sum() * len(Q)
        for b in range(Q.shape[1]):
            Q[:, b] /= Q[:, b].sum() * Q.shape[1]
    return (Q * Q.shape[1]).T


def slow_vicreg(z1, z2):
    N, D = z1.shape
    variance = covariance = 0
    for z in (z1, z2):
        c = [[z[n, i] - sum(z[:, i]) / N for n in range(N)] for i in range(D)]
        cov = [[sum(a * b for a, b in zip(c[i], c[j])) / (N - 1) for j in range(D)] for i in range(D)]
        variance = variance + sum(max(0 * z[0, 0], 1 - (cov[i][i] + 1e-4) ** 0.5) for i in range(D)) / D / 2
        covariance = covariance + sum(cov[i][j] ** 2 for i in range(D) for j in range(D) if i != j) / D
    # three numbers of three kinds in one list: weighed apart, so that a factor on one of them shows
    return [*(sum((a - b) ** 2 for a, b in zip(x, y)) / D for x, y in zip(z1, z2)), 3 * variance, 5 * covariance]


def fast_vicreg(z1, z2):
    invariance, variance, covariance = vicreg(z1, z2)
    return torch.cat([invariance, 3 * variance[None], 5 * covariance[None]])


QUEUE = unit(11, 7, seed=9)
LOSSES = {                                               # name: (ours, slow, with temperature T)
    'info_nce': (lambda x, y, T: info_nce(x, y, QUEUE.to(x.device), T), lambda x, y, T: [
        -(torch.exp(a @ b / T) / (torch.exp(a @ b / T) + sum(torch.exp(a @ n / T) for n in QUEUE.double()))).log()
        for a, b in zip(x, y)]),
    'info_nce_batch': (info_nce_batch, lambda x, y, T: slow_info_nce_rows(x, y.detach(), T)),
    'nnclr': (lambda x, y, T: nnclr(x, y, QUEUE, T), lambda x, y, T: slow_info_nce_rows(
        torch.stack([min(QUEUE.double(), key=lambda row: (row - a).norm()) for a in x.detach()]), y, T)),
    'nt_xent': (nt_xent, lambda x, y, T: slow_sup_con(x, y, torch.arange(len(x)), T)),
    'nt_xent_mixed': (lambda x, y, T: nt_xent(x, y, T, (0.3, partners(2 * len(x)))),
                      lambda x, y, T: slow_mixed(x, y, T, 0.3, partners(2 * len(x)).tolist())),
    'sup_con': (lambda x, y, T: sup_con(x, y, LABELS[:len(x)], T),
                lambda x, y, T: slow_sup_con(x, y, LABELS[:len(x)], T)),
    'negative_cosine': (lambda x, y, T: negative_cosine(3 * x, 2 * y), lambda x, y, T: [
        -(a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(x, y.detach())]),
    'swapped_prediction': (lambda x, y, T: swapped_prediction(x, sinkhorn(y, 0.1), T), lambda x, y, T: [
        -sum(c[k] * (torch.exp(a[k] / T) / sum(torch.exp(s / T) for s in a)).log() for k in range(len(a)))
        for a, c in zip(x, slow_sinkhorn(y, 0.1))]),
    'vicreg': (lambda x, y, T: fast_vicreg(2 * x, 2 * y), lambda x, y, T: slow_vicreg(2 * x, 2 * y))}


def value_and_gradient(function, x, y, T, factor, autocast=False):
    """The losses, and the gradients at x and y of their sum with the factors."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = function(x, y, T)
    losses = torch.stack(losses) if isinstance(losses, list) else losses
    (losses * factor[:len(losses)]).sum().backward()
    return losses.detach(), *(torch.zeros_like(z) if z.grad is None else z.grad for z in (x, y))


@pytest.mark.parametrize('name', LOSSES)
def test_equals_slow_reference(name):
    ours, slow = LOSSES[name]
    x, y, factor = unit(6, 7), unit(6, 7, seed=1), torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.5
    got = value_and_gradient(ours, x, y, 0.5, factor)
    want = value_and_gradient(slow, x.double(), y.double(), 0.5, factor.double())
    assert got[0].shape == ((8,) if name == 'vicreg' else (6,)) and got[0].dtype == torch.float32
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    one_sided = ('info_nce_batch', 'negative_cosine', 'swapped_prediction')
    assert (got[1].abs().sum() > 0.1) == (name != 'nnclr') and (got[2].abs().sum() > 0.1) == (name not in one_sided)
    for a, b in zip(value_and_gradient(ours, x, y, 0.5, factor, autocast=True), got):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('name', LOSSES)
def test_hard_input_gives_finite_loss_and_gradient(name):
    ours = LOSSES[name][0]
    x, y, ones = unit(6, 7), unit(6, 7, seed=1), torch.ones(8)
    same, zero = unit(1, 7).repeat(6, 1), torch.zeros(6, 7)
    for case, (a, b) in {'plain': (x, y), 'opposite': (x, -x), 'two samples': (x[:2], y[:2]), 'identical': (same, same),
                         'zero': (zero, zero), 'one branch zero': (x, zero), 'other branch zero': (zero, y)}.items():
        for T in (0.01, 1.0):
            for dtype in (torch.float32, torch.bfloat16):
                losses, *gradients = value_and_gradient(ours, a.to(dtype), b.to(dtype), T, ones)
                assert losses.dtype == torch.float32 and losses.isfinite().all(), (case, T, dtype)
                assert all(g.dtype == dtype and g.isfinite().all() for g in gradients), (case, T, dtype)


def test_sup_con_with_all_labels_different_is_nt_xent():
    z1, z2 = unit(6, 7), unit(6, 7, seed=1)
    torch.testing.assert_close(sup_con(z1, z2, torch.arange(6) * 7, 0.2), nt_xent(z1, z2, 0.2))
    assert not torch.allclose(sup_con(z1, z2, LABELS, 0.2), nt_xent(z1, z2, 0.2))


def test_sinkhorn_equals_the_official_code_and_shares_the_prototypes_out():
    scores = unit(40, 16) @ unit(16, 16, seed=1).T                                       # cosines, as in SwAV
    for epsilon, iterations in ((0.05, 3), (0.5, 1), (0.05, 10)):
        codes = sinkhorn(scores.clone().requires_grad_(), epsilon, iterations)
        torch.testing.assert_close(codes.double(), slow_sinkhorn(scores, epsilon, iterations), rtol=0, atol=1e-6)
        torch.testing.assert_close(codes.sum(1), torch.ones(40))
        assert not codes.requires_grad
    torch.testing.assert_close(sinkhorn(scores, iterations=200).sum(0), torch.full((16,), 40 / 16), rtol=1e-3, atol=0)


def test_sinkhorn_does_not_overflow_or_divide_zero_by_zero():
    far = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -0.999]])          # nobody is near the second
    for scores in (far, 1e4 * far, far + 1e6, torch.zeros(3, 5), torch.randn(8, 4) * 1e3):
        codes = sinkhorn(scores, epsilon=0.005)
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(1), torch.ones(len(codes)))
    assert not slow_sinkhorn(1e4 * far.float(), 0.005).isfinite().all()                  # the official code does
    assert sinkhorn(far.bfloat16()).dtype == torch.float32


def test_byol_is_two_plus_twice_the_negative_cosine():
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(2 + 2 * negative_cosine(p, z), (torch.nn.functional.normalize(p, dim=1)
                               - torch.nn.functional.normalize(z, dim=1)).square().sum(1))


# ---------------------------------------------------------------------------------------------------
# Two processes against one: every loss, with and without weights of the pairs. The worker runs with `distributed` on
# two processes that hold half the batch each, and without on one that holds all of it

WORKER = """
import atexit, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from loss import *
from torch.nn.functional import normalize
B, together = 8, len(sys.argv) > 3
if together:
    dist.init_process_group('gloo')
    atexit.register(dist.destroy_process_group)          # its threads would abort a process that ends before them
rank = dist.get_rank() if together else 0
generator = torch.Generator().manual_seed(0)
x, y, queue = (normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (B, B, 10))
quality, labels = torch.randn(B, generator=generator), torch.tensor([0, 1, 2, 0, 1, 1, 3, 0])
partners = lambda rows: torch.randperm(rows, generator=torch.Generator().manual_seed(1))


def both(loss):                                          # of the two directions, as the symmetric methods
    return lambda z1, z2, *more: (loss(z1, z2, *more) + loss(z2, z1, *more)) / 2


losses = {
    'info_nce': lambda z1, z2, mine: info_nce(z1, z2, queue, 0.2),
    'info_nce_batch': both(lambda z1, z2, mine: info_nce_batch(z1, z2, 0.2)),
    'nnclr': both(lambda z1, z2, mine: nnclr(z1, z2, queue, 0.2)),
    'nt_xent': lambda z1, z2, mine: nt_xent(z1, z2, 0.2),
    'nt_xent_mixed': lambda z1, z2, mine: nt_xent(z1, z2, 0.2, (0.3, partners(2 * len(z1) * (1 + together)))),
    'sup_con': lambda z1, z2, mine: sup_con(z1, z2, labels[mine], 0.2),
    'negative_cosine': both(lambda z1, z2, mine: negative_cosine(z1, z2)),
    'swapped_prediction': both(lambda z1, z2, mine: swapped_prediction(z1, sinkhorn(z2), 0.2)),
    'invariance': lambda z1, z2, mine: vicreg(z1, z2)[0],
    'variance': lambda z1, z2, mine: vicreg(z1, z2)[1].expand(len(z1)),
    'covariance': lambda z1, z2, mine: vicreg(z1, z2)[2].expand(len(z1))}


def measure(loss, weighted, mine, wrap=lambda model: model):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    wrapped = wrap(model)
    z1, z2 = normalize(wrapped(torch.cat([x[mine], y[mine]])), dim=1).chunk(2)
    values = loss(z1, z2, mine)
    (values * (quality_weights(quality[mine]) if weighted else 1)).mean().backward()
    return {'loss': values.detach().clone(), 'gradient': torch.cat([model.weight.grad.flatten(), model.bias.grad])}


half = slice(rank * B // 2, (rank + 1) * B // 2)
cases = [(f'{name}{" weighted" * weighted}', loss, weighted) for name, loss in losses.items() for weighted in (0, 1)]
if together:
    ddp = torch.nn.parallel.DistributedDataParallel
    result = {case: measure(loss, weighted, half, ddp) for case, loss, weighted in cases}
else:
    result = {case: measure(loss, weighted, slice(None)) for case, loss, weighted in cases}
    result |= {f'half {case}': measure(loss, weighted, half) for case, loss, weighted in cases}
for name, cut in {'even': 4, 'uneven': 3}.items():
    mine = slice(None) if not together else slice(cut) if rank == 0 else slice(cut, None)
    result[name] = {'weights': quality_weights(quality[mine], 0.7)}
torch.save(result, f'{sys.argv[2]}.{rank}')
"""


def test_two_processes_equal_one(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    for name, launcher in (('one', []), ('two', ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'])):
        job = subprocess.run([sys.executable, *launcher, tmp_path / 'worker.py', ROOT, tmp_path / name,
                              *(['distributed'] if launcher else [])], capture_output=True, text=True, timeout=900,
                             env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
        assert job.returncode == 0, job.stderr
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ('one.0', 'two.0', 'two.1'))
    for name in ('even', 'uneven'):
        torch.testing.assert_close(torch.cat([first[name]['weights'], second[name]['weights']]), one[name]['weights'])
    close = dict(rtol=1e-5, atol=1e-6)
    blind = {'info_nce', 'negative_cosine', 'invariance'}                                # look at their own rows alone
    cases = [c for c in first if c not in ('even', 'uneven')]
    assert len(cases) == 22
    for case in cases:
        torch.testing.assert_close(torch.cat([first[case]['loss'], second[case]['loss']]), one[case]['loss'], **close)
        assert one[case]['gradient'].abs().sum() > 1e-3, case
        for process in (first, second):                                                  # DDP has averaged already
            torch.testing.assert_close(process[case]['gradient'], one[case]['gradient'], **close)
        alone = one[f'half {case}']['loss']                                              # without the other process
        assert torch.allclose(alone, first[case]['loss'], **close) == (case.split()[0] in blind), case
