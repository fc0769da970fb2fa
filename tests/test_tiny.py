"""The embedded models as they are shipped: their formats, and that the generator follows its condition."""
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]
import gen_views  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
from config import default_config  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from generators import ICGAN, UnCLIP  # noqa: E402
from latents import LatentGenerator  # noqa: E402
from loss import pair_quality  # noqa: E402
from maskgit import MaskGIT  # noqa: E402

SPEC = {'model': str(ROOT / 'tiny/unclip'), 'fallbacks': [], 'steps': 20, 'guidance_scale': 3.0, 'precision': 'fp32'}


def test_size_and_formats():
    weights = [p for p in (ROOT / 'tiny').rglob('*') if p.suffix in ('.safetensors', '.bin', '.pt', '.pth', '.npy')]
    sizes = {name: sum(p.stat().st_size for p in weights if p.relative_to(ROOT / 'tiny').parts[0] in name.split())
             for name in ('clip quality unclip', 'gan', 'icgan maskgit')}
    assert sum(sizes.values()) == sum(p.stat().st_size for p in weights)
    assert sizes['clip quality unclip'] <= 25e6 and sizes['gan'] <= 8e6 and sizes['icgan maskgit'] <= 12e6
    assert {p.suffix for p in weights} == {'.safetensors'}
    clip = FrozenClip({'model': str(ROOT / 'tiny/clip')})
    assert (clip.image_size, clip.token_dim, clip.embedding_dim) == (32, 192, train.SEMANTIC + train.APPEARANCE)
    generator = UnCLIP(SPEC, torch.device('cpu'))
    assert generator.embedding_dim == clip.embedding_dim and generator.latent_shape == (16, 8, 8)


def shipped_images():
    """The 20 CIFAR-10 images of tiny/views.png with their reconstructions and five views each, (7, 20, 3, 32, 32)."""
    pixels = torch.from_numpy(np.asarray(Image.open(ROOT / 'tiny/views.png').convert('RGB'))[::2, ::2].copy())
    return pixels.permute(2, 0, 1).unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4) / 255


def foreground_of(name):
    """Function of images (N, 3, 32, 32) in 0..1 -> maps (N, 8, 8), large on the foreground; the component's share."""
    clip = FrozenClip({'model': str(ROOT / 'tiny' / name)})

    def tokens(images):
        return clip.tokens((images - train.MEAN) / train.STD)
    pc, sign, explained, _ = report.component(tokens(shipped_images()[0]))
    return lambda images: sign * torch.einsum('bkhw,k->bhw', tokens(images), pc), explained


@pytest.mark.parametrize('name', ['clip', 'quality'])
def test_the_foreground_follows_the_subject(name):
    """A striped ellipse on textured ground, at 9 places of 8 grounds: it is the foreground wherever it lies. A map that
    is the same spot in every image, which looks right on photographs, has an area under the curve of 0.5 here."""
    foreground, explained = foreground_of(name)
    assert explained > 0.2
    generator, images, inside = torch.Generator().manual_seed(0), [], []
    at = torch.arange(32) + 0.5
    for _ in range(8):
        coarse = torch.rand(1, 3, 8, 8, generator=generator) * 0.25 + torch.rand(1, 3, 1, 1, generator=generator) * 0.5
        ground = torch.nn.functional.interpolate(coarse, size=(32, 32), mode='bilinear')[0]
        colour = (ground.mean((1, 2), keepdim=True) + 0.5) % 1
        for y in (7, 16, 25):
            for x in (7, 16, 25):
                blob = ((at - x) / 7).square() + ((at[:, None] - y) / 6).square() <= 1
                stripes = colour * (0.7 + 0.3 * torch.cos(at * 1.3))
                images.append(torch.where(blob, stripes, ground).clamp(0, 1))
                inside.append(torch.nn.functional.avg_pool2d(blob.float()[None], 4)[0])
    maps, inside = foreground(torch.stack(images)), torch.stack(inside)
    for place in range(9):
        values, hit = maps[place::9], inside[place::9]
        on, off = values[hit > 0.7], values[hit == 0]
        assert (on[:, None] > off).float().mean() > 0.75, place
    moved = torch.corrcoef(torch.stack([maps.flatten(), inside.flatten()]))[0, 1]
    place = maps.mean(0).var() / maps.var()
    assert moved > 0.5 and place < 0.35


