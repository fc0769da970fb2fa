"""GAN generators give the images of the official code, from every layout of their files; nothing in a file is run."""
import contextlib
import operator
import os
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Fail  # noqa: E402
import gan  # noqa: E402
from conftest import damages, small_gan  # noqa: E402
from gan import StyleGAN2, stylegan2  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')

# ---------------------------------------------------------------------------------------------------------------------
# StyleGAN2

WIDTHS, CHANNELS = [24] * 4, [16, 16, 16, 8]  # 32 px, 8 ws


def drawn(shapes):
    """Weights {name: tensor} for NVlabs' names and shapes, drawn one after the other in the sorted order of names."""
    random, found = np.random.default_rng(0), {}
    for name in sorted(shapes):
        value = random.standard_normal(tuple(shapes[name]))
        if name.startswith('mapping.fc'):
            value *= 100 if name.endswith('weight') else 10
        elif name.endswith('resample_filter'):  # not symmetric: a flip shows
            value = (1 + value / 3) / 16
        elif name.endswith(('bias', 'noise_strength')):
            value = value / 5 + name.endswith('affine.bias')
        found[name] = torch.from_numpy(np.asarray(value, np.float32))
    return found


def latents():
    """z (16, 24) for the ws of two images, all different: (2, 8, W) after the mapping."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32))


# Of NVlabs' code (networks_stylegan2.py) with these weights and latents; rosinality's gives the same within 5e-7.
PIXELS = (0, 0, 0, 0), (0, 1, 5, 20), (0, 2, 31, 31), (1, 0, 17, 3), (1, 1, 31, 0), (1, 2, 8, 8)
NUMBERS = {None: (-0.402168, 0.833019, [-0.06152, -0.22489, -0.04356, -1.03043, 0.38744, 0.03435]),
           1.5: (-0.327100, 0.708073, [-0.04009, -0.04534, -0.03978, -0.89333, 0.40806, 0.03383])}


def check(generator, clamp=None):
    """The generator gives the numbers of the official code."""
    w = generator.mapping(latents())
    assert [w[0, 0].item(), w[7, 11].item(), w[15, 23].item()] == pytest.approx([2.55541, 0.12157, -0.07322], abs=2e-5)
    images = generator.synthesis(w.view(2, 8, 24))
    mean, std, pixels = NUMBERS[clamp]
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert (images.mean().item(), images.std().item()) == pytest.approx((mean, std), abs=5e-6)
    assert [images[place].item() for place in PIXELS] == pytest.approx(pixels, abs=2e-5)


def shapes(widths, channels):
    """{NVlabs' name: shape}, written from what is published of them, not from our module."""
    found, w, block = {'mapping.w_avg': (widths[-1],)}, widths[-1], 'synthesis.b4'
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        found |= {f'mapping.fc{i}.weight': (outputs, inputs), f'mapping.fc{i}.bias': (outputs,)}
    found['synthesis.b4.const'] = (channels[0], 4, 4)
    for i, outputs in enumerate(channels):
        size, block = 4 << i, f'synthesis.b{4 << i}'
        found[f'{block}.resample_filter'] = (4, 4)
        for part, inputs in (('conv0', channels[i - 1]), ('conv1', outputs), ('torgb', outputs)):
            if part == 'conv0' and not i:
                continue
            kernel, out = (1, 3) if part == 'torgb' else (3, outputs)
            found |= {f'{block}.{part}.weight': (out, inputs, kernel, kernel), f'{block}.{part}.bias': (out,),
                      f'{block}.{part}.affine.weight': (inputs, w), f'{block}.{part}.affine.bias': (inputs,)}
            if part != 'torgb':
                found |= {f'{block}.{part}.noise_const': (size, size), f'{block}.{part}.noise_strength': (),
                          f'{block}.{part}.resample_filter': (4, 4)}
    return found


def order(weights):
    """NVlabs' names of the convolutions, from 4 pixels on."""
    return sorted({name[:name.index('.noise')] for name in weights if '.noise_const' in name},
                  key=lambda name: (int(name.split('.')[1][1:]), name))


def rosinality(weights):
    """The same weights as rosinality/stylegan2-pytorch writes them."""
    found = {'input.input': weights['synthesis.b4.const'][None]}
    for name, value in weights.items():
        if name.startswith('mapping.fc'):
            found[f'style.{int(name[10:].split(".")[0]) + 1}.{name.split(".")[-1]}'] = value
    for n, conv in enumerate(order(weights)):
        new = f'convs.{n - 1}' if n else 'conv1'
        found |= {f'{new}.conv.weight': weights[f'{conv}.weight'][None],
                  f'{new}.activate.bias': weights[f'{conv}.bias'],
                  f'{new}.conv.modulation.weight': weights[f'{conv}.affine.weight'],
                  f'{new}.conv.modulation.bias': weights[f'{conv}.affine.bias'],
                  f'{new}.noise.weight': weights[f'{conv}.noise_strength'][None],
                  f'noises.noise_{n}': weights[f'{conv}.noise_const'][None, None]}
        block = conv.rpartition('.')[0]
        if conv.endswith('conv0'):
            found |= {f'{new}.conv.blur.kernel': 4 * weights[f'{conv}.resample_filter'],
                      f'to_rgbs.{n // 2}.upsample.kernel': 4 * weights[f'{block}.resample_filter']}
        else:
            new = f'to_rgbs.{n // 2 - 1}' if n else 'to_rgb1'
            found |= {f'{new}.conv.weight': weights[f'{block}.torgb.weight'][None],
                      f'{new}.bias': weights[f'{block}.torgb.bias'][None, :, None, None],
                      f'{new}.conv.modulation.weight': weights[f'{block}.torgb.affine.weight'],
                      f'{new}.conv.modulation.bias': weights[f'{block}.torgb.affine.bias']}
    return {'g_ema': found, 'latent_avg': weights['mapping.w_avg']}


@contextlib.contextmanager
def modules(**objects):
    """Modules of others, named with __ for the dot, which hold our objects for as long as something is pickled."""
    before = dict(sys.modules)
    for place, members in objects.items():
        names = place.split('__')
        for i in range(len(names)):
            sys.modules.setdefault('.'.join(names[:i + 1]), types.ModuleType(names[i]))
        for member in members:
            member.__module__ = '.'.join(names)
            setattr(sys.modules[member.__module__], member.__name__, member)
    yield
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


class EasyDict(dict):
    pass


class Network:
    """Of dnnlib.tflib: pickled as the names and arrays of its variables and its components."""

    def __init__(self, variables, components=(), **settings):
        self.__dict__.update(version=4, name='n', build_module_src='raise SystemExit', variables=variables,
                             components=EasyDict(components), static_kwargs=EasyDict(settings))


def tensorflow(path, weights, **settings):
    """The same weights in a legacy pickle of NVlabs/stylegan2 (config f), whose arrays are laid out otherwise."""
    array = {name: value.numpy() for name, value in weights.items()}
    mapping, synthesis = [], [('lod', np.float32(0)), ('4x4/Const/const', array['synthesis.b4.const'][None])]
    for name in array:
        if name.startswith('mapping.fc'):
            layer, entry = name[len('mapping.fc'):].split('.')
            mapping.append((f'Dense{layer}/{entry}', array[name].T))
    for n, conv in enumerate(order(weights)):
        size = conv.split('.')[1][1:]
        kind = {'conv0': 'Conv0_up', 'conv1': 'Conv1' if n else 'Conv'}[conv[-5:]]
        synthesis += [(f'noise{n}', array[f'{conv}.noise_const'][None, None]),
                      (f'{size}x{size}/{kind}/noise_strength', np.float32(array[f'{conv}.noise_strength']))]
        for part, new in ((conv, kind), (f'synthesis.b{size}.torgb', 'ToRGB')):
            weight = array[f'{part}.weight'].transpose(2, 3, 1, 0)
            synthesis += [(f'{size}x{size}/{new}/weight', weight[::-1, ::-1] if new == 'Conv0_up' else weight),
                          (f'{size}x{size}/{new}/mod_weight', array[f'{part}.affine.weight'].T),
                          (f'{size}x{size}/{new}/mod_bias', array[f'{part}.affine.bias'] - 1),
                          (f'{size}x{size}/{new}/bias', array[f'{part}.bias'].astype('>f4'))]
    with modules(dnnlib__util=[EasyDict], dnnlib__tflib__network=[Network]):
        mean = Network([('dlatent_avg', array['mapping.w_avg'])], {
            'synthesis': Network(list(dict(synthesis).items())), 'mapping': Network(mapping)},
            resolution=32, fmap_base=128, fmap_max=16, latent_size=24, dlatent_size=24, mapping_layers=3,
            mapping_fmaps=24, **settings)
        other = Network([('notes', np.array(['a', None], object)), ('flags', np.zeros(2, np.int8))])
        path.write_bytes(pickle.dumps((Network([]), other, mean), 4))


def _reconstruct_persistent_obj(meta):
    raise AssertionError('was run')


class Persistent:
    """A module as NVlabs' torch_utils.persistence pickles it: beside its state, source code that would be run."""

    def __init__(self, entries, source='raise SystemExit', **settings):
        parts = {name.split('.')[0] for name in entries if '.' in name}
        inner = {part: {name.partition('.')[2]: v for name, v in entries.items() if name.startswith(f'{part}.')}
                 for part in parts}
        here = {name: value for name, value in entries.items() if '.' not in name}
        buffers = ('w_avg', 'noise_const', 'resample_filter')
        self.source, self.state = source, {
            'training': False, '_non_persistent_buffers_set': set(), '_backward_hooks': {}, **settings,
            '_parameters': {k: torch.nn.Parameter(v) for k, v in here.items() if k not in buffers},
            '_buffers': {k: v for k, v in here.items() if k in buffers}, 'weight_gain': 1 / np.sqrt(24),
            '_modules': {part: Persistent(content, source, **settings) for part, content in inner.items()},
            '_init_kwargs': EasyDict(z_dim=24)}

    def __reduce__(self):
        return _reconstruct_persistent_obj, ({
            'type': 'class', 'version': 6, 'module_src': self.source, 'class_name': 'G', 'state': self.state},)


SETTINGS = {'activation': 'lrelu', 'bias_gain': 0.01, 'conv_clamp': None}


def persistent(path, weights, protocol=4, source='raise SystemExit', **settings):
    """The same weights in a pickle of NVlabs/stylegan3."""
    with modules(torch_utils__persistence=[_reconstruct_persistent_obj], dnnlib__util=[EasyDict]):
        path.write_bytes(pickle.dumps({
            'G_ema': Persistent(weights, source, **SETTINGS | settings), 'training_set_kwargs': EasyDict(path='x')},
            protocol))


@pytest.fixture(scope='module')
def weights():
    return drawn(shapes(WIDTHS, CHANNELS))


WRITERS = {'nvlabs.pt': lambda path, weights: torch.save(weights, path),
           'old.pt': lambda path, weights: torch.save(weights, path, _use_new_zipfile_serialization=False),
           'nvlabs.safetensors': lambda path, weights: save_file(weights, path),
           'rosinality.pt': lambda path, weights: torch.save(rosinality(weights), path),
           'new.pkl': persistent, 'tensorflow.pkl': tensorflow}


@pytest.mark.parametrize('name', list(WRITERS)[:-1])
def test_the_images_of_the_official_code_from_every_layout(tmp_path, weights, name):
    WRITERS[name](tmp_path / name, weights)
    generator = stylegan2(tmp_path / name)
    check(generator)
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())
    assert (generator.z_dim, generator.num_ws, generator.resolution) == (24, 8, 32)
    assert torch.equal(generator.mapping.w_avg, weights['mapping.w_avg'])


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_activations_are_bound_as_the_pickle_says(tmp_path, weights, protocol):
    persistent(tmp_path / 'x.pkl', weights, protocol, conv_clamp=1.5)
    check(stylegan2(tmp_path / 'x.pkl'), clamp=1.5)


