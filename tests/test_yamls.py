"""The experiments that ship: every YAML loads, passes the checks of its stage and builds, its inputs are made by other
YAMLs, and it holds what the papers print. The tables below were typed in from the papers, not from the YAMLs."""
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from timm.optim import Lars
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import detect_eval  # noqa: E402
import fg_proportion  # noqa: E402
import gen_views  # noqa: E402
import linear_eval  # noqa: E402
import pretrain  # noqa: E402
import semi_eval  # noqa: E402
import train_discriminator  # noqa: E402
import train_walker  # noqa: E402
import view_eval  # noqa: E402
from checkpoints import NORMALIZATIONS, normalization  # noqa: E402
from config import flat as flat_keys  # noqa: E402
from config import load_config  # noqa: E402

STAGES = {module.__name__: module for module in (fg_proportion, gen_views, pretrain, linear_eval, semi_eval,
                                                 detect_eval, view_eval, train_walker, train_discriminator)}
FILES = sorted((path.parent.name, path.stem) for path in (ROOT / 'yamls').glob('*/*.yaml'))
NO_ROW = {'cifar10_icgan', 'cifar10_maskgit', 'demo', 'demo_quality', 'demo_test', 'effect', 'effect_quality',
          'effect_train', 'folder', 'folder_quality', 'folder_small', 'folder_small_quality', 'folder_small_test',
          'folder_test', 'latent_effect', 'sanity'}  # not of a paper
PRETRAIN = [name for stage, name in FILES if stage == 'pretrain']


def path(stage, name):
    return ROOT / 'yamls' / stage / f'{name}.yaml'


@functools.cache
def config(stage, name):
    return load_config(STAGES[stage].DEFAULTS, [str(path(stage, name))])


@functools.cache
def flat(name):
    return flat_keys(config('pretrain', name))


@functools.cache
def build(name):
    with torch.device('meta'):
        model = pretrain.build_model(config('pretrain', name), steps_per_epoch=100)
    return model, pretrain.build_optimizer(model, config('pretrain', name))


# ---------------------------------------------------------------------------------------------------------------------
# GenView's tables

TABLE_9 = {  # optimizer, learning rate, weight decay, momentum, batch size, loss, epochs, backbone, embedding and
             # projection dimension
    'in1k_mocov2':       ('SGD',   0.03,   1e-4, 0.9,  256,  'NCE', 200, 'resnet50',  2048, 128),
    'in1k_swav':         ('LARS',  0.6,    1e-4, 0.9,  256,  'KL',  200, 'resnet50',  2048, 128),
    'in1k_simsiam':      ('SGD',   0.05,   1e-4, 0.9,  256,  'COS', 200, 'resnet50',  2048, 2048),
    'in1k_byol':         ('LARS',  4.8,    1e-6, 0.9,  4096, 'COS', 200, 'resnet50',  2048, 256),
    'in1k_mocov3_100ep': ('LARS',  9.6,    1e-6, 0.9,  4096, 'NCE', 100, 'resnet50',  2048, 256),
    'in1k_mocov3_300ep': ('LARS',  4.8,    1e-6, 0.9,  4096, 'NCE', 300, 'resnet50',  2048, 256),
    'in1k_mocov3_vits':  ('AdamW', 2.4e-3, 0.1,  None, 4096, 'NCE', 300, 'vit_small', 384,  256),
    'in1k_mocov3_vitb':  ('AdamW', 2.4e-3, 0.1,  None, 4096, 'NCE', 300, 'vit_base',  768,  256)}
FIFTY = ('LARS', 1.2, 1e-6, 0.9, 512, 'NCE', 50, 'resnet50', 2048, 256)     # appendix A for Table 4; 1.2/512 in Table 9
IN100 = ('LARS', 1.2, 1e-6, 0.9, 512, 'NCE', 100, 'resnet18', 512, 256)     # section 4.2, for Tables 6 and 7
SMALL = {'cifar10':  (32, 500, 512, 0.99, 4096),    # appendix A for Table 5: image size, epochs, batch size, momentum
         'cifar100': (32, 500, 512, 0.99, 4096),    # of the momentum encoder, memory buffer
         'tinyin':   (64, 200, 256, 0.996, 16384)}
TABLE_1 = {'in1k_mocov2': '67.5 70.0', 'in1k_swav': '70.5 71.7', 'in1k_simsiam': '70.0 72.2', 'in1k_byol': '71.8 73.2',
           'in1k_mocov3_100ep': '68.9 72.7', 'in1k_mocov3_300ep': '72.8 74.8', 'in1k_mocov3_vits': '73.2 74.5',
           'in1k_mocov3_vitb': '76.7 77.8'}         # without, with GenView
TABLE_4 = {'alpha000': '62.39 84.57', 'laion': '63.31 85.53', 'in21k': '64.10 85.86', 'synthetic': '63.36 85.14',
           'framework150k': '65.62 87.25'}          # top-1, top-5
TABLE_5 = {'cifar10': '93.00 93.56', 'cifar100': '67.49 67.53', 'tinyin': '56.76 54.79'}    # MoCov2, BYOL + GenView
TABLE_6 = {('', '', ''): ('65.52', 'baseline'), ('', '', 'quality'): ('66.97', 'quality'),
           ('ours', '', ''): ('71.50', 'constant200'), ('ours', 'adaptive', ''): ('73.96', 'adaptive'),
           ('ours', '', 'quality'): ('74.88', 'constant200_quality'),
           ('ours', 'adaptive', 'quality'): ('75.40', 'genview')}
TABLE_7 = {'CS(0)': '71.80', 'CS(100)': '72.14', 'CS(200)': '71.50', 'CS(300)': '71.76', 'CS(400)': '72.08',
           'RS': '72.96', 'AS': '73.96'}
TABLE_8 = {0: '62.39 84.57', 0.1: '65.86 87.10', 0.3: '68.38 89.02', 0.5: '69.04 89.29', 0.8: '69.47 89.49',
           1.0: '70.55 90.34'}                      # top-1, top-5


def table_7_file(column):
    return {'RS': 'random', 'AS': 'adaptive'}.get(column) or f"constant{int(column.strip('CS()')):03}"


# ---------------------------------------------------------------------------------------------------------------------
# GenCL's tables: linear top-1, top-5