@pytest.mark.parametrize('name', ['clip', 'quality'])
def test_the_foreground_of_photographs_moves_along(name):
    found = report.foreground_figures(foreground_of(name)[0], shipped_images()[:2].flatten(0, 1))
    # photographs upside down have their subjects at nearly the same place: the boxes that people drew correlate by 0.7
    for (same, along), more in ((found['flipped'], 0.15), (found['rolled'], 0.35)):
        assert along > 0.6 and along > same + more
    assert found['position'] < 0.4 and found['deviation'] > 0.15


def test_figures_of_a_foreground():
    """A map that follows brightness, and one that is a fixed spot."""
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    follows = report.foreground_figures(lambda x: torch.nn.functional.avg_pool2d(x, 4)[:, 0], images)
    spot = torch.linspace(0, 1, 64).view(8, 8)
    fixed = report.foreground_figures(lambda x: spot + 0.01 * torch.nn.functional.avg_pool2d(x, 4)[:, 0], images)
    for name in ('flipped', 'rolled'):
        assert follows[name][1] > 0.999 and abs(follows[name][0]) < 0.1
        assert fixed[name][0] > 0.99 and fixed[name][1] < 0.1
    assert follows['position'] < 0.05 and fixed['position'] > 0.99
    assert follows['fixed_mask'] < 0.7 and fixed['fixed_mask'] > 0.98
    assert follows['deviation'] > 0.04 and fixed['deviation'] < 0.01


def test_quality_encoder_prefers_a_view_of_the_same_image():
    """The pair quality (eq. 12) of the images of tiny/views.png with their own views and with those of another one."""
    clip, rows = FrozenClip({'model': str(ROOT / 'tiny/quality')}), shipped_images()
    assert (clip.image_size, clip.token_dim) == (32, 64)
    tokens = clip.tokens((rows.flatten(0, 1) - train.MEAN) / train.STD).unflatten(0, (7, 20))
    pc, sign, explained, _ = report.component(tokens[0])
    assert abs(pc[0]) > 0.9 and sign * pc[0] < 0 and explained > 0.25  # the first channel is high on surroundings
    images, views = tokens[:1].expand(5, -1, -1, -1, -1).flatten(0, 1), tokens[2:]
    own = pair_quality(images, views.flatten(0, 1), sign * pc)
    others = torch.stack([pair_quality(images, views.roll(k, 1).flatten(0, 1), sign * pc) for k in range(1, 20)])
    assert (own > others).float().mean() > 0.6


def test_text_tower_tells_names_apart():
    """tiny/clip is a whole CLIP for open_clip: names of classes, in any case, get directions of their own."""
    import open_clip
    name = f'local-dir:{ROOT / "tiny/clip"}'
    model, tokenize = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    with torch.no_grad():
        found = model.encode_text(tokenize(['goldfish', 'goose', 'sports car', 'Sports Car']), normalize=True)
    assert found.shape == (4, train.SEMANTIC + train.APPEARANCE)
    similarity = found @ found.T
    assert torch.equal(found[2], found[3]) and similarity[:3, :3].fill_diagonal_(-1).max() < 0.9