def test_tensorflow_weights_are_those_of_nvlabs_conversion(tmp_path, weights):
    taps = torch.tensor([[1.], [3.], [3.], [1.]])
    weights = {name: taps @ taps.T / 64 if name.endswith('resample_filter') else v for name, v in weights.items()}
    tensorflow(tmp_path / 'x.pkl', weights, resample_kernel=[1, 3, 3, 1], conv_clamp=None)
    state = stylegan2(tmp_path / 'x.pkl').state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=2e-7)  # mod_bias is stored without its 1
    tensorflow(tmp_path / 'x.pkl', weights, resample_kernel=[1, 2, 1])
    with pytest.raises(Fail, match=r'resample_kernel \[1, 2, 1\], where only \[1, 3, 3, 1\] is known'):
        stylegan2(tmp_path / 'x.pkl')


def test_published_sizes(tmp_path):
    """512 px, config f: 30.277 M parameters in 163 entries (NVlabs) or 153 (rosinality). Zeros take no room."""
    published = shapes([512] * 9, [512] * 5 + [256, 128, 64])
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in published.items()}
    assert len(zeros) == 163 and len(rosinality(zeros)['g_ema']) == 153
    assert {k: tuple(v.shape) for k, v in StyleGAN2([8, 24, 24, 24], CHANNELS).state_dict().items()} == \
        shapes([8, 24, 24, 24], CHANNELS)
    for content in (zeros, rosinality(zeros)):
        torch.save(content, tmp_path / 'x.pt')
        generator = stylegan2(tmp_path / 'x.pt')
        assert {k: tuple(v.shape) for k, v in generator.state_dict().items()} == published
        assert sum(p.numel() for p in generator.parameters()) == 30_276_583
        assert (generator.z_dim, generator.num_ws, generator.resolution) == (512, 16, 512)


