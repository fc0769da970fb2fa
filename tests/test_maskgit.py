"""MaskGIT gives the logits, tokens and images of the original codes; its files; masks and decoders; stage 2 with it."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import gen_views  # noqa: E402
import maskgit  # noqa: E402
from chunks import read_chunk  # noqa: E402
from config import Fail  # noqa: E402
from conftest import damages, picture  # noqa: E402
from data import open_beton  # noqa: E402
from maskgit import MaskGIT, decode, load_transformer, load_vqgan, schedule, token_mask  # noqa: E402
from test_gen_views import generate  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = dict(width=48, depth=2, hidden=64, tokens=16, codes=20)
SMALL_VQGAN = dict(channels=(32, 32, 64), z=16, codes=20, embedding=8)


def transformer_layout(width=768, depth=24, hidden=3072, tokens=256, codes=1024, classes=1000):
    """The entries of the port's transformer, {name: shape}, written from what is published of them."""
    ids, both = codes + 1 + classes + 1, lambda name, *shape: {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    found = {'tok_emb.weight': (ids, width), 'pos_emb': (1, tokens + 1, width), 'bias': (tokens + 1, ids)}
    for name, linear in (('first_layer.0', 0), ('first_layer.2', 1), ('first_layer.4', 0), ('first_layer.6', 1),
                         ('last_layer.0', 0), ('last_layer.2', 1), ('last_layer.4', 0)):
        found |= both(name, width, width) if linear else both(name, width)
    for i in range(depth):
        layer = f'transformer.layers.{i}'
        found |= {f'{layer}.0.fn.mha.in_proj_weight': (3 * width, width),
                  f'{layer}.0.fn.mha.in_proj_bias': (3 * width,)}
        found |= both(f'{layer}.0.fn.mha.out_proj', width, width) | both(f'{layer}.0.norm', width)
        found |= both(f'{layer}.1.fn.net.0', hidden, width) | both(f'{layer}.1.fn.net.3', width, hidden)
        found |= both(f'{layer}.1.norm', width)
    return found


def vqgan_layout(channels=(128, 128, 256, 256, 512), z=256, codes=1024, embedding=256):
    """The entries of taming's VQGAN but for its loss, {name: shape}, with attention at the last level."""
    last, both = len(channels) - 1, lambda name, *shape: {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    found = {'quantize.embedding.weight': (codes, embedding), **both('quant_conv', embedding, z, 1, 1),
             **both('post_quant_conv', z, embedding, 1, 1)}

    def residual(name, i, o):
        short = both(f'{name}.nin_shortcut', o, i, 1, 1) if i != o else {}
        return {**both(f'{name}.norm1', i), **both(f'{name}.conv1', o, i, 3, 3), **both(f'{name}.norm2', o),
                **both(f'{name}.conv2', o, o, 3, 3), **short}

    def attention(name, c):
        return {**both(f'{name}.norm', c), **{k: v for part in ('q', 'k', 'v', 'proj_out')
                                              for k, v in both(f'{name}.{part}', c, c, 1, 1).items()}}

    for side, first, out in (('encoder', both('encoder.conv_in', channels[0], 3, 3, 3), z),
                             ('decoder', both('decoder.conv_in', channels[-1], z, 3, 3), 3)):
        c = channels[-1]
        found |= first | residual(f'{side}.mid.block_1', c, c) | attention(f'{side}.mid.attn_1', c)
        found |= residual(f'{side}.mid.block_2', c, c)
        ends = channels[-1] if side == 'encoder' else channels[0]
        found |= both(f'{side}.norm_out', ends) | both(f'{side}.conv_out', out, ends, 3, 3)
    for i, c in enumerate(channels):
        for j in range(2):
            found |= residual(f'encoder.down.{i}.block.{j}', channels[max(0, i - 1)] if j == 0 else c, c)
        for j in range(3):
            found |= residual(f'decoder.up.{i}.block.{j}', channels[min(last, i + 1)] if j == 0 else c, c)
        for name, blocks in (('encoder.down', 2), ('decoder.up', 3)) if i == last else ():
            for j in range(blocks):
                found |= attention(f'{name}.{i}.attn.{j}', c)
        if i < last:
            found |= both(f'encoder.down.{i}.downsample.conv', c, c, 3, 3)
        if i > 0:
            found |= both(f'decoder.up.{i}.upsample.conv', c, c, 3, 3)
    return found


def drawn(layout):
    """Weights as the original codes got them when the numbers below were taken."""
    random, found = np.random.default_rng(0), {}
    for name in sorted(layout):
        value = random.standard_normal(layout[name])
        if name in ('pos_emb', 'bias') or value.ndim == 1:
            value = value / 10 + ('norm' in name or '_layer.0' in name or '_layer.4' in name) * name.endswith('weight')
        elif 'emb' not in name:
            value = value / math.sqrt(value[0].size)
        found[name] = torch.from_numpy(np.asarray(value, np.float32))
    return found


def published(folder):
    """Small files in the published layouts: (transformer, VQGAN)."""
    torch.save({'iter': 3, 'global_epoch': 1, 'model_state_dict': drawn(transformer_layout(**SMALL)),
                'optimizer_state_dict': {'state': {}}}, folder / 'MaskGIT.pth')
    torch.save({'state_dict': {**drawn(vqgan_layout(**SMALL_VQGAN)), 'loss.logvar': torch.zeros(())}, 'epoch': 2},
               folder / 'last.ckpt')
    return folder / 'MaskGIT.pth', folder / 'last.ckpt'


def pixels(count=3, side=16):
    """(count, 3, side, side) in -1..1."""
    return torch.from_numpy(np.random.default_rng(2).uniform(-1, 1, (count, 3, side, side)).astype(np.float32))


def some_tokens():
    """(3, 16) tokens of which 5 are masked (20)."""
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 20, (3, 16)))
    return tokens.index_fill(1, torch.tensor([0, 5, 6, 9, 12]), 20)