def test_tokens_of_trains_what_open_clip_runs():
    """train.tokens_of, without patches left out, is open_clip's own forward pass."""
    torch.manual_seed(0)
    visual = train.clip_model().visual.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = train.tokens_of(visual, images)
        some = train.tokens_of(visual, images, torch.arange(64).flip(0).expand(2, -1))
        expected = visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    torch.testing.assert_close(out[:, 0] @ visual.proj, expected['image_features'])
    torch.testing.assert_close(out[:, 1:].transpose(1, 2).unflatten(2, (8, 8)), expected['image_intermediates'][-1])
    torch.testing.assert_close(some[:, 1:].flip(1), out[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['unclip', 'icgan'])
def test_views_follow_their_condition_and_wander_with_the_noise_level(kind):
    """Views of 24 drawn embeddings, encoded again: nearest to their own condition several times as often as chance
    (1 in 24) would have it, and less and less alike at higher levels."""
    clip = FrozenClip({'model': str(ROOT / 'tiny/clip')})
    noise = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))
    if kind == 'unclip':
        generator = UnCLIP({**SPEC, 'steps': 6}, torch.device('cpu'))
        scale, unscale = generator.pipeline.image_normalizer.scale, generator.pipeline.image_normalizer.unscale
    else:
        generator = ICGAN({'model': str(ROOT / 'tiny/icgan'), 'condition': 'stored', 'noise': {'truncation': 0.0}},
                          torch.device('cpu'))
        center, spread = generator.network.feature_mean, generator.network.feature_std
        scale, unscale = (lambda x: (x - center) / spread), (lambda x: x * spread + center)
    assert generator.embedding_dim == clip.embedding_dim
    conditions = unscale(noise).detach()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
    similarity = []
    for level in (0, 400, 900):
        views = generator.views(conditions.numpy(), np.full(24, level), list(range(24)))
        assert views.shape == (24, 32, 32, 3) and views.std((1, 2, 3)).min() > 5
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2) / 255
        found = scale(clip.forward((pixels - mean) / std)[1]).detach()
        cosine = torch.nn.functional.cosine_similarity(found[:, None], scale(conditions).detach()[None], dim=2)
        own, others = cosine.diagonal().mean().item(), (cosine.sum() - cosine.trace()).item() / (24 * 23)
        similarity.append(own - others)
        if level == 0:
            assert (cosine.argmax(1) == torch.arange(24)).float().mean() > 4 / 24 - 1e-6
    assert similarity[0] > similarity[1] > similarity[2]


def test_a_mask_of_more_keeps_less_of_the_image():
    """MaskGIT's views of the 20 images of tiny/views.png: nearest to their own image's embedding five times as often as
    chance, also with all but the outer ring drawn; the fewer are drawn the nearer; another seed draws another view."""
    clip, images = FrozenClip({'model': str(ROOT / 'tiny/clip')}), shipped_images()[0]
    pil = [Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()) for image in images]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
    mask = default_config(gen_views.DEFAULTS)['generator']['mask']
    encode, found = lambda x: clip.forward((x - mean) / std)[1], []
    for share in (1.0, 0.5, 0.1):
        spec = {'model': str(ROOT / 'tiny/maskgit'), 'precision': 'fp32', 'mask': {**mask, 'share': share}}
        generator = MaskGIT(spec, torch.device('cpu'), 0)
        assert (generator.side, generator.resolution) == (8, 32)
        views, other = (torch.from_numpy(generator.views(generator.embed(pil), [0] * 20, seeds)) / 255
                        for seeds in (range(20), range(20, 40)))
        assert (views - other).abs().flatten(1).mean(1).min() > 0 or share < 0.5
        cosine = torch.nn.functional.cosine_similarity(encode(views.permute(0, 3, 1, 2))[:, None],
                                                       encode(images)[None], dim=2)
        assert (cosine.argmax(1) == torch.arange(20)).float().mean() > 0.25 - 1e-6
        found.append(cosine.diagonal().mean().item())
    assert found[0] < found[1] < found[2]


def test_a_tenth_of_a_batch_has_no_condition_and_none_of_the_first():
    data = dict(embeddings=torch.randn(8, 2, 192), latents=torch.randn(8, 2, 16, 8, 8), scaling_factor=0.5)
    batch = torch.randint(8, (4000,), generator=torch.Generator().manual_seed(0))
    for conditioned in (0, 2000):
        mirrored, noisy, velocity, t, condition = train.noised_batch(
            data, torch.zeros(192), torch.ones(192), batch, torch.Generator().manual_seed(1), conditioned)
        without = (condition == 0).all(1)
        assert 0.085 < without.float().mean() < 0.115 and not without[:conditioned].any()
        torch.testing.assert_close(train.implied(noisy, velocity, t), data['latents'][batch, mirrored] * 0.5,
                                   rtol=1e-3, atol=1e-4)


def test_perceptual_loss_tells_pictures_apart():
    torch.manual_seed(0)
    teacher = timm.create_model('efficientnet_lite0').eval()
    pictures = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        meant = train.look(teacher, pictures)
        centre, spread = meant[1].mean(0), meant[1].std(0).clamp_min(1e-3)
        losses = [train.perceptual_loss(train.look(teacher, x), meant, centre, spread).item()
                  for x in (pictures, pictures + 0.05 * torch.randn_like(pictures), pictures.roll(1, 0))]
    assert abs(losses[0]) < 1e-5 < losses[1] < losses[2]
    assert 0.08 < losses[2] < 0.04 * 2 * len(meant[0]) + 0.16  # unit vectors differ by at most 4, unrelated ones by 2