def test_gradients_reach_z_and_ws_and_the_length_of_z_has_no_effect(weights):
    generator = StyleGAN2(WIDTHS, CHANNELS)
    generator.load_state_dict(weights)
    z = latents()[:2].requires_grad_()
    ws = generator.mapping(z)[:, None].repeat(1, 8, 1)
    ws.retain_grad()
    generator.synthesis(ws).square().sum().backward()
    assert ws.grad.abs().sum((0, 2)).min() > 0 and z.grad.abs().max() > 0
    assert (z.grad * z).sum(1).abs().max() < 1e-4 * z.grad.norm() * z.norm()
    torch.testing.assert_close(generator.mapping(3.7 * z), generator.mapping(z), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=re.escape('(2, 7, 24) is not (B, 8, 24)')):
        generator.synthesis(ws[:, 1:])


def fails(path, *words):
    with pytest.raises(Fail) as failure:
        stylegan2(path)
    line = str(failure.value)
    assert str(path) in line and '\n' not in line and len(line) < 900 and 'Traceback' not in line
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize('name', WRITERS)
def test_damaged_files_are_one_line(tmp_path, weights, name):
    WRITERS[name](tmp_path / name, weights)
    for word in damages(tmp_path / name):
        fails(tmp_path / name, word)
    if name.endswith('pkl'):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        fails(tmp_path / name, 'cannot be read as the pickle of a network', 'copy or download it again')
    (tmp_path / name).unlink()
    fails(tmp_path / name, 'no such checkpoint')