GENCL_1 = {  # name: (row, numbers, keys of view_1 and view_2 that are VICReg's: the others do nothing); gamma 100%
    'none': ('Generative', '54.4 78.4', set()), 'crop': ('Crop + Generative', '62.8 84.0', {'crop_scale'}),
    'flip': ('Flip + Generative', '57.4 80.5', {'flip'}),
    'solarization': ('Solarization + Generative', '55.8 79.7', {'solarize_prob'}),
    'jitter': ('Color Jitter + Generative', '55.7 79.3', {'jitter', 'jitter_prob'}),
    'blur': ('Gaussian Blur + Generative', '54.2 78.3', {'blur_prob'}),
    'greyscale': ('Greyscale + Generative', '52.7 77.3', {'gray_prob'})}
GENCL_4 = {'icgan': '21.13 0.21 19.82 116M', 'maskgit': '3.70 0.32 98.93 227M'}  # FID, SSIM, ms, parameters
GENCL_GAMMA = {  # name: (table, {gamma in percent: numbers})
    'icgan': ('Table 2', {25: '66.3 87.0', 50: '65.9 86.7', 75: '65.3 86.1', 100: '64.0 85.0'}),
    'maskgit': ('Table 3', {25: '67.9 87.9', 50: '68.5 88.3', 75: '68.5 88.4', 100: '67.5 87.5'})}


# ---------------------------------------------------------------------------------------------------------------------
# COP-Gen's and hierarchical-latent's tables. A move: {chunks: (standard deviation, truncation) or walker's experiment}

COPGEN_1 = {  # name: (move of the pairs, IN-1K linear top-1, top-5); 1.3M anchors, 100 epochs
    'none': ({}, '41.63 66.57'), 'none_nnclr': ({}, '42.46 66.46'), 'none_infomin': ({}, '42.83 67.52'),
    'none_negft': ({}, '43.26 67.21'), 'gaussian': ({'0-5': (0.2, 2)}, '48.73 73.13'),
    'steering': ({'0-5': 'bigbigan_steering'}, '51.19 74.97'), 'learned': ({'0-5': 'bigbigan_copgen'}, '53.25 77.16')}
ALL, NO_COLOUR, NO_CROP, NOTHING = 'all', 'no colour', 'no crop', 'nothing'
COPGEN_130K = {  # name: (table, move, T_x, IN-100 linear top-1); 130K anchors, 200 epochs
    'none': ('Table 3', {}, ALL, '58.26'), 'gaussian': ('Table 3', {'0-5': (0.2, 2)}, ALL, '62.62'),
    'steering': ('Table 3', {'0-5': 'bigbigan_steering'}, ALL, '63.08'),
    'learned': ('Table 3', {'0-5': 'bigbigan_copgen'}, ALL, '63.96'),
    'gaussian_notx': ('Table 3', {'0-5': (0.2, 2)}, NOTHING, '28.90'),
    'steering_notx': ('Table 3', {'0-5': 'bigbigan_steering'}, NOTHING, '28.68'),
    'learned_notx': ('Table 3', {'0-5': 'bigbigan_copgen'}, NOTHING, '37.40'),
    'table4_nocolour': ('Table 4', {'0-5': 'bigbigan_copgen_nocolour'}, NO_COLOUR, '55.26'),
    'table4_nocrop': ('Table 4', {'0-5': 'bigbigan_copgen_nocrop'}, NO_CROP, '43.84'),
    'table4_notx': ('Table 4', {'0-5': 'bigbigan_copgen_notx'}, NOTHING, '36.16'),
    '400k': ('Table 5', {'0-5': 'bigbigan_copgen_400k'}, ALL, '64.12'),
    '600k': ('Table 5', {'0-5': 'bigbigan_copgen_600k'}, ALL, '63.56'),
    'linear': ('Table 5', {'0-5': 'bigbigan_copgen_linear'}, ALL, '61.18')}
HL_2 = {  # name: (move, T_x, with discriminator, linear top-1, top-5); 100 epochs
    'simclr_hlrandom': ({'1-5': (1, 2)}, NO_COLOUR, False, '53.7 77.2'),
    'simclr_hllearned': ({'1-5': 'bigbigan_hl_1_5'}, NO_COLOUR, False, '54.4 77.9'),
    'simsiam_synth': ({}, ALL, False, '32.2 56.5'), 'simsiam_random': ({'0-5': (0.05, 2)}, ALL, False, '33.4 57.7'),
    'simsiam_hlrandom': ({'1-5': (1, 2)}, NO_COLOUR, False, '42.5 67.7'),
    'simsiam_hlrandom_d': ({'1-5': (1, 2)}, NO_COLOUR, True, '43.6 68.6'),
    'simsiam_learned': ({'0-5': 'bigbigan_hl_0_5'}, ALL, False, '33.0 58.2'),
    'simsiam_hllearned': ({'1-5': 'bigbigan_hl_1_5'}, NO_COLOUR, False, '39.5 64.8'),
    'simsiam_hllearned_d': ({'1-5': 'bigbigan_hl_1_5'}, NO_COLOUR, True, '40.6 65.7')}
HL_3 = {  # name: (move, T_x, Stanford Cars top-1); StyleGAN2, 100 epochs
    'synth': ({}, ALL, '27.0 +- 0.2'), 'random': ({'0-3': (0.15, 0.9)}, ALL, '29.2 +- 0.4'),
    'hlrandom': ({'0': (0.3, 1), '2': (0.8, 1), '3': (0.8, 1)}, NO_COLOUR, '47.0 +- 0.3'),
    'hlrandom_code': ({'0': (0.2, 1), '1': (0.1, 1), '2': (0.8, 1), '3': (0.8, 1)}, NO_COLOUR, '47.0 +- 0.3'),
    'learned': ({'0-3': 'lsuncars_hl_0_3'}, ALL, '28.6 +- 0.5'),
    'hllearned': ({'0': 'lsuncars_hl_0', '2': 'lsuncars_hl_2', '3': 'lsuncars_hl_3'}, NO_COLOUR, '35.2 +- 0.4')}
WALKERS = {  # name: (chunks, samples, batch size, learning rate of the walker, of the estimator, start, T_x)
    **{f'bigbigan_copgen{suffix}': ('0-5', samples, 176, 1e-5, 3e-5, 'default', views) for suffix, samples, views in (
        ('', 200_000, ALL), ('_400k', 400_000, ALL), ('_600k', 600_000, ALL), ('_linear', 200_000, ALL),
        ('_nocolour', 200_000, NO_COLOUR), ('_nocrop', 200_000, NO_CROP), ('_notx', 200_000, NOTHING))},
    'bigbigan_steering': ('0-5', 160_000, 32, 1e-3, None, None, None),
    **{f'bigbigan_hl_{k}': (str(k), 1000 * samples, 64, 8e-5, 5e-5, 'small', NOTHING)
       for k, samples in enumerate((30, 96, 180, 214, 276, 2260))},
    'bigbigan_hl_0_5': ('0-5', 60_000, 64, 1e-5, 3e-5, 'small', NOTHING),
    'bigbigan_hl_1_5': ('1-5', 120_000, 64, 1e-5, 3e-5, 'small', NOTHING),
    'lsuncars_hl_0_3': ('0-3', 32_000, 64, 1e-5, 3e-5, 'small', NOTHING),
    **{f'lsuncars_hl_{k}': (str(k), 1000 * samples, 64, 8e-5, 5e-5, 'small', NOTHING)
       for k, samples in ((0, 12), (2, 18), (3, 65))}}

