"""IC-GAN's views (GenCL) with small random networks: features, conditions, the stage, what can go wrong."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import Fail  # noqa: E402
from conftest import picture, small_gan  # noqa: E402
from data import open_beton  # noqa: E402
from generators import ICGAN  # noqa: E402
from models import build_backbone  # noqa: E402
from sources import source_dataset  # noqa: E402
from test_gan import ICGAN as SIZES, biggan_state  # noqa: E402
from test_gen_views import generate, stored  # noqa: E402

N, D, UNREADABLE = 9, 256, 4
NOISE = {'extractor': '', 'truncation': 0.0, 'label': None}
CPU = torch.device('cpu')
DATASET = {'name': 'folder', 'split': 'train', 'download': False, 'subset': None}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Published files of 64 px and extractors of width 8, all with random weights; images in three folders, one
    damaged."""
    root = tmp_path_factory.mktemp('icgan')
    for name, classes in (('G_ema_best0.pth', 0), ('cc.pth', 128)):
        torch.save(biggan_state(4, **SIZES[64], condition=32 + classes, feature=(32, D)), root / name)
    torch.manual_seed(0)
    state = build_backbone('resnet50', width=8).state_dict()
    swav = {f'module.{name}': value for name, value in state.items()}
    torch.save(swav | {f'module.{name}.weight': torch.zeros(2, 2) for name in ('projection_head.0', 'prototypes')},
               root / 'swav.pth.tar')
    torch.save(state | {'fc.weight': torch.zeros(5, D), 'fc.bias': torch.zeros(5)}, root / 'supervised.pth')
    torch.save(build_backbone('resnet50', width=16).state_dict(), root / 'wide.pth')
    for i in range(N):
        (root / f'images/{i % 3}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 30, 24 + i)).save(root / f'images/{i % 3}/{i:03d}.png')
    (root / f'images/{UNREADABLE % 3}/{UNREADABLE:03d}.png').write_bytes(b'not an image')
    return root


def settings(files, tmp_path, **generator):
    noise = {'extractor': str(files / 'swav.pth.tar'), **generator.pop('noise', {})}
    return {'output': str(tmp_path / 'views'), 'dataset': {'name': 'folder', 'root': str(files / 'images')},
            'strategy': 'constant', 'noise_level': 0, 'view_size': 64, 'view_format': 'png', 'beton_mode': 'raw',
            'batch_size': 4, 'chunk_size': 4, 'device': 'cpu',
            'generator': {'kind': 'icgan', 'model': str(files / 'G_ema_best0.pth'), 'condition': 'pipeline',
                          'noise': noise, **generator}}


def rows(n=3, width=D):
    return np.random.default_rng(3).normal(size=(n, width)).astype(np.float32), [0] * n, list(range(5, 5 + n))


def network(files, name='G_ema_best0.pth', **noise):
    return ICGAN({'model': str(files / name), 'condition': 'stored', 'noise': {**NOISE, **noise}}, CPU)


def test_features_are_those_of_the_original_code(files):
    """Centre crop, resize to the GAN's 64 px, normalisation and bicubic resize of ic_gan at 8eff2f7 (make_hdf5.py and
    data_utils/utils.py): these numbers; ours differed by 5e-7 at most, also at 128 and 256 px."""
    spec = {'model': str(files / 'G_ema_best0.pth'), 'condition': 'pipeline',
            'noise': {**NOISE, 'extractor': str(files / 'swav.pth.tar')}}
    generator, seen = ICGAN(spec, CPU), []
    generator.extractor.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    features = generator.embed([Image.fromarray(picture(5, 40, 48)), Image.fromarray(picture(6, 90, 70))])
    pixels = seen[0][:1]
    assert features.shape == (2, D) and features.dtype == np.float32 and pixels.shape == (1, 3, 224, 224)
    found = [pixels[place].item() for place in ((0, 0, 0, 0), (0, 1, 100, 57), (0, 2, 223, 111), (0, 0, 30, 200))]
    assert found == pytest.approx([1.1782, .59102, -.60173, -.42102], abs=1e-4)
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((-.009857, 1.108987), abs=1e-5)


def test_a_view_is_the_networks_image_of_its_own_seed_and_row(files):
    generator, (features, levels, seeds) = network(files), rows()
    views = generator.views(features, levels, seeds)
    assert views.shape == (3, 64, 64, 3) and views.dtype == np.uint8 and generator.embedding_dim == D
    z = torch.stack([torch.randn(120, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    image = generator.network(z, F.normalize(torch.from_numpy(features)))
    assert (views == np.floor((image.permute(0, 2, 3, 1).numpy() * .5 + .5) * 255)).all()
    for k in range(3):  # rounding may depend on the batch: one level
        alone = generator.views(7 * features[k:k + 1], levels[:1], seeds[k:k + 1])
        assert np.abs(alone[0].astype(int) - views[k]).max() <= 1
    assert np.abs(generator.views(features, levels, [8, 9, 10]).astype(int) - views).mean() > 2
    assert np.abs(generator.views(features[[1, 0, 2]], levels, seeds).astype(int)[0] - views[0]).mean() > .2


def test_truncation_bounds_the_latent_and_leaves_its_scale(files):
    """The demo's truncnorm.rvs(-2 t, 2 t), of standard deviation 0.707 for t = 0.7."""
    draw = torch.Generator().manual_seed(0)
    for truncation, bound, std in ((0.7, 1.4, 0.7072), (0.0, 9, 1.0)):
        generator = network(files, truncation=truncation)
        z = torch.stack([generator._latent(draw) for _ in range(200)])
        assert z.shape == (200, 120) and z.abs().max() <= bound and z.std().item() == pytest.approx(std, abs=0.01)
    assert z.abs().max() > 3


def test_classes_change_the_view(files):
    generator, (features, levels, seeds) = network(files, 'cc.pth'), rows()
    one, other = (generator.views(features, levels, seeds, np.array(labels)).astype(int)
                  for labels in ([3, 3, 3], [3, 4, 999]))
    assert generator.classes == 1000 and (one[0] == other[0]).all() and (one[1:] != other[1:]).mean() > .3


def test_noise_levels_of_an_embedded_one(tmp_path):
    """GenView eq. 5 with diffusers' own scheduler, of the standardised feature; then the square root of alpha_bar."""
    from diffusers import DDPMScheduler
    from safetensors.torch import load_file, save_file
    folder = small_gan(tmp_path / 'gan', feature=7, levels=True)
    weights = load_file(folder / 'model.safetensors')
    weights |= {'feature_mean': torch.randn(6), 'feature_std': torch.rand(6) + .5}
    save_file(weights, folder / 'model.safetensors')
    generator, (features, _, seeds) = network(tmp_path, 'gan'), rows(3, 6)
    assert (generator.embedding_dim, generator.levels, generator.side) == (6, True, 32)
    levels, noise = torch.tensor([0, 200, 999]), torch.randn(3, 6)
    schedule = DDPMScheduler(beta_schedule='squaredcos_cap_v2')
    scaled = (torch.from_numpy(features) - weights['feature_mean']) / weights['feature_std']
    expected = torch.cat([schedule.add_noise(scaled, noise, levels), schedule.alphas_cumprod[levels, None].sqrt()], 1)
    torch.testing.assert_close(generator.condition(torch.from_numpy(features), levels, noise), expected)
    calm, noisy = (generator.views(features, [level] * 3, seeds).astype(int) for level in (0, 900))
    assert calm.shape == (3, 32, 32, 3) and (calm != noisy).mean() > .1


def test_stage_writes_pairs_that_depend_on_seed_and_index_alone(files, tmp_path):
    """With nothing of stage 1."""
    folder = generate(settings(files, tmp_path), tmp_path)
    views, records = stored(folder)
    numbers = [i for i in range(N) if records[i].get('error')]
    assert len(numbers) == 1 and records[numbers[0]]['path'].endswith(f'{UNREADABLE:03d}.png')
    assert sorted(views) == sorted(set(range(N)) - {*numbers}) and views[0].shape == (64, 64, 3)
    assert {record['noise_level'] for record in records.values()} == {0}
    assert open_beton(folder / 'pairs.beton')['with_view'] == N - 1
    known = json.loads((folder / 'settings.json').read_text())
    assert known['generator'].keys() == {'kind', 'model', 'condition', 'noise'} and len(known['weights']) == 2
    other = stored(generate(settings(files, tmp_path), tmp_path, output=str(tmp_path / 'b'), batch_size=3))[0]
    seeded = stored(generate(settings(files, tmp_path), tmp_path, output=str(tmp_path / 'c'), seed=1))[0]
    for i in views:
        assert np.abs(views[i].astype(int) - other[i]).max() <= 1
        assert np.abs(views[i].astype(int) - seeded[i]).mean() > 2
    generate(settings(files, tmp_path), tmp_path)  # complete
    with pytest.raises(Fail, match='made with other settings: generator.noise.truncation'):
        generate(settings(files, tmp_path, noise={'truncation': 0.7}), tmp_path)


def test_stage_with_levels_and_embeddings_of_stage_1(files, tmp_path):
    small_gan(tmp_path / 'gan', feature=7, levels=True)
    levels = np.array([(0, 200, 400)[i % 3] if i != UNREADABLE else -1 for i in range(N)], np.int16)
    np.savez(tmp_path / 'fg_proportion.npz', noise_level=levels)
    np.save(tmp_path / 'embeddings.npy', rows(N, 6)[0].astype(np.float16))
    changes = dict(proportions=str(tmp_path), strategy='adaptive')
    experiment = settings(files, tmp_path, model=str(tmp_path / 'gan'), condition='stored')
    records = stored(generate(experiment, tmp_path, **changes))[1]
    assert [records[i]['noise_level'] for i in range(N)] == levels.tolist()
    with pytest.raises(Fail, match=f'embeddings have 6 dimensions, .*G_ema_best0.pth wants {D}; run fg_proportion.py'):
        generate(settings(files, tmp_path, condition='stored'), tmp_path, proportions=str(tmp_path),
                 output=str(tmp_path / 'other'))


def test_labels_of_the_images_or_one_for_all(files, tmp_path):
    supervised = {'extractor': str(files / 'supervised.pth')}
    made = [stored(generate(settings(files, tmp_path, model=str(files / 'cc.pth'), noise=supervised | {'label': label}),
                            tmp_path, output=str(tmp_path / f'{label}')))[0] for label in (0, 1)]
    assert np.mean([(made[0][i] != made[1][i]).mean() for i in made[0]]) > .3
    small_gan(tmp_path / 'gan', feature=D, classes=[3, 4])
    gan = str(tmp_path / 'gan')
    of_class = [stored(generate(settings(files, tmp_path, model=gan, noise={'label': label}), tmp_path,
                                output=str(tmp_path / f'own{label}')))[0] for label in (None, 0, 1, 2)]
    labels = source_dataset({**DATASET, 'root': str(files / 'images')}).labels
    for i in of_class[0]:
        assert (of_class[0][i] == of_class[1 + labels[i]][i]).all()
        assert (of_class[0][i] != of_class[1 + (labels[i] + 1) % 3][i]).any()


@pytest.mark.parametrize('changes, message', [
    ({'strategy': 'adaptive'}, 'strategy: adaptive needs .* set strategy to constant .noise_level to 0'),
    ({'noise_level': 200}, 'strategy: .*G_ema_best0.pth knows no noise levels; set strategy to constant, noise_level'),
    ({'generator.condition': 'stored'}, 'proportions: must name a folder'),
    ({'generator.noise.extractor': ''}, 'generator.noise.extractor: must name a file'),
    ({'generator.noise.extractor': 'wide.pth'}, 'wide.pth: .* gives 512 features, .*G_ema_best0.pth wants 256; give'),
    ({'generator.noise.extractor': 'supervised.pth'}, "is not SwAV's .* no classes: .* swav_800ep_pretrain.pth.tar"),
    ({'generator.model': 'cc.pth'}, "is SwAV's ResNet-50, and .*cc.pth has classes: .* torchvision's supervised"),
    ({'generator.noise.label': 0}, 'generator.noise.label: 0, but .*G_ema_best0.pth has 0 classes; set it to null'),
    ({'generator.model': 'cc.pth', 'generator.noise.extractor': 'supervised.pth', 'generator.noise.label': 1000},
     'generator.noise.label: 1000, but .* has 1000 classes; set it to 0 to 999'),
    ({'generator.model': 'cc.pth', 'generator.noise.extractor': 'supervised.pth'},
     'generator.noise.label: .*cc.pth has 1000 classes, the dataset 3'),
    ({'generator.model': 'supervised.pth'}, 'supervised.pth: is not the state dict of an IC-GAN generator'),
    ({'generator.model': 'nowhere.pth'}, 'nowhere.pth: no such checkpoint'),
    ({'generator.noise.truncation': -1.0}, 'generator.noise.truncation: -1.0 must be')])
def test_bad_input_is_one_line_before_the_first_view(files, tmp_path, changes, message):
    experiment = settings(files, tmp_path)
    for key, value in changes.items():
        *blocks, key = key.split('.')
        place = experiment
        for block in blocks:
            place = place[block]
        place[key] = str(files / value) if str(value).endswith('.pth') else value
    with pytest.raises(Fail, match=message) as error:
        generate(experiment, tmp_path)
    assert '\n' not in str(error.value) and not (tmp_path / 'views/settings.json').exists()


def test_a_view_that_is_not_finite_costs_one_view(files):
    generator, (features, levels, seeds) = network(files), rows()
    features[1] = np.nan
    views = generator.views(features, levels, seeds)
    assert not views[1].any() and views[0].any() and views[2].any()