def test_a_safetensors_file_may_begin_as_pickles_do(tmp_path, weights):
    for length in range(0, 256, 8):
        save_file(weights, tmp_path / 'x.safetensors', {'text': ' ' * length})
        if (tmp_path / 'x.safetensors').read_bytes()[0] == 0x80:
            return check(stylegan2(tmp_path / 'x.safetensors'))
    pytest.fail('no header had this length')


@pytest.mark.filterwarnings('ignore:Validating sparse')
def test_wrong_contents_are_named(tmp_path, weights):
    path, name = tmp_path / 'x.pt', 'synthesis.b16.conv1.weight'
    for content, *words in (
            ({k: v for k, v in weights.items() if k != name}, '32 px: missing', name),
            ({k: v for k, v in weights.items() if k != 'mapping.fc1.weight'}, 'missing mapping.fc1.weight'),
            ({**weights, name: 3}, 'missing', name),
            ({**weights, 'mapping.embed.weight': torch.zeros(2)}, 'unexpected mapping.embed.weight'),
            ({**weights, 'synthesis.b12.const': torch.zeros(2)}, 'unexpected synthesis.b12.const'),
            ({**weights, 'synthesis.b1.const': torch.zeros(2)}, 'unexpected synthesis.b1.const'),
            ({**weights, 'synthesis.b9999.const': torch.zeros(2)}, 'missing', '... ('),
            ({**weights, name: torch.zeros(16, 15, 3, 3)}, f'another shape {name} (16, 15, 3, 3)', '(16, 16, 3, 3)'),
            ({**weights, name: torch.zeros(())}, f'{name} ()'), ({**weights, name: weights[name].long()}, 'int64'),
            ({**weights, name: weights[name].to_sparse()}, f'another shape {name}'),
            ({k: torch.zeros(s) for k, s in shapes(WIDTHS, [0] * 4).items()}, '(0, 0, 3, 3)'),
            ({'g_ema': rosinality(weights)['g_ema']}, 'missing mapping.w_avg'),
            ({'synthesis.b1.const': torch.zeros(2)}, 'unexpected synthesis.b1.const'),
            *((content, 'no StyleGAN2 of a known layout') for content in (
                {'g_ema': 3}, {'g_ema': {'a': None}}, {'state_dict': weights}, {1: 2}, {}, [1], torch.zeros(3)))):
        torch.save(content, path)
        fails(path, *words)
    path = tmp_path / 'x.pkl'
    for settings, word in (({'activation': 'relu'}, 'mapping_nonlinearity relu'), ({'bias_gain': 1.0}, 'lrmul 1.0'),
                           ({'conv_clamp': 'much'}, 'no StyleGAN2')):
        persistent(path, weights, **settings)
        fails(path, word)
    for content in ((1, 2, 3), {'G_ema': {}}, {'G': 1}, [], 'text', None):
        path.write_bytes(pickle.dumps(content))
        fails(path, 'no StyleGAN2 of a known layout')