ROWS = [  # paper, table, file, numbers of its first line: every pretraining row of the papers that is ours to train
    *(('GenView', 'Table 1', f'{name}_{kind}', [number]) for name, numbers in TABLE_1.items()
      for kind, number in zip(('baseline', 'genview'), numbers.split())),
    *(('GenView', 'Table 4', f'in1k_mocov3_{what}', numbers.split()) for what, numbers in TABLE_4.items()),
    *(('GenView', 'Table 5', f'{dataset}_{method}_genview', [number]) for dataset, numbers in TABLE_5.items()
      for method, number in zip(('mocov2', 'byol'), numbers.split())),
    *(('GenView', 'Table 5', f'{dataset}_{method}_baseline', ['no number in the paper']) for dataset in TABLE_5
      for method in ('mocov2', 'byol')),
    *(('GenView', 'Table 6', f'in100_mocov3_{what}', [number]) for number, what in TABLE_6.values()),
    *(('GenView', 'Table 7', f'in100_mocov3_{table_7_file(column)}', [f'"{column}"', number])
      for column, number in TABLE_7.items()),
    *(('GenView', 'Table 8', f'in1k_mocov3_alpha{round(100 * alpha):03}', [f'alpha {alpha}', *numbers.split()])
      for alpha, numbers in TABLE_8.items()),
    ('GenCL', 'Tables 2 and 3', 'in1k_vicreg_gencl', ['65.8', '86.6']),
    *(('GenCL', 'Table 1', f'in1k_vicreg_gencl_pairwise_{name}', [f'"{row}"', *numbers.split()])
      for name, (row, numbers, _) in GENCL_1.items()),
    *(('GenCL', table, f'in1k_vicreg_gencl_{name}{gamma:03}', [f'gamma {gamma}%', *numbers.split()])
      for name, (table, rows) in GENCL_GAMMA.items() for gamma, numbers in rows.items()),
    ('COP-Gen', 'Table 1', 'in1k_simclr_copgen', ['49.44', '75.58']),
    ('COP-Gen', 'Table 1', 'in1k_simclr_negft_copgen', ['"Neg FT"', '50.82', '75.09']),
    ('COP-Gen', 'Table 1', 'in1k_simclr_infomin_copgen', ['"InfoMin aug"', '50.93', '75.87']),
    ('COP-Gen', 'Table 1', 'in1k_nnclr_copgen', ['"NNCLR"', '51.97', '76.80']),
    ('Hierarchical-latent', 'Table 2', 'in1k_simsiam_hl', ['49.1', '74.2']),
    ('Hierarchical-latent', 'Table 3', 'lsuncars_simsiam_hl', ['33.4 +- 0.8']),
    *(('COP-Gen', 'Table 1', f'bigbigan_copgen_{name}', numbers.split()) for name, (_, numbers) in COPGEN_1.items()),
    *(('COP-Gen', table, f'bigbigan130k_copgen_{name}', [number])
      for name, (table, _, _, number) in COPGEN_130K.items()),
    *(('Hierarchical-latent', 'Table 2', f'bigbigan_{name}', numbers.split())
      for name, (*_, numbers) in HL_2.items()),
    *(('Hierarchical-latent', 'Table 3', f'lsuncars_simsiam_{name}', [number])
      for name, (*_, number) in HL_3.items())]
TRANSFER = {  # stage, file: what it evaluates, numbers of its comment in their order (evaluations of the rows above)
    ('linear_eval', 'transfer_copgen'): ('in1k_simclr_copgen', '65.16 84.44 60.99 66.26 69.72 81.96 82.81'),
    ('linear_eval', 'transfer_copgen_nnclr'): ('in1k_nnclr_copgen', '62.53 84.10 60.43 64.49 70.35 82.45 82.84'),
    ('linear_eval', 'transfer_copgen_steering'): ('bigbigan_copgen_steering',
                                                  '66.17 84.23 63.29 62.46 69.94 84.65 84.78'),
    ('linear_eval', 'transfer_copgen_learned'): ('bigbigan_copgen_learned',
                                                 '67.05 84.09 62.44 63.82 73.56 84.63 84.36'),
    ('semi_eval', 'in1k_5percent_copgen'): ('in1k_simclr_copgen', '77.34 45.77'),
    ('semi_eval', 'in1k_5percent_copgen_nnclr'): ('in1k_nnclr_copgen', '76.28 44.09'),
    ('semi_eval', 'in1k_5percent_copgen_steering'): ('bigbigan_copgen_steering', '78.70 52.33'),
    ('semi_eval', 'in1k_5percent_copgen_learned'): ('bigbigan_copgen_learned', '78.81 51.84'),
    **{('linear_eval', f'transfer{name and "_hl_" + name}'): (name and f'bigbigan_simsiam_{name}' or 'in1k_simsiam_hl',
                                                              numbers)
       for name, numbers in {  # DTD, Birdsnap, Caltech101, CIFAR100, Flowers102, Food101, Pets
           '': '56.4 63.1 83.1 26.2 59.8 51.5 67.6', 'synth': '47.7 46.3 67.9 33.4 46.7 41.6 47.1',
           'random': '47.9 45.4 68.9 31.7 46.4 42.3 46.5', 'hlrandom': '54.9 64.3 84.4 41.1 63.2 50.1 59.5',
           'hlrandom_d': '54.5 65.2 85.1 40.4 66.8 52.0 59.5', 'learned': '48.8 42.0 72.9 31.7 45.2 38.6 44.0',
           'hllearned': '53.1 57.7 77.5 36.7 60.3 47.6 51.8',
           'hllearned_d': '54.4 60.6 79.5 36.7 62.6 50.2 51.0'}.items()},
    ('linear_eval', 'transfer_hl_supervised'): ('resnet50-0676ba61.pth', '54.5 93.6 86.6 48.1 79.1 53.7 84.9')}