def test_refine_goes_on_from_the_exported_models(tmp_path, monkeypatch):
    """Two steps on two images, with an untrained teacher: the exported UNet has changed a little and loads again."""
    shutil.copytree(ROOT / 'tiny', tmp_path / 'tiny')
    folder = tmp_path / 'data/train' / train.CLASSES[0] / 'images'
    folder.mkdir(parents=True)
    (tmp_path / 'data/wnids.txt').write_text(f'{train.CLASSES[0]}\n')
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.JPEG')
    monkeypatch.setattr(train, 'HERE', tmp_path / 'tiny')
    monkeypatch.setattr(train, 'teacher_model', lambda *_: timm.create_model('efficientnet_lite0').eval())
    learns = []
    loss = train.perceptual_loss
    monkeypatch.setattr(train, 'perceptual_loss', lambda drawn, meant, *scale: learns.append(
        (drawn[1].requires_grad, meant[1].requires_grad)) or loss(drawn, meant, *scale))
    args = Namespace(data=tmp_path / 'data', work=tmp_path, seed=0, steps=2, batch_size=4)
    train.refine(args, torch.device('cpu'))
    assert learns == [(True, False)] * 2
    before, after = (UnCLIP({**SPEC, 'model': str(folder / 'unclip')}, torch.device('cpu')).pipeline.unet.state_dict()
                     for folder in (ROOT / 'tiny', tmp_path / 'tiny'))
    change = torch.stack([(after[k] - before[k]).abs().max() for k in before])
    assert 0 < change.max() < 0.05 and (change > 0).float().mean() > 0.5
    weights = tmp_path / 'tiny/unclip/unet/diffusion_pytorch_model.safetensors'
    written = weights.read_bytes()
    train.refine(args, torch.device('cpu'))  # finished: trains no further
    assert weights.read_bytes() == written


def test_scrambled_pictures_and_what_is_their_subject():
    """Of images whose box is red, with green for their number, and whose surroundings are blue: the shares of the
    tokens and their owners are what the pictures show, and nothing can be told from the place."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[8, 8, 55, 39], [0, 20, 31, 63], [30, 2, 60, 30], [0, 0, 63, 63], [20, 20, 43, 43]],
                         dtype=torch.int8)
    masks, ellipses = train.box_masks(boxes)
    assert masks[0, 0].sum() == 48 * 32 and masks[0, 0, 8:40, 8:56].all() and masks[3].all()
    assert (ellipses <= masks).all() and 0.7 < ellipses[0].sum() / masks[0].sum() < 0.85
    number = torch.arange(5.).view(5, 1, 1, 1) * 50
    images = torch.cat([255 * masks, number * masks, 255 * (1 - masks)], 1).byte()
    shares, owners, pictures = [], [], []
    for _ in range(30):
        x, share, owner = train.scramble(images, boxes, torch.randint(5, (32,), generator=generator), generator)
        assert x.shape == (32, 3, 32, 32) and x.min() > -0.01 and x.max() < 255.01 and share.shape == (32, 4, 64)
        pictures.append(x), shares.append(share), owners.append(owner)
    shares, p = torch.stack(shares), torch.stack(shares).sum(2)  # (30, 32, 64)
    red, green, blue = torch.nn.functional.avg_pool2d(torch.cat(pictures), 4).flatten(2).unbind(1)
    red, green, blue = (v.view(30, 32, 64) for v in (red, green, blue))
    assert p.min() >= 0 and p.max() < 1.001 and 0.2 < p.mean() < 0.7
    assert (red[p > 0.99] > 240).all() and (blue[p > 0.99] < 15).all()
    untextured = slice(8, None)  # crops, rolled ones, fours
    assert (red[:, untextured] / 255 - p[:, untextured]).abs().max() < 0.1
    whose = torch.einsum('abkt,abk->abt', shares, 50. * torch.stack(owners))
    assert (green - whose)[p > 0.99].abs().max() < 15
    assert p.mean((0, 1)).var() / p.var() < 0.05


def stored_data(folder, count=6):
    """What `prepare` would have written of `count` drawn images: noise, brighter in the box."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0, 0, 31, 63], [20, 20, 63, 50]], dtype=torch.int8).repeat(count // 2, 1)
    large = (torch.randint(100, (count, 3, 64, 64), generator=generator) + 150 * train.box_masks(boxes)[0])
    images = torch.nn.functional.avg_pool2d(large, 2).byte()
    data = dict(images=images, large=large.byte(), boxes=boxes, labels=torch.arange(count) % 2, wnids=['a', 'b'],
                weight=torch.ones(112), val=images, val_labels=torch.arange(count) % 2,
                semantic=torch.randn(count, 112, generator=generator),
                appearance=torch.randn(count, 2, 80, generator=generator))
    train.save(folder / 'data.pt', data)
    return data