class Runs:
    """What would leave a file behind, were it unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_file_is_run(tmp_path, weights):
    path, trace = tmp_path / 'x.pkl', tmp_path / 'trace'
    shell, code, inner = f'touch {trace}', f"open({str(trace)!r}, 'w')", tmp_path / 'inner.pt'
    torch.save(Runs(os.system, shell), inner, _use_new_zipfile_serialization=False)
    for value, name in ((Runs(os.system, shell), 'posix.system'), (Runs(eval, code), 'builtins.eval'),
                        (Runs(torch.storage._load_from_bytes, inner.read_bytes()), 'posix.system'),
                        (Runs(torch.load, str(inner), None, None), 'torch.serialization.load'),
                        (Runs(operator.attrgetter, 'real'), 'operator.attrgetter')):
        for content in (value, {'G_ema': value}, {'G_ema': {}, 'D': [value]}, (1, 2, value)):
            for protocol in (3, 4):
                path.write_bytes(pickle.dumps(content, protocol))
                line = fails(path, 'save the state_dict of G_ema alone')
                assert re.search(f'holds objects of {name}, whose code would have to run', line)
                assert not trace.exists()
    for name in ('x.pt', 'x.safetensors'):
        for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
            write({'g_ema': Runs(os.system, shell)}, tmp_path / name)
            fails(tmp_path / name)
            assert not trace.exists()
    persistent(path, weights, source=code)
    check(stylegan2(path))
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Runs(os.system, shell)))
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


def test_a_pickle_cannot_forge_arrays(tmp_path, weights):
    """numpy's own dtype and array take raw bytes for pointers; ours hold numbers of the size that they say, or none."""
    path, data = tmp_path / 'x.pkl', bytes(8)
    for dtype, buffer in (('O8', data), ('f4', data[:3]), ('V8', data), ('f4', [1])):
        tensorflow(path, weights)
        found = path.read_bytes()
        scalar = np.float32(0).__reduce__()[0]

        class Forged:
            def __reduce__(self, dtype=dtype, buffer=buffer):
                return scalar, (np.dtype(dtype), buffer)
        with modules(dnnlib__util=[EasyDict], dnnlib__tflib__network=[Network]):
            content = pickle.loads(found)
            content[2].variables[0] = 'dlatent_avg', Forged()
            path.write_bytes(pickle.dumps(content, 4))
        fails(path)


# ---------------------------------------------------------------------------------------------------
# BigGAN