LOSSES = {'NCE': ('mocov2', 'mocov3'), 'KL': ('swav',), 'COS': ('simsiam', 'byol')}
OPTIMIZERS = {'SGD': torch.optim.SGD, 'LARS': Lars, 'AdamW': torch.optim.AdamW}


def assert_table_9(name, optimizer, lr, weight_decay, momentum, batch, loss, epochs, backbone, embedding, projection):
    settings = config('pretrain', name)
    model, built = build(name)
    assert type(built) is OPTIMIZERS[optimizer]
    assert (settings['optimizer']['lr'], settings['batch_size'], settings['epochs']) == (lr, batch, epochs)
    for group in built.param_groups:
        assert group['weight_decay'] == (0 if group['exclude'] else weight_decay)
        assert group.get('momentum') == momentum
    excluded = any(group['exclude'] for group in built.param_groups)    # norms and biases, as the official codes
    assert excluded == (optimizer == 'LARS' and loss != 'KL')
    assert settings['method'] in LOSSES[loss]
    assert settings['backbone']['arch'] == backbone and model.backbone.feature_dim == embedding
    assert [layer.out_features for layer in model.projector if isinstance(layer, nn.Linear)][-1] == projection


@pytest.mark.parametrize('kind', ['baseline', 'genview'])
@pytest.mark.parametrize('name', TABLE_9)
def test_settings_of_table_9(name, kind):
    assert_table_9(f'{name}_{kind}', *TABLE_9[name])
    assert config('pretrain', f'{name}_{kind}')['image_size'] == 224


@pytest.mark.parametrize('name', [name for name in PRETRAIN if name.startswith('in100_')])
def test_settings_of_tables_6_and_7(name):
    assert_table_9(name, *IN100)


@pytest.mark.parametrize('name', [f'in1k_mocov3_{what}' for what in
                                  (*TABLE_4, *(f'alpha{round(100 * alpha):03}' for alpha in TABLE_8))])
def test_settings_of_tables_4_and_8(name):
    assert_table_9(name, *FIFTY)


@pytest.mark.parametrize('kind', ['baseline', 'genview'])
@pytest.mark.parametrize('method', ['mocov2', 'byol'])
@pytest.mark.parametrize('dataset', SMALL)
def test_settings_of_table_5(dataset, method, kind):
    name = f'{dataset}_{method}_{kind}'
    size, epochs, batch, momentum, buffer = SMALL[dataset]
    loss = 'NCE' if method == 'mocov2' else 'COS'
    assert_table_9(name, 'SGD', 0.5, 5e-4, 0.9, batch, loss, epochs, 'resnet18', 512, 128)
    values = flat(name)
    assert values['image_size'] == size and values['optimizer.warmup_epochs'] == 10
    assert values['backbone.stem'] == 'cifar'       # 3x3 stride 1, no max-pool
    if method == 'mocov2':
        assert (values['moco.momentum'], values['moco.queue'], values['moco.temperature']) == (momentum, buffer, 0.2)
    else:
        assert values['byol.momentum'] == momentum
    for view in ('view_1', 'view_2'):
        recipe = config('pretrain', name)[view]
        assert recipe['crop_scale'] == [0.2, 1.0] and recipe['jitter'][:3] == [0.4] * 3
        assert recipe['jitter_prob'] == 0.8 and recipe['blur_prob'] == 0.5 and recipe['solarize_prob'] == 0


# What GenView leaves open, from the official codes: warm-up epochs, last learning rate, smallest crop, jitter, blur and
# solarize of both views, and keys of the method
MOCO_V2_VIEWS = (0.2, [0.4, 0.4, 0.4, 0.1], (0.5, 0.5), (0, 0))
MOCO_V3_VIEWS = (0.2, [0.4, 0.4, 0.2, 0.1], (1, 0.1), (0, 0.2))
BYOL_VIEWS = (0.08, *MOCO_V3_VIEWS[1:])
NO_BLUR = (0.2, [0.4, 0.4, 0.4, 0.1], (0, 0), (0, 0))
V3 = {'mocov3.momentum': 0.99, 'mocov3.momentum_end': 1, 'mocov3.hidden': 4096}
R50 = (10, 0, *MOCO_V3_VIEWS, {**V3, 'mocov3.temperature': 1.0, 'backbone.zero_init_residual': False})
VIT = (40, 0, *BYOL_VIEWS, {**V3, 'mocov3.temperature': 0.2, 'backbone.patch_size': 16})
COP_GEN = {'batch_size': 224, 'epochs': 100, 'optimizer.name': 'sgd', 'optimizer.lr': 0.02625, 'image_size': 128,
           'optimizer.per_epoch': True, 'optimizer.weight_decay': 1e-4, 'backbone.zero_init_residual': False}
COP_GEN_SIMCLR = {'method': 'simclr', 'simclr.norm': False, 'simclr.dim': 128, 'simclr.layers': 2,
                  'simclr.temperature': 0.1, 'simclr.loss_factor': 1.4286}  # 0.1 / 0.07
