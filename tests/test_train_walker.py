"""Stage 2b: walkers that learn, with a small BigGAN of random weights."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import latents  # noqa: E402
import train_walker  # noqa: E402
from common import Processes  # noqa: E402
from config import Fail, default_config  # noqa: E402
from conftest import small_gan  # noqa: E402
from latents import Steering, load_walker  # noqa: E402
from loss import nt_xent  # noqa: E402
from test_latents import WIDTH, spec  # noqa: E402
from train_walker import Estimator, Game, edited  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_gan(tmp_path_factory.mktemp('gan'))


def config(folder, tmp_path, **changes):
    found = default_config(train_walker.DEFAULTS)
    found['latent'].update({k: v for k, v in spec(folder).items() if k in found['latent']})
    found['estimator'].update(width=8, stem='cifar', lr=1e-3)
    found.update({**dict(output=str(tmp_path / 'run'), chunks='1-5', lr=1e-2, image_size=24, batch_size=16,
                         samples=16 * 8, log_every=2, save_every=3), **changes})
    return found


def lines(folder):
    return [line for line in map(json.loads, (folder / 'log.jsonl').read_text().splitlines()) if 'loss' in line]


def test_one_step_is_the_papers(folder, tmp_path):
    """COP-Gen's code: the estimator steps down its loss, then the walker up that of the stepped estimator, both with
    Adam of betas 0.5 and 0.999, whose first step has the size of the learning rate wherever there is a gradient."""
    torch.manual_seed(0)
    settings = config(folder, tmp_path)
    game, indices = Game(settings, Processes('cpu')), np.arange(16)
    z = game.generator.anchors(0, indices)
    images = [game.generator.images(code) for code in (
        game.generator.code(z), game.generator.moved(z, {(1, 5): game.walker(z[:, WIDTH:])}))]
    before = {name: [p.detach().clone() for p in getattr(game, name).parameters()] for name in ('walker', 'estimator')}

    def loss():
        from augment import parameters
        from online import augment
        views = [augment(255 * x, game.recipe, torch.from_numpy(parameters(0, 0, indices, k, game.recipe, 32, 32)))
                 for k, x in enumerate(images)]
        return nt_xent(*game.estimator(torch.cat(views)).chunk(2), 0.1).mean()

    start = loss()
    estimator_gradient = torch.autograd.grad(start, list(game.estimator.parameters()))
    reported = game.step(indices)
    assert reported == pytest.approx(start.item(), rel=1e-5)
    for p, old, g in zip(game.estimator.parameters(), before['estimator'], estimator_gradient):
        some = g.abs() > 1e-4
        assert torch.allclose((p - old)[some], -1e-3 * g.sign()[some], atol=2e-5)
    walker = game.walker
    moved = [(p - old) for p, old in zip(walker.parameters(), before['walker'])]
    for p, old in zip(walker.parameters(), before['walker']):
        p.data.copy_(old)
    images[1] = game.generator.images(game.generator.moved(z, {(1, 5): walker(z[:, WIDTH:])}))
    for step, g in zip(moved, torch.autograd.grad(loss(), list(walker.parameters()))):
        some = g.abs() > 1e-4
        assert some.any() and torch.allclose(step[some], 1e-2 * g.sign()[some], atol=2e-4)  # up
    assert not any(p.requires_grad for p in game.generator.hierarchy.network.parameters())


def test_walker_makes_it_hard_and_the_estimator_finds_it(folder, tmp_path):
    """Against an estimator that stands still the loss rises; without a walker's step it falls."""
    losses = {}
    for name, walker, estimator in (('walker', 3e-2, 1e-12), ('estimator', 1e-12, 3e-3)):
        settings = config(folder, tmp_path, samples=16 * 40, log_every=10, output=str(tmp_path / name), lr=walker)
        settings['estimator']['lr'] = estimator
        settings['view'].update(crop_scale=None, jitter_prob=0.0, gray_prob=0.0)
        train_walker.main(settings)
        losses[name] = [line['loss'] for line in lines(tmp_path / name)]
        figures = lines(tmp_path / name)[-1]
        assert (figures['move_length'] > 1.3 * lines(tmp_path / name)[0]['move_length']) == (name == 'walker')
    assert losses['walker'][-1] > losses['walker'][0] + 0.1
    assert losses['estimator'][-1] < losses['estimator'][0] - 0.1