def biggan_layout(ch=96, parts=(16, 16, 8, 4, 2, 1), chunk=20, condition=128, attention=3, feature=None):
    """{name: shape}, as it stands the 166 entries of BigBiGAN_x1.pth. parts: widths / ch. condition: beside the chunk.
    feature: (outputs, inputs) of IC-GAN's layer."""
    found, widths = {'shared.weight': (1000, 128), 'linear.weight': (256 * ch, chunk), 'linear.bias': (256 * ch,)}, \
        tuple(part * ch for part in parts)
    normed = {'linear': 256 * ch, 'output_layer.2': 3}
    if feature:
        found |= {'shared_feat.weight': feature, 'shared_feat.bias': feature[:1]}
        normed['shared_feat'] = feature[0]
    for b, (i, o) in enumerate(zip(widths, widths[1:])):
        for conv, shape in (('conv1', (o, i, 3, 3)), ('conv2', (o, o, 3, 3)), ('conv_sc', (o, i, 1, 1))):
            found |= {f'blocks.{b}.0.{conv}.weight': shape, f'blocks.{b}.0.{conv}.bias': (o,)}
            normed[f'blocks.{b}.0.{conv}'] = o
        for norm, c in (('bn1', i), ('bn2', o)):
            for kind in ('gain', 'bias'):
                found[f'blocks.{b}.0.{norm}.{kind}.weight'] = (c, condition + chunk)
                normed[f'blocks.{b}.0.{norm}.{kind}'] = c
            found |= {f'blocks.{b}.0.{norm}.stored_{kind}': (c,) for kind in ('mean', 'var')}
    c = widths[attention + 1]
    for name, (o, i) in dict(theta=(c // 8, c), phi=(c // 8, c), g=(c // 2, c), o=(c, c // 2)).items():
        found[f'blocks.{attention}.1.{name}.weight'] = (o, i, 1, 1)
        normed[f'blocks.{attention}.1.{name}'] = o
    found |= {f'blocks.{attention}.1.gamma': (), 'output_layer.2.weight': (3, widths[-1], 3, 3),
              'output_layer.2.bias': (3,)}
    found |= {f'output_layer.0.{name}': widths[-1:] for name in ('gain', 'bias', 'stored_mean', 'stored_var')}
    return found | {f'{name}.u0': (1, o) for name, o in normed.items()} | {f'{name}.sv0': (1,) for name in normed}


def biggan_state(ch=8, **sizes):
    """Weights as the original codes got them when the numbers below were taken."""
    random, found = np.random.default_rng(0), {}
    for name, shape in sorted(biggan_layout(ch, **sizes).items()):
        value = random.standard_normal(shape).astype(np.float32)
        if name == 'shared.weight' and not sizes:
            value = np.repeat(value[:1], shape[0], 0)
        elif name.endswith('_var'):
            value = np.abs(value) + 1
        elif name.endswith('sv0'):
            value = np.ones(shape, np.float32)
        elif name.endswith('.bias') and len(shape) == 1 or name.endswith('stored_mean'):
            value = value / 10
        elif name.endswith('layer.0.gain'):
            value = 1 + value / 10
        found[name] = torch.from_numpy(np.asarray(value))
    return found


def narrow(monkeypatch, ch=8):
    monkeypatch.setattr(gan, 'BIGBIGAN', {**gan.BIGBIGAN, 'widths': [16 * ch, 16 * ch, 8 * ch, 4 * ch, 2 * ch, ch]})


def test_bigbigan_has_the_published_layout():
    layout = biggan_layout()
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes)
    buffers = ('u0', 'sv0', 'stored_mean', 'stored_var')
    assert len(layout) == 166
    assert count(shape for name, shape in layout.items() if not name.endswith(buffers)) == 70_433_988
    assert 4 * count(layout.values()) == 281_990_528
    with torch.device('meta'):
        network = gan.BigGAN(**gan.BIGBIGAN)
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == {'shared': (128,)} | {
        name: shape for name, shape in layout.items() if not name.endswith(('u0', 'sv0', 'shared.weight'))}
    assert (network.chunks, network.chunk, network.resolution) == (6, 20, 128)


def test_bigbigan_gives_the_images_of_the_original_code(tmp_path, monkeypatch):
    """lukemelas/pytorch-pretrained-gans at 2982fda, this state, this z; ours differed from it by 0.0 everywhere, with
    the published 96 channels too."""
    narrow(monkeypatch)
    torch.save(biggan_state(), tmp_path / 'b.pth')
    z = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 120)).astype(np.float32))
    network = gan.biggan(tmp_path / 'b.pth')
    image = network(z)
    for place, value in {(0, 0, 0, 0): -.054024, (0, 1, 64, 64): -.349553, (1, 2, 127, 3): .265665,
                         (2, 0, 31, 100): -.150209, (2, 2, 90, 17): .225840}.items():
        assert image[place].item() == pytest.approx(value, abs=1e-5)
    assert image.mean().item() == pytest.approx(-.096870, abs=1e-5)
    assert image.std().item() == pytest.approx(.247464, abs=1e-5)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    z.requires_grad_()
    gradient, = torch.autograd.grad(network(z).square().sum(), z)
    assert (gradient.view(3, 6, 20).norm(dim=2) > 0).all()