OFFICIAL = {
    'in1k_mocov2_': (0, 0, *MOCO_V2_VIEWS, {'moco.queue': 65536, 'moco.momentum': 0.999, 'moco.temperature': 0.2,
                                            'moco.bn_splits': 8, 'moco.symmetric': False}),
    'in1k_swav_': (0, 6e-4, 0.14, [0.8, 0.8, 0.8, 0.2], (0.5, 0.5), (0, 0), {
        'small_crops.count': 6, 'small_crops.size': 96, 'small_crops.crop_scale': [0.05, 0.14], 'swav.prototypes': 3000,
        'swav.temperature': 0.1, 'swav.epsilon': 0.05, 'swav.iterations': 3, 'swav.hidden': 2048, 'swav.queue': 3840,
        'swav.queue_from_epoch': 15, 'swav.freeze_prototypes': 5005, 'backbone.zero_init_residual': True}),
    'in1k_simsiam_(baseline|genview)': (0, 0, *MOCO_V2_VIEWS, {
        'simsiam.hidden': 512, 'simsiam.fix_predictor_lr': True}),
    'in1k_byol_': (10, 0, *BYOL_VIEWS, {
        'byol.hidden': 4096, 'byol.momentum': 0.99, 'byol.momentum_end': 1, 'backbone.zero_init_residual': False}),
    'in1k_mocov3_(?!vit)': R50, 'in100_mocov3_': R50, 'in1k_mocov3_vit': VIT,
    'in1k_vicreg_gencl(?!_pairwise)': (10, 6.25e-4, *BYOL_VIEWS, {
        'method': 'vicreg', 'batch_size': 800, 'epochs': 100, 'optimizer.name': 'lars', 'optimizer.lr': 0.625,
        'optimizer.weight_decay': 1e-6, 'vicreg.dim': 8192, 'vicreg.hidden': 8192, 'vicreg.invariance': 25,
        'vicreg.variance': 25, 'vicreg.covariance': 1}),
    'in1k_simclr_copgen': (0, 2.625e-5, *NO_BLUR, {**COP_GEN, **COP_GEN_SIMCLR, 'simclr.negative_mixing': 0}),
    'in1k_simclr_negft_copgen': (0, 2.625e-5, *NO_BLUR, {**COP_GEN, **COP_GEN_SIMCLR, 'simclr.negative_mixing': 1.6}),
    'in1k_simclr_infomin_copgen': (0, 2.625e-5, 0.2, [0.8, 0.8, 0.8, 0.2], (0.5, 0.5), (0, 0), {
        **COP_GEN, **COP_GEN_SIMCLR, 'view_1.randaugment': 2, 'view_2.randaugment': 2}),
    'in1k_nnclr_copgen': (0, 2.625e-5, *NO_BLUR, {**COP_GEN, 'method': 'nnclr', 'nnclr.dim': 256, 'nnclr.hidden': 4096,
                                                  'nnclr.queue': 98336, 'nnclr.temperature': 0.1}),
    'in1k_simsiam_hl$': (10, 0.02, *NO_BLUR, {'batch_size': 1024, 'optimizer.lr': 0.2}),
    'lsuncars_simsiam_hl$': (0, 0.01, *NO_BLUR, {'batch_size': 512, 'optimizer.lr': 0.1}),
    '(in1k|lsuncars)_simsiam_hl$': (None, None, *NO_BLUR, {
        'method': 'simsiam', 'epochs': 100, 'optimizer.name': 'sgd', 'optimizer.weight_decay': 1e-4, 'image_size': 112,
        'simsiam.dim': 2048, 'simsiam.hidden': 512, 'simsiam.fix_predictor_lr': True})}


@pytest.mark.parametrize('pattern', OFFICIAL)
def test_what_the_paper_leaves_open_is_as_in_the_official_codes(pattern):
    warmup, final, crop, jitter, blur, solarize, keys = OFFICIAL[pattern]
    names = [name for name in PRETRAIN if re.match(pattern, name)]
    assert names
    for name in names:
        values = flat(name)
        assert {key: values[key] for key in keys} == keys
        for k, view in enumerate(('view_1', 'view_2')):
            recipe = config('pretrain', name)[view]
            assert recipe == {
                'crop_scale': [crop, 1.0], 'resize': None, 'flip': 0.5, 'jitter': jitter, 'jitter_prob': 0.8,
                'gray_prob': 0.2, 'blur_prob': blur[k], 'blur_sigma': [0.1, 2.0], 'blur_kernel': None,
                'solarize_prob': solarize[k],
                'randaugment': keys.get(f'{view}.randaugment', 0), 'randaugment_magnitude': [10, 0.5]}
        if warmup is not None:
            assert (values['optimizer.warmup_epochs'], values['optimizer.final_lr']) == (warmup, final)