# ---------------------------------------------------------------------------------------------------
# Against the originals, with the weights of `drawn`

def test_published_sizes(tmp_path):
    """Zeros take no room."""
    for layout, entries, parameters, load in (
            (transformer_layout(), 305, 174_160_874, lambda path: load_transformer(path, 1024)),
            (vqgan_layout(), 343, 72_141_699, load_vqgan)):
        torch.save({name: torch.zeros(()).expand(shape) for name, shape in layout.items()}, tmp_path / 'x.pt')
        network = load(tmp_path / 'x.pt')
        assert len(layout) == len(network.state_dict()) == entries
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    with torch.device('meta'):
        network = maskgit.Transformer(1024, 1000, 256, 768, 24, 16, 3072)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == transformer_layout()


@torch.no_grad()
def test_logits_of_the_port(tmp_path):
    """valeoai/Maskgit-pytorch at 5ce6c9e; ours differed by 0.0, at full size too."""
    network = load_transformer(published(tmp_path)[0], 20)
    logits = network(some_tokens(), torch.tensor([3, 999, 1000]))
    assert logits.shape == (3, 16, 20)
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((-.310301, 7.369259), abs=1e-5)
    found = [logits[place].item() for place in ((0, 0, 0), (0, 5, 19), (1, 9, 7), (2, 15, 3), (2, 6, 11))]
    assert found == pytest.approx([.06609, -6.96856, .67230, -8.12810, 4.73104], abs=2e-5)


@torch.no_grad()
def test_codes_and_images_of_taming(tmp_path):
    """The port's copy of taming-transformers; all codes equal, images within 6e-6 (at full size within 2.4e-5)."""
    network, x = load_vqgan(published(tmp_path)[1]), pixels()
    codes = network.quantize(network.encode(x).latents)[2][2]
    assert codes[:16].tolist() == [17, 0, 17, 2, 17, 17, 9, 2, 14, 11, 17, 2, 9, 17, 2, 2] and codes.sum() == 445
    image = network.decoder(network.post_quant_conv(network.quantize.get_codebook_entry(codes, (3, 4, 4, -1))))
    assert (image.mean().item(), image.std().item()) == pytest.approx((.117511, .588374), abs=1e-5)
    found = [image[place].item() for place in ((0, 0, 0, 0), (0, 1, 8, 3), (1, 2, 15, 15), (2, 0, 4, 11))]
    assert found == pytest.approx([.20281, -.46930, -.02594, .17429], abs=3e-5)