def test_prepare_reads_images_boxes_and_the_teacher(tmp_path, monkeypatch):
    root, boxes = tmp_path / 'data', {}
    for k, wnid in enumerate(('n1', 'n2')):
        (root / 'train' / wnid / 'images').mkdir(parents=True)
        for i in range(3):
            boxes[f'{wnid}_{i}.JPEG'] = [k, 2, 40 + i, 60]
            Image.fromarray(np.full((64, 64, 3), 40 * i + 100 * k, np.uint8)).save(
                root / f'train/{wnid}/images/{wnid}_{i}.JPEG')
        (root / f'train/{wnid}/{wnid}_boxes.txt').write_text(''.join(
            '\t'.join([name, *map(str, box)]) + '\n' for name, box in reversed(boxes.items()) if wnid in name))
    (root / 'val/images').mkdir(parents=True)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / 'val/images/v.JPEG')
    (root / 'val/val_annotations.txt').write_text('v.JPEG\tn2\t0\t0\t9\t9\n')
    (root / 'wnids.txt').write_text('n1\nn2\n')
    (root / 'words.txt').write_text('n1\tcat\nn2\tdog, hound\n')
    monkeypatch.setattr(train, 'teacher_model', lambda *_: timm.create_model('efficientnet_lite0').eval())
    monkeypatch.setattr(train, 'APPEARANCE', 4)
    train.prepare(Namespace(data=root, work=tmp_path, seed=0), torch.device('cpu'))
    data = train.load(tmp_path / 'data.pt')
    assert data['boxes'].tolist() == list(boxes.values()) and data['labels'].tolist() == [0, 0, 0, 1, 1, 1]
    assert data['val_labels'].tolist() == [1] and data['words'] == ['cat', 'dog, hound']
    assert (data['images'].float().mean((1, 2, 3)) - torch.tensor([0, 40, 80, 100, 140, 180.])).abs().max() < 2
    assert data['semantic'].shape == (6, 112) and data['appearance'].shape == (6, 2, 4)