@pytest.mark.parametrize('name', [name for name in PRETRAIN if name not in NO_ROW])
def test_learning_rate_warms_up_and_decays_on_a_cosine(name):
    settings, epochs = config('pretrain', name)['optimizer'], config('pretrain', name)['epochs']
    rate = functools.partial(pretrain.learning_rate, steps_per_epoch=100, epochs=epochs, optimizer=settings)
    warmup = 100 * settings['warmup_epochs']
    if settings['per_epoch']:                       # once an epoch, counted from 1; the rest is as if it were not
        assert [rate(100 * e) for e in range(epochs)] == [rate(100 * e + 99) for e in range(epochs)]
        assert rate(0) < settings['lr'] and rate(100 * epochs - 1) == settings['final_lr']
        rate.keywords['optimizer'] = {**settings, 'per_epoch': False}
    assert max(map(rate, range(0, 100 * epochs, 50))) <= settings['lr'] == rate(warmup)
    assert not warmup or rate(warmup // 2) == pytest.approx(settings['lr'] / 2, rel=0.01)
    assert rate((warmup + 100 * epochs) // 2) == pytest.approx((settings['lr'] + settings['final_lr']) / 2)
    assert rate(100 * epochs - 1) == pytest.approx(settings['final_lr'], abs=1e-5 * settings['lr'])
    rule = re.search(r'^  lr: *(\S+) *# (\S+) x batch / 256$', path('pretrain', name).read_text(), re.MULTILINE)
    assert not rule or settings['lr'] == pytest.approx(float(rule[2]) * config('pretrain', name)['batch_size'] / 256)


def test_rows_of_tables_4_to_8_differ_in_what_the_tables_say():
    def of(what):
        values = flat(f'in100_mocov3_{what}')
        first, rest = values['data.beton']
        views = {c['output']: c for stage, name in FILES if stage == 'gen_views' for c in [config(stage, name)]}
        assert rest == 'runs/in100/rest/pairs.beton' and views['runs/in100/rest']['strategy'] == 'none'
        return values['data.alpha'], values['quality.enabled'], views[first.removesuffix('/pairs.beton')]

    for (framework, adaptive, quality), (_, what) in TABLE_6.items():
        alpha, enabled, views = of(what)
        assert (alpha, enabled) == (1.0 if framework else 0.0, bool(quality)), what
        if framework:
            assert (views['strategy'], views['noise_level']) == ('adaptive' if adaptive else 'constant', 200), what
    for column in TABLE_7:
        alpha, enabled, views = of(table_7_file(column))
        assert (alpha, enabled) == (1.0, False)
        assert views['strategy'] == {'C': 'constant', 'R': 'random', 'A': 'adaptive'}[column[0]]
        assert column[0] != 'C' or f"CS({views['noise_level']})" == column
    for alpha in TABLE_8:
        values = flat(f'in1k_mocov3_alpha{round(100 * alpha):03}')
        assert values['data.alpha'] == alpha and values['data.beton'] == 'runs/in1k/views/pairs.beton'
    for what in TABLE_4:
        assert (flat(f'in1k_mocov3_{what}')['data.alpha'] == 1) == (what == 'framework150k')


def moves(latent):
    """As in the tables above."""
    found = {}
    for chunks, move in latent['chunks'].items():
        walker = re.fullmatch(r'runs/walkers/(\w+)/walker.pt', move['walker'])
        found[chunks] = walker[1] if walker else (move['std'], move['truncation'])
        assert not walker or config('train_walker', walker[1])['chunks'] == chunks
    return found


def augmented(view):
    """Which of T_x a view has. COP-Gen's and hierarchical-latent's code: no blur, flips but where nothing is done."""
    assert view['blur_prob'] == view['solarize_prob'] == 0 and view['flip'] in (0, 0.5)
    crop, colour = view['crop_scale'] == [0.2, 1.0], view['jitter_prob'] == 0.8
    assert crop or view['crop_scale'] == [0, 0]
    assert (view['jitter'], view['gray_prob']) == ([0.4, 0.4, 0.4, 0.1], 0.2) if colour else view['gray_prob'] == 0
    assert (view['flip'] == 0) == (not crop and not colour)
    return {(1, 1): ALL, (1, 0): NO_COLOUR, (0, 1): NO_CROP, (0, 0): NOTHING}[crop, colour]


PAIRS = {**{f'bigbigan_copgen_{name}': (move, None, 1_300_000) for name, (move, _) in COPGEN_1.items()},
         **{f'bigbigan130k_copgen_{name}': (move, views, 130_000) for name, (_, move, views, _) in COPGEN_130K.items()},
         **{f'bigbigan_{name}': (*HL_2[name][:2], 1_300_000) for name in HL_2 if name.startswith('simclr')}}


@pytest.mark.parametrize('name', PAIRS)
def test_simclr_on_pairs_of_bigbigan(name):
    """COP-Gen section 4.1 and its code (B9 of the facts): what is trained on what."""
    move, views, anchors = PAIRS[name]
    settings, values = config('pretrain', name), flat(name)
    folder = settings['data']['beton'].removesuffix('/pairs.beton')
    pairs, = (c for stage, n in FILES if stage == 'gen_views' for c in [config(stage, n)] if c['output'] == folder)
    assert pairs['strategy'] == 'latent' and moves(pairs['latent']) == move
    assert (pairs['latent']['anchors'], pairs['latent']['truncation'], pairs['view_size']) == (anchors, 2, 128)
    expected = {'optimizer.name': 'sgd', 'optimizer.lr': 0.02625, 'optimizer.final_lr': 2.625e-5, 'batch_size': 224,
                'optimizer.weight_decay': 1e-4, 'optimizer.per_epoch': True, 'image_size': 128, 'data.swap': 'second',
                'data.alpha': 1, 'epochs': 200 if '130k' in name else 100, 'backbone.arch': 'resnet50',
                'method': 'nnclr' if name.endswith('nnclr') else 'simclr'}
    assert {key: values[key] for key in expected} == expected
    assert values['simclr.negative_mixing'] == (1.6 if name.endswith('negft') else 0)
    if settings['method'] == 'simclr':
        assert {key: values[key] for key in COP_GEN_SIMCLR} == COP_GEN_SIMCLR
    if name.endswith('infomin'):
        assert settings['view_1'] == settings['view_2'] and settings['view_1']['randaugment'] == 2
        assert settings['view_1']['jitter'] == [0.8, 0.8, 0.8, 0.2]
        return
    assert augmented(settings['view_1']) == augmented(settings['view_2']) == (views or ALL)
    if augmented(settings['view_1']) in (NO_CROP, NOTHING):
        assert settings['view_1']['resize'] == 146       # the central 112 of 128 pixels, enlarged to 128


@pytest.mark.parametrize('name', [name for name in HL_2 if name.startswith('simsiam')])
def test_simsiam_while_bigbigan_draws(name):
    move, views, discriminator, _ = HL_2[name]
    settings, values = config('pretrain', f'bigbigan_{name}'), flat(f'bigbigan_{name}')
    online = settings['data']['online']
    assert moves(online) == move and online['images_per_epoch'] == 1_281_167 and online['truncation'] == 2
    made = config('train_discriminator', 'bigbigan')['output'] + '/discriminator.pt'
    assert online['discriminator'] == (made if discriminator else '')
    assert augmented(settings['view_1']) == augmented(settings['view_2']) == views
    assert different(f'bigbigan_{name}', 'in1k_simsiam_hl') <= {
        'output', 'data.beton', 'data.alpha', 'data.swap', 'data.num_workers', *(k for k in values if re.match(
            r'data\.online|view_\d\.(jitter_prob|gray_prob)', k))}


@pytest.mark.parametrize('name', HL_3)
def test_simsiam_while_stylegan2_draws(name):
    move, views, _ = HL_3[name]
    settings, values = config('pretrain', f'lsuncars_simsiam_{name}'), flat(f'lsuncars_simsiam_{name}')
    online = settings['data']['online']
    assert moves(online) == move and online['images_per_epoch'] == 893_000
    assert [online[k] for k in ('kind', 'truncation', 'psi', 'crop', 'size')] == ['stylegan2', 0.9, 1, 384, 128]
    assert augmented(settings['view_1']) == augmented(settings['view_2']) == views
    assert different(f'lsuncars_simsiam_{name}', 'lsuncars_simsiam_hl') <= {
        'output', 'data.beton', 'data.alpha', 'data.swap', 'data.num_workers', *(k for k in values if re.match(
            r'data\.online|view_\d\.(jitter_prob|gray_prob)', k))}


@pytest.mark.parametrize('name', [name for stage, name in FILES if stage == 'train_walker' and name not in NO_ROW])
def test_walkers(name):
    """COP-Gen section 4.1, hierarchical-latent appendix B and the codes of both (B and C of the facts)."""
    chunks, samples, batch, lr, estimator, start, views = WALKERS[name]
    settings = config('train_walker', name)
    assert (settings['chunks'], settings['samples'], settings['batch_size'], settings['lr']) == (
        chunks, samples, batch, lr)
    kind = 'steering' if name.endswith('steering') else 'linear' if name.endswith('linear') else 'learned'
    assert settings['walker'] == kind and settings['first'] == 'estimator'
    latent = settings['latent']
    cars = ['stylegan2', 0.9, 384, 128] if name.startswith('lsuncars') else ['biggan', 2, None, None]
    assert [latent[k] for k in ('kind', 'truncation', 'crop', 'size')] == cars
    if kind != 'steering':
        found = settings['estimator']
        assert (found['lr'], settings['start'], augmented(settings['view'])) == (estimator, start, views)
        assert [found[k] for k in ('arch', 'width', 'hidden', 'dim', 'temperature')] == ['resnet18', 64, 512, 128, 0.1]
        assert settings['image_size'] == (112 if start == 'small' else 128)     # of 128: cut from the centre
        assert settings['view']['resize'] == (128 if start == 'small' else None)


def different(a, b):
    return {key for key in flat(a) | flat(b) if flat(a).get(key) != flat(b).get(key)}


@pytest.mark.parametrize('name', [name.removesuffix('_genview') for name in PRETRAIN if name.endswith('_genview')])
def test_baseline_differs_in_nothing_but_alpha_and_quality(name):
    genview, baseline = f'{name}_genview', f'{name}_baseline'
    allowed = {'output', 'data.alpha', 'normalization', *(key for key in flat(genview) if key.startswith('quality.'))}
    assert different(genview, baseline) <= allowed
    assert (flat(genview)['data.alpha'], flat(baseline)['data.alpha']) == (1, 0)
    assert flat(genview)['quality.enabled'] and not flat(baseline)['quality.enabled']


def test_rows_of_gencl_differ_in_what_the_tables_say():
    """Section 4.1: no augmentation but the named one; 4.2: a generated view has neither blur nor grey."""
    base, data = 'in1k_vicreg_gencl', {'output', 'data.beton', 'data.alpha'}
    off = {'crop_scale': [0, 0], 'flip': 0, 'jitter_prob': 0, 'gray_prob': 0, 'blur_prob': 0, 'solarize_prob': 0}
    for name, (_, _, kept) in GENCL_1.items():
        name = f'{base}_pairwise_{name}'
        assert {key for key in different(name, base) if not key.startswith('view_')} == data
        for view in ('view_1', 'view_2'):
            ours, published = config('pretrain', name)[view], config('pretrain', base)[view]
            assert {key: ours[key] for key in off} == {key: published[key] if key in kept else value
                                                       for key, value in off.items()}
            assert 'jitter' not in kept or ours['jitter'] == published['jitter']
        assert (flat(name)['data.alpha'], set(config('pretrain', name)['view_generated'].values())) == (1, {None})
        assert flat(name)['data.beton'] == 'runs/in1k/views_icgan/pairs.beton'
    for kind, (_, rows) in GENCL_GAMMA.items():
        for gamma in rows:
            name = f'{base}_{kind}{gamma:03}'
            assert different(name, base) == {*data, 'view_generated.gray_prob', 'view_generated.blur_prob'}
            assert flat(name)['data.alpha'] == gamma / 100 and flat(name)['data.swap'] == 'random'
            assert set(config('pretrain', name)['view_generated'].values()) == {0}
            assert flat(name)['data.beton'] == f'runs/in1k/views_{kind}/pairs.beton'


def test_rows_of_cop_gens_table_1_differ_in_what_they_are_named_after():
    base, blocks = 'in1k_simclr_copgen', ('simclr.', 'nnclr.')
    views = {f'{view}.{key}' for view in ('view_1', 'view_2') for key in ('jitter', 'blur_prob', 'randaugment')}
    for name, keys in (('in1k_simclr_negft_copgen', {'simclr.negative_mixing'}), ('in1k_nnclr_copgen', {'method'}),
                       ('in1k_simclr_infomin_copgen', views)):
        found = {key for key in different(base, name) if name != 'in1k_nnclr_copgen' or not key.startswith(blocks)}
        assert found == {'output', *keys}, name


def test_rows_of_a_table_differ_in_nothing_else():
    quality = {key for key in flat('in100_mocov3_genview') if key.startswith('quality.')}
    for first, allowed in (('in100_mocov3_genview', {'output', 'data.beton', 'data.alpha', 'normalization', *quality}),
                           ('in1k_mocov3_alpha000', {'output', 'data.alpha'}),
                           ('in1k_mocov3_laion', {'output', 'data.beton', 'data.alpha'})):
        names = [f'in1k_mocov3_{what}' for what in TABLE_4] if first.endswith('laion') else \
            [name for name in PRETRAIN if name.startswith(re.match(r'in100_mocov3_|.*alpha', first)[0])]
        assert len(names) > 4
        for name in names:
            assert different(first, name) <= allowed, name


@pytest.mark.parametrize('stage, name', [f for f in FILES if f[0] != 'pretrain' and f[1] not in NO_ROW])
def test_views_are_made_as_appendix_a_says(stage, name):
    settings, paper = config(stage, name), name.startswith(('in1k', 'in100'))  # else: the embedded models
    if stage == 'fg_proportion':
        assert (settings['pca_images'], settings['foreground_share']) == (10_000, 0.40)
        assert settings['proportions'] != name.endswith('_quality')
        clip = ('convnext_base_w', 'laion2b_s13b_b82k_augreg', 224) if name.endswith('_quality') else \
            ('ViT-H-14', 'laion2b_s32b_b79k', None)
        small = 'tiny/quality' if name.endswith('_quality') else 'tiny/clip'
        assert tuple(settings['clip'].values()) == (clip if paper else (small, None, None))
    if stage == 'gen_views' and settings['proportions']:
        strategy, level = re.search(r'_(adaptive|random|constant|retrieval|150k|300k)(\d*)$', name).groups()
        assert settings['strategy'] == strategy.replace('150k', 'constant').replace('300k', 'constant')
        assert settings['noise_level'] == int(level or 200) and settings['generator']['steps'] == 20
        assert settings['generator']['guidance_scale'] == 10 or not paper
        size = {'cifar10': 32, 'cifar100': 32, 'tinyin': 64}.get(name.split('_')[0], 512)
        assert settings['view_size'] == size
        subset = {'in100': 50_000, 'in1k_150k': 150_000, 'in1k_300k': 300_000}
        assert settings['dataset']['subset'] == subset.get(name, subset.get(name.split('_')[0]))


@pytest.mark.parametrize('name', [name for name in PRETRAIN if name.startswith(('in1k', 'in100', 'lsuncars'))])
def test_normalization_is_clips_with_the_quality_encoder_and_imagenets_without(name):
    mean, _ = normalization(config('pretrain', name)['normalization'], NORMALIZATIONS['clip'])
    assert mean == NORMALIZATIONS['clip' if flat(name)['quality.enabled'] else 'imagenet'][0]


# ---------------------------------------------------------------------------------------------------------------------
# Every file

@pytest.mark.parametrize('stage, name', FILES)
def test_passes_the_checks_of_its_stage(stage, name):
    for world in (1, 2, 4, 8):
        alone = stage in ('fg_proportion', 'gen_views', 'view_eval')
        STAGES[stage].check(config(stage, name), *([] if alone else [world]))
    if stage == 'pretrain':
        normalization(config(stage, name)['normalization'], NORMALIZATIONS['clip'])


@pytest.mark.parametrize('name', PRETRAIN)
def test_builds_model_and_optimizer(name):
    model, optimizer = build(name)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(id(p) for group in optimizer.param_groups for p in group['params'])


@pytest.mark.parametrize('stage, name', FILES)
def test_heading_names_paper_table_and_cost(stage, name):
    lines = path(stage, name).read_text().splitlines()
    assert lines[0].startswith('# ')
    if name not in NO_ROW:
        if stage == 'train_walker':                      # distances stand there, no accuracies
            assert re.match(r'# (COP-Gen|Hierarchical-latent) Tables? \d', lines[0])
            return
        paper, tables = re.match(r'# (GenView|GenCL|COP-Gen|Hierarchical-latent) Tables? (\d(?: and \d)?)',
                                 lines[0]).groups()
        known = ' '.join(' '.join(numbers) for who, table, _, numbers in ROWS
                         if who == paper and set(table) & set(tables) & set('123456789'))
        assert set(re.findall(r'top-[15] ([\d.]+)', lines[0])) <= set(known.split())
        assert max(map(len, lines)) <= 120
    if name not in NO_ROW or stage in ('fg_proportion', 'gen_views'):
        assert lines[1].startswith('# Cost: ')


def test_every_row_has_its_file_and_expected_number():
    assert {name for _, _, name, _ in ROWS} == set(PRETRAIN) - NO_ROW
    for paper, table, name, numbers in ROWS:
        first = path('pretrain', name).read_text().splitlines()[0]
        assert first.startswith(f'# {paper} Table') and table in first, name
        architecture = {'resnet': 'ResNet-', 'vit_small': 'ViT-S', 'vit_base': 'ViT-B'}
        shown = re.sub('|'.join(architecture), lambda m: architecture[m[0]], flat(name)['backbone.arch'])
        assert f"{shown}, {flat(name)['epochs']} epochs" in first, name
        for number in numbers:
            assert re.search(rf'(?<![\d.]){re.escape(number)}(?!\d)', first), (name, number)
        dataset = {'in1k': 'IN-1K', 'in100': 'IN-100', 'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100',
                   'tinyin': 'Tiny-ImageNet', 'lsuncars': 'LSUN Cars', 'bigbigan': 'BigBiGAN',
                   'bigbigan130k': 'BigBiGAN'}[name.split('_')[0]]
        assert re.search(rf'{dataset}(?!\d)', first), name


@pytest.mark.parametrize('stage, name', TRANSFER)
def test_transfer_rows_of_copgen_and_hierarchical_latent(stage, name):
    """COP-Gen's Table 2 and hierarchical-latent's Table 4: encoders of their other tables, one protocol each."""
    encoder, numbers = TRANSFER[stage, name]
    settings = config(stage, name)
    expected = encoder if encoder.endswith('.pth') else config('pretrain', encoder)['output'] + '/backbone.pt'
    assert settings['checkpoint'] == expected
    comment = ''.join(line for line in path(stage, name).read_text().splitlines() if line.startswith('#'))
    found = re.findall(r'(?<![\d.])\d\d\.\d+', comment.replace('Nesterov', ''))
    assert found[:len(numbers.split())] == numbers.split()
    ours = {key: value for key, value in settings.items() if key not in ('checkpoint', 'output')}
    first = next(other for kind, other in TRANSFER if kind == stage and name.startswith(other))
    assert ours == {key: value for key, value in config(stage, first).items() if key not in ('checkpoint', 'output')}


@pytest.mark.parametrize('name', GENCL_4)
def test_measures_of_gencl_table_4(name):
    settings, first = config('view_eval', f'in1k_gencl_{name}'), path('view_eval', f'in1k_gencl_{name}').read_text()
    fid, similarity, milliseconds, parameters = GENCL_4[name].split()
    assert first.splitlines()[0].endswith(
        f'FID {fid}, SSIM {similarity}, {milliseconds} ms, {parameters} parameters')
    assert settings['pairs'] == f'runs/in1k/views_{name}/pairs.beton' and settings['fid']['weights']
    assert settings['size'] == 256 and settings['images'] >= 1_281_167  # "each image in ImageNet's training dataset"


def test_inputs_are_outputs_of_other_experiments():
    made = {stage: {} for stage in STAGES}
    for stage, name in FILES:
        output = config(stage, name)['output']
        if stage in ('fg_proportion', 'gen_views', 'pretrain', 'train_walker', 'train_discriminator'):
            assert output not in made[stage], f'{stage}/{name} writes where another one does'
            made[stage][output] = config(stage, name)
    assert len({output for outputs in made.values() for output in outputs}) == sum(map(len, made.values()))
    for stage, name in FILES:
        settings = config(stage, name)
        if stage == 'gen_views' and settings['strategy'] not in ('none', 'latent') and settings['proportions']:
            source = made['fg_proportion'][settings['proportions']]
            assert source['proportions'], name
            keys = ('name', 'root', 'split', 'subset')      # of the same images
            assert [source['dataset'][k] for k in keys] == [settings['dataset'][k] for k in keys], name
        if stage == 'pretrain' and name not in NO_ROW:
            assert settings['output'] == f"runs/{name.replace('_', '/', 1)}"
        if stage == 'train_discriminator':
            assert settings['beton'].removesuffix('/pairs.beton') in made['gen_views']
        if stage == 'pretrain' and not settings['data']['online']['images_per_epoch']:
            betons = settings['data']['beton']
            betons = betons if isinstance(betons, list) else [betons]
            betons = [made['gen_views'][beton.removesuffix('/pairs.beton')] for beton in betons]
            assert settings['data']['alpha'] == 0 or any(b['strategy'] != 'none' for b in betons), name
            assert len({beton['image_size'] for beton in betons}) == 1, name
            for beton in betons:
                for stored in (beton['image_size'], beton['view_size'] if beton['strategy'] != 'none' else None):
                    assert stored is None or stored >= settings['image_size'], name
        if stage == 'pretrain' and settings['quality']['enabled']:
            source = made['fg_proportion'][settings['quality']['pc'].removesuffix('/fg_proportion.npz')]
            assert source['clip'] == settings['quality']['clip'], name
        if stage == 'view_eval':
            assert settings['pairs'].removesuffix('/pairs.beton') in made['gen_views'], name
        if stage in ('linear_eval', 'semi_eval', 'detect_eval'):
            checkpoint = settings['checkpoint'].removesuffix('/backbone.pt')
            assert name in ('sanity', 'transfer_hl_supervised') or checkpoint in made['pretrain'], name
            for key in ('train_beton', 'test_beton') if stage != 'detect_eval' else ():
                folder = re.sub('^runs/transfer/[^/]*', 'runs/transfer/DTD', settings[key].removesuffix('/pairs.beton'))
                assert folder in made['gen_views'], name  # the YAMLs of the transfer sets name one of them