def test_schedules():
    """Official: the fp32 of JAX gives 22 22 for 21 23, as its cos(60 degrees) is just below a half."""
    assert schedule('official', 196, 256, 12) == [2, 5, 8, 12, 14, 17, 19, 21, 23, 25, 25, 25]
    assert schedule('official', 256, 256, 8) == [5, 15, 24, 31, 39, 45, 48, 49]
    assert schedule('port', 256, 256, 8) == [1, 18, 26, 32, 38, 43, 48, 50]
    assert schedule('port', 256, 256, 12) == [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35]
    assert schedule('port', 196, 256, 12) == [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 7, 0]
    for decoder in ('official', 'port'):
        for masked in (1, 2, 30, 63):
            for steps in (1, 2, 7, 64, 90):
                counts = schedule(decoder, masked, 64, steps)
                assert sum(counts) == masked and len(counts) == steps and min(counts) >= 0


def decoded(guidance=0.0, sharpness=1.0, **keys):
    """Two rows of 8 x 8 tokens, the ring kept, of 50 codes, 8 steps: numbers and logits that the originals got too."""
    random = np.random.default_rng(7)
    mix, codebook, label = (random.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (51, 50), 50))
    tokens, numbers = random.integers(0, 50, (2, 8, 8)), random.random((2, 8, 2, 64), dtype=np.float32)
    tokens[:, 1:7, 1:7] = 50
    mix, codebook, label, tokens, numbers = map(torch.from_numpy, (mix, codebook, label, tokens, numbers))

    def predict(found, progress):
        free = torch.einsum('pq,bqc->bpc', mix, codebook[found]) * 0.3
        return free + (1 + guidance * progress) * label
    return tokens.flatten(1), decode(tokens.flatten(1), 50, predict, numbers, sharpness=sharpness, **keys)


NUMBERS = {  # keys: sums of the rows, tokens 27 to 36 of the first (31 and 32 are of the ring)
    (): ([1880, 1728], [0, 48, 48, 42, 7, 46, 0, 48, 47, 44]),
    (('decoder', 'port'),): ([1934, 1771], [33, 48, 6, 42, 7, 46, 0, 48, 33, 48]),
    (('decoder', 'port'), ('guidance', 3)): ([2302, 2083], [42, 48, 48, 42, 7, 46, 0, 48, 48, 48]),
    (('decoder', 'port'), ('guidance', 3), ('sharpness', 0.7)): ([2191, 2018], [38, 48, 48, 42, 7, 46, 0, 49, 48, 48])}


@pytest.mark.parametrize('case', NUMBERS)
def test_tokens_of_the_original_decoders(case):
    """maskgit's parallel_decode.decode (google-research at 1db2359) and the port's sample, given these numbers."""
    before, after = decoded(**dict(case))
    assert (after[before != 50] == before[before != 50]).all() and after.max() < 50
    assert (after.sum(1).tolist(), after[0, 27:37].tolist()) == NUMBERS[case]


def test_masks():
    numbers = torch.rand(40, 64, generator=torch.Generator().manual_seed(0))
    ring = token_mask(8, 1, 1.0, False, numbers).view(-1, 8, 8)
    assert ring[:, 1:7, 1:7].all() and ring.sum() == 40 * 36 and (token_mask(8, 1, 1.0, True, numbers) == ring[0].view(
        64)).all()
    for block, count in ((False, 18), (True, 16)):
        mask = token_mask(8, 1, 0.5, block, numbers)
        assert (mask.sum(1) == count).all() and not (mask & ~ring.flatten(1)).any()
        assert mask.any(0).sum() == 36 and len(mask.unique(dim=0)) > 8
        assert (token_mask(8, 1, 0.5, block, numbers[3:4]) == mask[3]).all()
    rows, columns = mask.view(-1, 8, 8).any(2), mask.view(-1, 8, 8).any(1)
    assert (rows[:, :, None] & columns[:, None] == mask.view(-1, 8, 8)).all() and (rows.sum(1) == 4).all()