def test_quality_trains_and_writes_its_encoder(tmp_path, monkeypatch):
    """Two steps on six images: what is written loads again and is what was trained; once more writes the same."""
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)
    monkeypatch.setattr(train, 'HERE', tmp_path / 'tiny')
    shutil.copytree(ROOT / 'tiny/quality', tmp_path / 'tiny/quality')
    images = stored_data(tmp_path)['images']
    args = Namespace(work=tmp_path, seed=0, steps=2, batch_size=8)
    train.quality(args, torch.device('cpu'))
    clip = FrozenClip({'model': str(tmp_path / 'tiny/quality')})
    written, (features, embedding) = clip.fingerprint(), clip.forward((images.float() / 255 - train.MEAN) / train.STD)
    assert written != FrozenClip({'model': str(ROOT / 'tiny/quality')}).fingerprint()
    visual = train.trained(args, 'quality', train.clip_model('quality').visual, 'visual.')
    with torch.no_grad():
        out = train.tokens_of(visual, (images.float() / 255 - train.MEAN) / train.STD)
    torch.testing.assert_close(embedding, out[:, 0] @ visual.proj, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(features[:, :2].flatten(2).mT, out[:, 1:, :2] * torch.tensor([3., 1]), rtol=1e-2,
                               atol=1e-2)  # the first channel is made larger
    train.quality(args, torch.device('cpu'))
    assert FrozenClip({'model': str(tmp_path / 'tiny/quality')}).fingerprint() == written


def test_the_encoder_learns_its_tokens_and_keeps_its_embedding(tmp_path, monkeypatch):
    """Eighty steps from the shipped encoder on images whose subjects are bright: their tokens say so better, the
    embedding has hardly moved, the text tower not at all."""
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)
    monkeypatch.setattr(train, 'HERE', tmp_path / 'tiny')
    shutil.copytree(ROOT / 'tiny/clip', tmp_path / 'tiny/clip')
    data = stored_data(tmp_path, 48)
    old = FrozenClip({'model': str(ROOT / 'tiny/clip')})
    monkeypatch.setattr(train, 'learn', lambda *args, learn=train.learn, **settings: learn(
        *args, **{**settings, 'lr': 2e-3}))  # the rate still rises for 200 steps
    args = Namespace(work=tmp_path, seed=0, steps=80, batch_size=16, keep=True)
    train.encoder(args, torch.device('cpu'))
    new, x = FrozenClip({'model': str(tmp_path / 'tiny/clip')}), (data['images'].float() / 255 - train.MEAN) / train.STD
    (tokens, embedding), (before, kept) = new.forward(x), old.forward(x)
    p = torch.nn.functional.avg_pool2d(train.box_masks(data['boxes'])[0], 8)

    def follows(tokens):
        return torch.corrcoef(torch.stack([tokens[:, 0].flatten(), p.flatten()]))[0, 1]
    assert follows(tokens) > follows(before) + 0.1 and new.fingerprint() != old.fingerprint()
    assert torch.nn.functional.cosine_similarity(embedding, kept)[::8].min() > 0.95  # those it is told to keep
    first, second = ({k: v for k, v in load_file(root / 'tiny/clip/open_clip_model.safetensors').items()
                      if not k.startswith('visual.')} for root in (ROOT, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_training_resumes_where_it_was_killed(tmp_path):
    """tiny/train.py: the loop's result does not depend on where it was stopped."""

    def final(folder, *stops):
        folder.mkdir()
        started = []
        for steps in (*stops, 400):
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 1)

            def loss_of(indices, generator, progress):
                started.append(progress)
                x = torch.randn(len(indices), 4, generator=generator)
                if steps != 400 and torch.load(folder / 'toy.ckpt', weights_only=True)['step'] >= steps \
                        if (folder / 'toy.ckpt').exists() else False:
                    raise KeyboardInterrupt
                return (model(x) - x.sum(1, keepdim=True)).square().mean()

            try:
                train.train('toy', Namespace(work=folder, seed=0, batch_size=None), model, loss_of, 1e-2, 400, 8, 100,
                            torch.device('cpu'), ema_decay=0.9)
            except KeyboardInterrupt:
                assert steps == 200
                started.clear()
        assert len(started) == (200 if stops else 400)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole, killed = final(tmp_path / 'a'), final(tmp_path / 'b', 200)
    assert torch.equal(whole, killed) and (whole[:4] - 1).abs().max() < 0.2


def test_the_gan_draws_many_pictures_and_every_chunk_shows():
    """256 latents: no two pictures alike, as of a collapsed generator; a chunk drawn anew changes the picture, and less
    than all of them do."""
    generator = LatentGenerator(dict(kind='biggan', model=str(ROOT / 'tiny/gan'), truncation=2.0, psi=1.0, crop=None),
                                torch.device('cpu'), 32)
    assert (generator.chunks, generator.size) == (6, 32)
    z = generator.anchors(0, np.arange(256))
    images = generator.images(generator.code(z))
    assert images.min() > -0.01 and images.max() < 1.01 and (images[:, :, 1:] - images[:, :, :-1]).abs().mean() > 0.02
    apart = torch.cdist(images.flatten(1), images.flatten(1)) / (3 * 32 * 32) ** 0.5 * 255
    assert (apart + 1e3 * torch.eye(256)).min() > 5 and apart.mean() > 40
    changed = []
    for chunk in range(6):
        anew, at = z[:64].clone(), slice(chunk * generator.dim // 6, (chunk + 1) * generator.dim // 6)
        anew[:, at] = z[64:128, at]
        changed.append((generator.images(generator.code(anew)) - images[:64]).square().mean().sqrt() * 255)
    assert all(3 < change < apart.mean() for change in changed)