def test_resumed_run_is_the_undisturbed_one(folder, tmp_path, monkeypatch):
    settings = config(folder, tmp_path, monte_carlo=50, grid_every=64)
    train_walker.main(settings)
    whole = load_walker(tmp_path / 'run/walker.pt').state_dict()
    again, step, count = {**settings, 'output': str(tmp_path / 'again')}, Game.step, []

    def killed(game, indices):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return step(game, indices)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Game, 'step', killed)
        train_walker.main(again)
    train_walker.main(again)
    found = load_walker(tmp_path / 'again/walker.pt').state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    logged = [{line['step']: line['loss'] for line in lines(tmp_path / name)} for name in ('run', 'again')]
    assert logged[0] == logged[1]                        # the stop rule looks at these
    assert len(count) == 6 and len(lines(tmp_path / 'again')) == len(logged[0]) + 1   # one step was made twice, no more
    untrained = load_walker(tmp_path / 'run/untrained.pt').state_dict()
    assert not any(torch.equal(whole[name], untrained[name]) for name in whole)
    pictures = {p.name for p in (tmp_path / 'run').glob('pairs*')}
    assert pictures == {'pairs.png', 'pairs_00000064.png', 'pairs_00000128.png'}
    last = lines(tmp_path / 'run')[-1]
    assert last['published_loss'] == pytest.approx(last['loss'] * 0.1 / 0.07)

    table = json.loads((tmp_path / 'run/distances.json').read_text())
    game = Game(settings, Processes('cpu'))
    game.walker.load_state_dict(whole)
    z = game.generator.anchors(0, range(50))
    shift = game.walker(z[:, WIDTH:]).view(50, 5, WIDTH).norm(dim=2)
    assert table['anchors'] == 50 and list(table['chunks']) == ['1', '2', '3', '4', '5']
    for k in range(5):
        assert table['chunks'][str(k + 1)]['mean'] == pytest.approx(shift[:, k].mean().item(), rel=1e-4)
        assert table['chunks'][str(k + 1)]['median'] == pytest.approx(np.median(shift[:, k].detach()), rel=1e-4)


def test_weights_of_another_generator(folder, tmp_path, monkeypatch):
    settings = config(folder, tmp_path, samples=16)
    train_walker.main(settings)
    monkeypatch.setattr(train_walker, 'weights_checksum', lambda path: 1)
    with pytest.raises(Fail, match='checkpoint.pt: was made with other weights than'):
        train_walker.main({**settings, 'samples': 32})
    monkeypatch.setattr(latents, 'weights_checksum', lambda path: 1)
    moves = {'1-5': dict(std=0.0, truncation=2.0, walker=str(tmp_path / 'run/walker.pt'))}
    with pytest.raises(Fail, match='chunks.1-5: .*walker.pt was trained on other weights than'):
        latents.Moves(moves, Game(settings, Processes('cpu')).generator)


def test_two_processes_learn_what_one_does(folder, tmp_path):
    """Negatives, batch norm and both gradients are those of the global batch."""
    settings = {name: config(folder, tmp_path, output=str(tmp_path / name), log_every=1, samples=16 * 2)
                for name in ('one', 'two')}
    train_walker.main(settings['one'])
    (tmp_path / 'two.yaml').write_text(yaml.safe_dump(settings['two']))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                          'train_walker.py', str(tmp_path / 'two.yaml')], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=900)
    assert run.returncode == 0, run.stderr
    one, two = ([line['loss'] for line in lines(tmp_path / name)] for name in ('one', 'two'))
    assert len(one) == 2 and np.allclose(one, two, rtol=1e-3)
    first, other = (torch.load(tmp_path / f'{name}/checkpoint.pt', weights_only=True)['walker'] for name in
                    ('one', 'two'))
    start = load_walker(tmp_path / 'one/untrained.pt').state_dict()
    for name in first:  # rounding turns the sign of small gradients, by which Adam steps: alike, not equal
        moved, also = first[name] - start[name], other[name] - start[name]
        assert torch.nn.functional.cosine_similarity(moved.flatten(), also.flatten(), dim=0) > 0.9


def test_stops_when_the_loss_is_back(folder, tmp_path, monkeypatch, capsys):
    """Not while it has never been below, nor before stop_after."""
    course = [3.0, 0.9, 0.5, 0.9, 0.7, 0.8, 0.9, 0.9]
    for name, changes, steps in (('a', {}, 4), ('b', {'stop_after': 16 * 6}, 6), ('c', {'stop_loss': 0.4}, 8)):
        given = iter(course)
        monkeypatch.setattr(Game, 'step', lambda game, indices: torch.tensor(next(given)))
        settings = config(folder, tmp_path, output=str(tmp_path / name), log_every=1,
                          **{**dict(stop_loss=0.735), **changes})
        train_walker.main(settings)
        assert lines(tmp_path / name)[-1]['step'] == steps
        assert ('the loss is back at 0.735 nats' in capsys.readouterr().out) == (name != 'c')
    stopped = config(folder, tmp_path, output=str(tmp_path / 'a'), log_every=1, stop_loss=0.735, monte_carlo=20)
    train_walker.main(stopped)                           # a finished run measures, and does not go on
    with pytest.raises(Fail, match='stop_loss .was 0.735, now 0.9'):
        train_walker.main({**stopped, 'stop_loss': 0.9})
    with pytest.raises(Fail, match='samples: .*checkpoint.pt has seen 64 already'):
        train_walker.main({**stopped, 'samples': 32})
    assert lines(tmp_path / 'a')[-1]['step'] == 4 and (tmp_path / 'a/distances.json').is_file()