# ---------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize('name', ['pytorch_lightning.callbacks.model_checkpoint', 'os'])
def test_lightnings_checkpoint_names_classes_of_which_none_is_run(tmp_path, monkeypatch, name):
    module = sys.modules.get(name) or type(sys)(name)
    named = type('ModelCheckpoint', (), {'__module__': name})
    for part in [name.rsplit('.', k)[0] for k in range(name.count('.') + 1)]:
        monkeypatch.setitem(sys.modules, part, module if part == name else sys.modules.get(part) or type(sys)(part))
    monkeypatch.setattr(module, 'ModelCheckpoint', named, raising=False)
    _, path = published(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, 'callbacks': {named: {'best_model_score': torch.zeros(())}}}, path)
    monkeypatch.undo()
    if name == 'os':
        with pytest.raises(Fail, match='last.ckpt: holds objects of os.ModelCheckpoint, whose code would have to run'):
            load_vqgan(path)
    else:
        assert load_vqgan(path).config.num_vq_embeddings == 20


def test_files_that_are_none(tmp_path):
    for path, load in zip(published(tmp_path), (lambda path: load_transformer(path, 20), load_vqgan)):
        whole = path.read_bytes()
        for word in damages(path):
            with pytest.raises(Fail, match=f'{path.name}: .*{word}') as error:
                load(path)
            assert '\n' not in str(error.value)
        state = next(v for k, v in torch.load(path, weights_only=True).items() if k.endswith('state_dict'))
        last = next(key for key in state if key.endswith('out.bias') or key == 'last_layer.4.bias')
        for content, message in (({}, 'holds no '), ([1], 'holds no '), ({'state_dict': 3}, 'holds no '),
                                 ({k: v for k, v in state.items() if k != last}, 'does not fit its network'),
                                 ({**state, 'more': torch.zeros(1)}, 'does not fit its network')):
            torch.save(content, path)
            with pytest.raises(Fail, match=f'{path.name}: {message}'):
                load(path)
        path.write_bytes(whole)
    with pytest.raises(Fail, match='MaskGIT.pth: has 20 codes beside 1000 classes, its VQGAN 64'):
        load_transformer(tmp_path / 'MaskGIT.pth', 64)
    torch.save(drawn(transformer_layout(**{**SMALL, 'tokens': 15})), tmp_path / 'x.pth')
    with pytest.raises(Fail, match='x.pth: its 15 tokens are no square grid'):
        load_transformer(tmp_path / 'x.pth', 20)


# ---------------------------------------------------------------------------------------------------
# The generator