def test_files_that_are_no_bigbigan(tmp_path, monkeypatch):
    narrow(monkeypatch)
    state = biggan_state()
    for content, message in (
            ({'model': state}, 'b.pth: is not the state dict of a BigBiGAN generator'),
            ({**state, 'shared.weight': torch.randn(1000, 128)}, 'b.pth: is conditioned on classes'),
            ({k: v for k, v in state.items() if not k.startswith('blocks.4')}, 'does not fit its network.*blocks.4'),
            ({**state, 'linear.bias': torch.zeros(7)}, 'b.pth: does not fit its network.*linear.bias')):
        torch.save(content, tmp_path / 'b.pth')
        with pytest.raises(Fail, match=message):
            gan.biggan(tmp_path / 'b.pth')
    torch.save(state, tmp_path / 'b.pth')
    for word in damages(tmp_path / 'b.pth'):
        with pytest.raises(Fail, match=f'b.pth: .*{word}'):
            gan.biggan(tmp_path / 'b.pth')


def test_folders_of_embedded_gans(tmp_path):
    folder = small_gan(tmp_path / 'gan')
    assert gan.biggan(folder)(torch.randn(2, 48)).shape == (2, 3, 32, 32)
    config = (folder / 'config.json').read_text()
    for text, message in (('{"widths": 3}', 'does not fit its network'), ('{}', 'does not fit'),
                          ('[', 'config.json: is no JSON'),
                          (config.replace('"chunk": 8', '"chunk": 9'), 'does not fit its network')):
        (folder / 'config.json').write_text(text)
        with pytest.raises(Fail, match=message):
            gan.biggan(folder)
    with pytest.raises(Fail, match='config.json'):
        gan.biggan(tmp_path)


ICGAN = {64: dict(parts=(16, 16, 8, 4, 2), chunk=24, attention=2), 128: dict(parts=(16, 16, 8, 4, 2, 1), chunk=20),
         256: dict(parts=(16, 16, 8, 8, 4, 2, 1), chunk=17)}


@pytest.mark.parametrize('side, labelled, ch, entries, millions', [
    (64, False, 64, 142, 36.656), (128, False, 96, 170, 77.160), (256, False, 96, 198, 90.014),
    (256, False, 64, 198, 42.861), (256, True, 96, 198, 92.300), (128, True, 96, 170, 79.052)])
def test_icgans_have_the_published_layouts(side, labelled, ch, entries, millions):
    """As the original code makes them from its config files, counted there. Nothing but the shapes tells which it is;
    the embedding of classes, which no block of an unconditional one sees, goes."""
    layout = biggan_layout(ch, **ICGAN[side], condition=512 + 128 * labelled, feature=(512, 2048))
    kept = {name: shape for name, shape in layout.items() if not name.endswith(('u0', 'sv0'))}
    parameters = sum(int(np.prod(shape)) for name, shape in kept.items() if not re.search('stored_(mean|var)$', name))
    assert len(layout) == entries and round(parameters / 1e6, 3) == millions
    with torch.device('meta'):
        network = gan.BigGAN(**gan._icgan_sizes({name: torch.empty(shape) for name, shape in layout.items()}))
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == {name: shape for name, shape in kept.items() if labelled or name != 'shared.weight'}
    assert (network.resolution, network.chunks, network.chunk) == (
        side, len(ICGAN[side]['parts']), ICGAN[side]['chunk'])
    assert (network.feature, network.classes, network.levels) == (2048, 1000 * labelled, False)