def test_steering_learns_its_edits(folder, tmp_path):
    """Directions of colour: what they do to the image comes nearer to adding it."""
    settings = config(folder, tmp_path, walker='steering', chunks='0-5', samples=16 * 60, log_every=20)
    train_walker.main(settings)
    losses = [line['loss'] for line in lines(tmp_path / 'run')]
    assert losses[-1] < losses[0]
    found = load_walker(tmp_path / 'run/walker.pt')
    assert isinstance(found, Steering) and found.width == 6 * WIDTH


def test_edits_do_what_they_say():
    y, x = torch.meshgrid(torch.arange(65.), torch.arange(65.), indexing='ij')
    spot = (2 * torch.exp(-((x - 42) ** 2 + (y - 32) ** 2) / 9) - 1).expand(1, 3, -1, -1)  # 10 right of the centre

    def edit(**sliders):
        values = torch.zeros(1, 8)
        for name, value in sliders.items():
            values[0, Steering.EDITS.index(name)] = value
        image, mask = edited(spot, values)
        weight = (image[0, 0] * mask[0, 0] + mask[0, 0]).clamp(min=0)
        return [((weight * at).sum() / weight.sum() - 32).item() for at in (x, y)], image, mask

    where, image, mask = edit()
    assert where == pytest.approx([10, 0], abs=0.2) and mask.mean() > 0.9 and (image - spot).abs().max() < 1e-4
    assert edit(zoom=np.log(0.5))[0] == pytest.approx([20, 0], abs=0.3)     # GenRep: below 1 a crop is enlarged
    small, _, mask = edit(zoom=np.log(2))
    assert small == pytest.approx([5, 0], abs=0.2) and 0.2 < mask.mean() < 0.26
    turned = edit(rotation=1)[0]                         # 30 degrees against the clock: up, where y is less
    assert turned == pytest.approx([8.66, -5], abs=0.2)
    whole = 100 / 256 * 65
    assert edit(shift_x=-0.2, shift_y=0.1)[0] == pytest.approx([10 - 0.2 * whole, 0.1 * whole], abs=0.3)
    _, image, _ = edit(green=0.25)
    assert torch.allclose(image - spot, torch.tensor([0, 0.25, 0]).view(1, 3, 1, 1).expand_as(spot), atol=1e-4)
    for turn in (1, -1):                                 # by 60 degrees, seen from the diagonal; shifted by 12 of 256
        expected = (10 * 0.5 - turn * 12 / 256 * 65) / (1 + turn * np.sin(np.pi / 3) * 10 / 32.5 / 8 ** 0.5)
        assert edit(rotation_3d=turn)[0] == pytest.approx([expected, 0], abs=0.15)


def test_estimator_is_as_published():
    estimator = Estimator('resnet18', 'imagenet', 64, 512, 128, ((0.5,) * 3, (0.5,) * 3))
    counts = [sum(p.numel() for p in part.parameters()) for part in (estimator.backbone, estimator.head)]
    assert counts == [11_176_512, 512 * 512 + 512 + 512 * 128 + 128]
    rows = estimator(torch.rand(4, 3, 64, 64) * 255)
    assert rows.shape == (4, 128) and torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize('changes, message', [
    ({'chunks': ''}, 'chunks: must name a range'),
    ({'chunks': '2-6'}, "'2-6' is no chunk or range of chunks from 0 to 5"),
    ({'walker': 'learnt'}, "walker: 'learnt' is none of .*did you mean 'learned'"),
    ({'batch_size': 1}, 'batch_size: 1 must be'), ({'latent': {'model': ''}}, 'latent.model: must name a file')])
def test_wrong_settings_are_one_line(folder, tmp_path, changes, message):
    settings = config(folder, tmp_path)
    settings['latent'].update(changes.pop('latent', {}))
    with pytest.raises(Fail, match=message):
        train_walker.main({**settings, **changes})
    assert not (tmp_path / 'run').exists()


def test_diverging_loss_is_one_line(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Fail, match='step 2: the loss or the walker is not finite'):
        patch.setattr(Game, 'step', lambda game, indices: torch.tensor(torch.nan))
        train_walker.main(config(folder, tmp_path))
    assert not (tmp_path / 'run/walker.pt').exists() and not (tmp_path / 'run/checkpoint.pt').exists()
    settings = config(folder, tmp_path, samples=0, output=str(tmp_path / 'none'))
    train_walker.main(settings)                          # the papers' control: a walker that was not trained
    one, other = (load_walker(tmp_path / f'none/{name}.pt').state_dict() for name in ('walker', 'untrained'))
    assert all(torch.equal(one[name], other[name]) for name in one)