MASK = {'vqgan': '', 'keep_border': 1, 'share': 1.0, 'block': False, 'decoder': 'official', 'steps': 4,
        'temperature': 4.5, 'sharpness': 1.0, 'labels': False, 'guidance': 0.0}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model of ours with random weights: 16 px, 8 x 8 tokens, 20 codes, 3 classes."""
    from diffusers import VQModel
    folder = tmp_path_factory.mktemp('maskgit')
    torch.manual_seed(0)
    vqgan = VQModel(block_out_channels=(32, 32), down_block_types=('DownEncoderBlock2D',) * 2, sample_size=16,
                    up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=4, num_vq_embeddings=20)
    with torch.no_grad():  # codes that all occur
        vqgan.quantize.embedding.weight.copy_(vqgan.encode(pixels(5)).latents.transpose(0, 1).flatten(1).T[::16])
    vqgan.save_pretrained(folder / 'vqgan')
    network = maskgit.Transformer(20, 3, tokens=64, width=32, depth=2, heads=4, hidden=32)
    torch.nn.init.normal_(network.bias)
    network.tok_emb.weight.data *= 0.3  # several codes are likely
    save_file(network.state_dict(), folder / 'transformer.safetensors')
    (folder / 'config.json').write_text(json.dumps({'heads': 4, 'classes': 3}))
    return folder


def generator(folder, classes=0, precision='fp32', **mask):
    return MaskGIT({'model': str(folder), 'precision': precision, 'mask': {**MASK, **mask}}, torch.device('cpu'),
                   classes)


def pictures(count):
    return [Image.fromarray(picture(seed)) for seed in range(count)]


@pytest.mark.parametrize('mask', [{}, {'share': 0.5}, {'share': 0.3, 'block': True}, {'decoder': 'port'},
                                  {'labels': True, 'guidance': 2.0}])
def test_a_view_depends_on_its_image_label_and_seed_alone(folder, mask):
    made = generator(folder, 3, **mask)
    images, labels, seeds = pictures(5), np.array([0, 1, 2, 0, 1]), [3, 4, 2 ** 62, 6, 7]
    codes = made.embed(images)
    views = made.views(codes, labels, seeds)
    assert views.shape == (5, 16, 16, 3) and views.dtype == np.uint8 and views.std() > 5
    for k in (0, 2, 4):
        alone = made.views(made.embed(images[k:k + 1]), labels[k:k + 1], seeds[k:k + 1])
        assert np.abs(alone[0].astype(int) - views[k]).max() <= 1  # rounding
    assert (made.views(codes, labels, [3, 9, 2 ** 62, 6, 9])[1:5:3] != views[1:5:3]).any((1, 2, 3)).all()
    changed = made.views(codes, (labels + 1) % 3, seeds) != views
    assert changed.any() == bool(mask.get('labels'))


def test_what_is_kept_is_what_was_there(folder, monkeypatch):
    made, seen = generator(folder), []
    monkeypatch.setattr(made.vqgan.quantize, 'get_codebook_entry', lambda codes, shape: seen.append(codes) or
                        type(made.vqgan.quantize).get_codebook_entry(made.vqgan.quantize, codes, shape))
    codes = made.embed(pictures(3))
    views = made.views(codes, np.zeros(3, int), [1, 2, 3])
    before, after = codes.view(3, 8, 8).clone(), seen[0].view(3, 8, 8)
    assert (before != after).float()[:, 1:7, 1:7].mean() > 0.5
    before[:, 1:7, 1:7] = after[:, 1:7, 1:7]
    assert (before == after).all() and after.max() < 20
    assert made.masked == 36 and (made.side, made.resolution) == (8, 16) and (views[0] != views[1]).any()


def test_what_is_not_finite_is_drawn_in_fp32_or_black(folder, monkeypatch):
    made, calls = generator(folder, precision='bf16'), []
    whole = generator(folder).views(made.embed(pictures(3)), np.zeros(3, int), [1, 2, 3])
    forward = maskgit.Transformer.forward

    def damaged(self, tokens, labels):
        logits = forward(self, tokens, labels)
        if torch.is_autocast_enabled('cpu') or len(calls) > 20:
            logits[-1, 9, 4] = torch.nan
        calls.append(len(tokens))
        return logits
    monkeypatch.setattr(maskgit.Transformer, 'forward', damaged)
    views = made.views(made.embed(pictures(3)), np.zeros(3, int), [1, 2, 3])
    assert calls == [3] * 4 + [1] * 4 and np.abs(views[2].astype(int) - whole[2]).max() <= 1
    assert views.any((1, 2, 3)).all()
    calls += range(20)
    assert not made.views(made.embed(pictures(3)), np.zeros(3, int), [1, 2, 3])[2].any()
    monkeypatch.undo()
    made.vqgan.decoder.conv_out.bias.data[0] = torch.inf
    assert not made.views(made.embed(pictures(3)), np.zeros(3, int), [1, 2, 3]).any()


@pytest.mark.parametrize('mask, classes, message', [
    ({'keep_border': 4}, 0, 'generator.mask: keep_border and share leave 64 of the 8 x 8 tokens'),
    ({'keep_border': 9}, 0, 'leave 64 of'), ({'share': 0.0}, 0, 'leave 64 of'), ({'keep_border': 0}, 0, 'leave 0 of'),
    ({'share': 0.001, 'block': True}, 0, 'leave 64 of'),
    ({'labels': True}, 0, 'generator.mask.labels: the images have 0 classes, .* knows 3; set it to false'),
    ({'labels': True}, 10, 'the images have 10 classes'), ({'vqgan': 'none'}, 0, 'none: no such checkpoint')])
def test_masks_and_labels_that_cannot_be(folder, mask, classes, message):
    with pytest.raises(Fail, match=message) as error:
        generator(folder, classes, **mask)
    assert '\n' not in str(error.value)


def test_published_files_and_folders_that_do_not_fit(folder, tmp_path):
    model, vqgan = published(tmp_path)
    made = generator(model, 1000, vqgan=str(vqgan), labels=True)
    assert (made.side, made.resolution, made.masked) == (4, 16, 4)
    assert made.views(made.embed(pictures(2)), np.array([0, 999]), [1, 2]).shape == (2, 16, 16, 3)
    with pytest.raises(Fail, match=r'generator.mask.vqgan: .*MaskGIT.pth needs the file of its VQGAN \(last.ckpt\)'):
        generator(model)
    for changes, message in (({'sample_size': 32}, r'its images of 32 px .sample_size. do not give the 8 x 8 tokens'),
                             ({'num_vq_embeddings': 21}, 'does not fit its network'), ({'depth': 3}, 'does not fit')):
        (tmp_path / 'vqgan').mkdir(exist_ok=True)
        config = json.loads((folder / 'vqgan/config.json').read_text())
        (tmp_path / 'vqgan/config.json').write_text(json.dumps({**config, **changes}))
        weights = 'diffusion_pytorch_model.safetensors'
        (tmp_path / f'vqgan/{weights}').write_bytes((folder / f'vqgan/{weights}').read_bytes())
        with pytest.raises(Fail, match=f'vqgan: {message}'):
            generator(folder, vqgan=str(tmp_path / 'vqgan'))
    (tmp_path / 'transformer.safetensors').write_bytes((folder / 'transformer.safetensors').read_bytes())
    (tmp_path / 'config.json').write_text('{"heads": 5, "classes": 3}')
    with pytest.raises(Fail, match='does not fit its network: embed_dim must be divisible by num_heads'):
        load_transformer(tmp_path, 20)
    (tmp_path / 'config.json').write_text('{"heads": 4}')
    with pytest.raises(Fail, match='config.json: heads and classes must be whole numbers'):
        load_transformer(tmp_path, 20)
    state = drawn(transformer_layout(**SMALL))
    torch.save({**state, 'bias': state['bias'] * torch.nan}, model)
    with pytest.raises(Fail, match='MaskGIT.pth: its weights are not finite'):
        generator(model, vqgan=str(vqgan))


# ---------------------------------------------------------------------------------------------------
# Stage 2

@pytest.fixture
def settings(tmp_path, folder):
    """Eleven images of three classes, one of them damaged."""
    for i in range(11):
        path = tmp_path / f'images/{"abc"[i % 3]}/{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    (tmp_path / 'images/b/04.png').write_bytes(b'not an image')
    return {'output': str(tmp_path / 'views'), 'dataset': {'name': 'folder', 'root': str(tmp_path / 'images')},
            'generator': {'kind': 'maskgit', 'model': str(folder), 'precision': 'fp32', 'mask': {'steps': 3}},
            'view_size': 16, 'view_format': 'png', 'beton_mode': 'raw', 'batch_size': 4, 'chunk_size': 4,
            'device': 'cpu'}


def test_stage_2(settings, folder, tmp_path, capsys):
    run = generate(settings, tmp_path)
    chunks = {path.name: path.read_bytes() for path in sorted(run.glob('views/*.tar'))}
    files = {name: content for path in run.glob('views/*.tar') for name, content in read_chunk(path).items()}
    records = {i: json.loads(files[f'{i:08d}.json']) for i in range(11)}
    failed, = (i for i in records if 'error' in records[i])
    assert records[failed]['path'] == 'b/04.png' and records[failed]['error'] == 'source image cannot be read'
    assert len(files) == 21 and {r['generator'] for r in records.values()} == {str(folder)}
    assert open_beton(run / 'pairs.beton')['samples'] == 10 and (run / 'pairs.png').stat().st_size > 1000
    stored = json.loads((run / 'settings.json').read_text())['generator']
    assert stored['kind'] == 'maskgit' and stored['mask'] == {**MASK, 'steps': 3} and 'guidance_scale' not in stored

    (run / 'views/000001.tar').unlink()
    (run / 'pairs.beton').unlink()
    generate(settings, tmp_path)
    assert {path.name: path.read_bytes() for path in sorted(run.glob('views/*.tar'))} == chunks
    generate(settings, tmp_path, verify=True)
    assert 'verify: 10 views in 3 chunks and pairs.beton' in capsys.readouterr().out
    mask = lambda **keys: {**settings['generator'], 'mask': {'steps': 3, **keys}}
    with pytest.raises(Fail, match='other settings: generator.mask.share .was 1.0, now 0.5'):
        generate(settings, tmp_path, generator=mask(share=0.5))

    labelled = generate(settings, tmp_path, generator=mask(labels=True, guidance=1), output=str(tmp_path / 'labelled'))
    assert any(path.read_bytes() != chunks[path.name] for path in labelled.glob('views/*.tar'))
    for changes, message in (
            (dict(generator=mask(guidance=1)), 'generator.mask.guidance: without labels there is nothing to guide by'),
            (dict(strategy='random'), 'strategy: random chooses noise levels, and generator.kind'),
            (dict(generator=mask(labels=True), dataset={'name': 'folder', 'root': str(tmp_path / 'images/a')}),
             'generator.mask.labels: the images have 0 classes'),
            (dict(generator={**mask(), 'model': ''}), 'generator.model: must name a folder'),
            (dict(generator=mask(keep_border=0)), 'leave 0 of')):
        with pytest.raises(Fail, match=message):
            generate(settings, tmp_path, output=str(tmp_path / 'not'), **changes)
    assert not (tmp_path / 'not/settings.json').exists()


def test_images_that_changed_after_the_views(settings, tmp_path):
    """No stage 1 has seen them: this run alone can know."""
    run, images = generate(settings, tmp_path, pack=False), tmp_path / 'images'
    (run / 'views/000002.tar').unlink()
    (images / 'a/00.png').rename(images / 'a/05.png')  # place 0 of the list is another image's now
    for changes in ({}, {'verify': True}):
        with pytest.raises(Fail, match=f'{run}: was made from other images: image 0 of 11 is a/03.png now'):
            generate(settings, tmp_path, **changes)
    assert not (run / 'views/000002.tar').exists() and not (run / 'pairs.beton').exists()
    (images / 'a/05.png').rename(images / 'a/00.png')
    generate(settings, tmp_path)
    (run / 'pairs.beton').unlink()
    (images / 'a/00.png').rename(images / 'a/05.png')
    with pytest.raises(Fail, match='image 0 of 11 is a/03.png now'):
        generate(settings, tmp_path)


def test_settings_of_unclip_are_what_they_were(tmp_path, monkeypatch):
    """A run of before this kind goes on: what is stored names neither kind nor mask."""
    seen = []
    monkeypatch.setattr(gen_views, 'same_settings', lambda path, settings, moved: seen.append(settings) or 1 / 0)
    monkeypatch.setattr(gen_views, 'noise_levels', lambda *_: (np.zeros(1, int), None, 7, None))
    Image.fromarray(picture(0)).save(tmp_path / '0.png')
    with pytest.raises(ZeroDivisionError):
        generate({'output': str(tmp_path / 'o'), 'proportions': 'x', 'dataset': {
            'name': 'folder', 'root': str(tmp_path)}, 'generator': {'model': 'x'}, 'device': 'cpu'}, tmp_path)
    assert seen[0]['generator'].keys() == {'model', 'fallbacks', 'steps', 'guidance_scale', 'precision'}