@pytest.mark.parametrize('side, labelled, mean, std, pixels', [
    (64, False, .227564, .392497, (.309971, -.088595, .222202, .030102, .896768)),
    (128, False, -.105336, .198529, (.400096, -.108228, -.075512, .021870, -.199953)),
    (256, False, -.024907, .239125, (.398333, -.622488, .048870, -.195442, .272555)),
    (128, True, -.581397, .299681, (-.418218, -.352371, -.475011, -.343741, -.631638)),
    (256, True, -.266308, .444603, (-.188035, -.503401, -.651677, -.582695, -.059425))])
def test_icgan_gives_the_images_of_the_original_code(tmp_path, side, labelled, mean, std, pixels):
    """facebookresearch/ic_gan at 8eff2f7 in eval mode, this state, latent, feature and class; ours differed from it by
    0.0 everywhere."""
    sizes = ICGAN[side]
    torch.save(biggan_state(4, **sizes, condition=32 + 128 * labelled, feature=(32, 2048)), tmp_path / 'g.pth')
    network, random = gan.icgan(tmp_path / 'g.pth'), np.random.default_rng(1)
    z, feature = (torch.from_numpy(random.standard_normal((3, n)).astype(np.float32))
                  for n in (sizes['chunk'] * len(sizes['parts']), 2048))
    image = network(z, F.normalize(feature), torch.tensor([3, 700, 999]) if labelled else None)
    places = ((0, 0, 0, 0), (0, 1, side // 2, side // 2), (1, 2, side - 1, 3), (2, 0, 31, side - 28),
              (2, 2, side - 38, 17))
    assert [image[place].item() for place in places] == pytest.approx(pixels, abs=1e-5)
    assert (image.mean().item(), image.std().item()) == pytest.approx((mean, std), abs=1e-5)
    assert image.shape == (3, 3, side, side) and not any(p.requires_grad for p in network.parameters())


def test_files_that_are_no_icgan(tmp_path):
    path, names = tmp_path / 'g.pth', 'give G_ema_best0.pth or G_ema_best1.pth'
    state = biggan_state(4, **ICGAN[64], condition=32, feature=(32, 24))
    for content, message in (
            (biggan_state(), f'g.pth: is not the state dict of an IC-GAN generator .*; of .* {names}'),
            ({'config': {'G_activation': torch.nn.ReLU()}}, f'holds objects of .*ReLU.*; of .* {names}'),
            ({k: v for k, v in state.items() if k != 'blocks.1.0.conv2.bias'}, 'does not fit its network.*conv2'),
            ({k: v for k, v in state.items() if k != 'blocks.0.0.bn1.gain.weight'}, 'does not fit .*bn1.gain'),
            ({**state, 'shared_feat.u0': 3}, 'g.pth: does not fit its network'),
            ({**state, 'shared_feat.bias': torch.zeros(7)}, 'g.pth: does not fit its network.*shared_feat.bias')):
        torch.save(content, path)
        with pytest.raises(Fail, match=message) as error:
            gan.icgan(path)
        assert '\n' not in str(error.value)
    torch.save(state, path)
    for word in damages(path):
        with pytest.raises(Fail, match=f'g.pth: .*{word}') as error:
            gan.icgan(path)
        assert names not in str(error.value)
    with pytest.raises(Fail, match='gan: its config.json names no feature'):
        gan.icgan(small_gan(tmp_path / 'gan'))


def test_folders_of_embedded_icgans(tmp_path):
    """With and without a level among the inputs, and with classes."""
    for name, changes in dict(plain={}, levels={'levels': True}, classes={'classes': [5, 3]}).items():
        network = gan.icgan(small_gan(tmp_path / name, feature=7, **changes))
        labels = torch.arange(2) if changes.get('classes') else None
        assert network(torch.randn(2, 48), torch.randn(2, 7), labels).shape == (2, 3, 32, 32)
        assert network.levels == (name == 'levels') and network.classes == 5 * (name == 'classes')
    assert gan.icgan(tmp_path / 'levels').feature_mean.shape == (6,)
    with pytest.raises(Fail, match='levels: is conditioned on features of images'):
        gan.biggan(tmp_path / 'levels')
