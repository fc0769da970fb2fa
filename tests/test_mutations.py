"""What a config may hold: examples, and random damage to every experiment that ships. Bad input ends in one line."""
import os
import random
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
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
from augment import recipe_row  # noqa: E402
from checkpoints import NORMALIZATIONS, normalization  # noqa: E402
from common import Processes, precision_dtype, shard  # noqa: E402
from config import Fail, default_config, flat, load_config, run_folder  # noqa: E402
from data import check_size, write_beton  # noqa: E402
from features import labelled  # noqa: E402
from models import build_backbone  # noqa: E402

from conftest import coloured_samples  # noqa: E402

STAGES = {module.__name__: module for module in (fg_proportion, gen_views, pretrain, linear_eval, semi_eval,
                                                 detect_eval, view_eval, train_walker, train_discriminator)}
NULLABLE = {'view_eval': ('images',)}
DEFAULTS = """
output: ''
epochs: 5
lr: 0.1
augment: false
views: []
image_size: !int null
checkpoint: !text null
clip_grad: !float null
pack: !bool null
beton: !texts null
moco: {dim: 1, momentum: 2.0}
byol: {dim: 1, momentum: 2.0}
"""


def read(tmp_path, text, *changes, name='x.yaml'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    values = flat(load_config(DEFAULTS, [str(path), *changes]))
    return {key: value for key, value in values.items() if value != flat(default_config(DEFAULTS))[key]}


# ---------------------------------------------------------------------------------------------------------------------
# Examples

@pytest.mark.parametrize('change, key, value', [
    ('output=run #2', 'output', 'run #2'), ('output=2024-05-01', 'output', '2024-05-01'),
    ('output=8', 'output', '8'), ('checkpoint=run #2', 'checkpoint', 'run #2'),
    ('checkpoint=010', 'checkpoint', '010'), ('beton=a: b', 'beton', 'a: b'), ('beton=[a, b]', 'beton', ['a', 'b']),
    ('output=~/x', 'output', '/home/me/x'), ('output=~', 'output', '/home/me'),
    ('checkpoint=$RUNS/a.pt', 'checkpoint', '/data/runs/a.pt'), ('output=${RUNS}2', 'output', '/data/runs2'),
    ('beton=[~/x, $RUNS/y]', 'beton', ['/home/me/x', '/data/runs/y']), ('output=a=b', 'output', 'a=b'),
    ('epochs=010', 'epochs', 10), ('image_size=0224', 'image_size', 224), ('lr=1e-4', 'lr', 1e-4),
    ('lr=5', 'lr', 5.0), ('clip_grad=1', 'clip_grad', 1.0), ('augment=yes', 'augment', True),
    ('moco.dim=3', 'moco.dim', 3)])
def test_value_on_the_command_line(tmp_path, monkeypatch, change, key, value):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('RUNS', '/data/runs')
    found = read(tmp_path, '', change)
    assert found == {key: value} and type(found[key]) is type(value)


@pytest.mark.parametrize('change', ['checkpoint=', 'checkpoint=null', 'checkpoint=~', 'image_size=', 'beton=null'])
def test_null_on_the_command_line(tmp_path, change):
    assert read(tmp_path, 'checkpoint: a\nimage_size: 3\nbeton: b\n', change).get(change.split('=')[0]) is None


@pytest.mark.parametrize('text, found', [
    ('output: 2024-05-01', {'output': '2024-05-01'}), (b'\xef\xbb\xbfepochs: 3', {'epochs': 3}),
    ('epochs: 010', {'epochs': 10}), ('output: $RUNS/x', {'output': '/data/runs/x'}),
    ('beton: [~/x, y]', {'beton': ['/home/me/x', 'y']}), ('lr: 1e-4', {'lr': 1e-4}), ('lr: .5', {'lr': 0.5}),
    ('moco: &m {dim: 7}\nbyol:\n  <<: *m\n  momentum: 0.5\n', {'moco.dim': 7, 'byol.dim': 7, 'byol.momentum': 0.5}),
    ('output: cost 5 $', {'output': 'cost 5 $'}), ('', {})])
def test_value_in_a_file(tmp_path, monkeypatch, text, found):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('RUNS', '/data/runs')
    assert read(tmp_path, text) == found


LAUGHS = ''  # '[&a0 [...], &a1 [*a0, ..., *a0], ...]' of 12 levels
for level in range(12):
    LAUGHS += f'&a{level} [{", ".join([f"*a{level - 1}" if level else "x"] * 10)}], '
LAUGHS = f'views: [{LAUGHS}]'
MERGES = 'a0: &a0 {x: 1}\n' + ''.join(f'a{k}: &a{k} {{<<: [{", ".join([f"*a{k - 1}"] * 10)}]}}\n' for k in range(1, 12))


@pytest.mark.parametrize('text, words', [
    ('output: $NOWHERE/x', r"'output' names \$NOWHERE, which is not set"), ('output: ${NOWHERE}x', 'is not set'),
    ('beton: [$NOWHERE]', "'beton' names"), ('output: ~nobody-here/x', "'output' begins with .* a user who is not"),
    ('output: 2024', "'output' must be str .*put it in quotes"), ('output: no', 'put it in quotes'),
    ('output:', 'output'), ('checkpoint: 8', "'checkpoint' must be str or null, not 8"),
    ('checkpoint: [a]', "'checkpoint' must be str or null"), ('beton: 3', "'beton' must be"),
    ('image_size: a', "'image_size' must be int or null"), ('image_size: 3.5', 'int or'),
    ('image_size: true', "'image_size' must be int"), ('clip_grad: a', 'float or null'), ('pack: 1', 'bool or null'),
    ('epochs: 0x10', "'epochs' must be int .*'0x10'"), ('epochs: 1_000', "not '1_000'"),
    ('epochs: 1:30', "not '1:30'"), ('epochs: 0o10', "not '0o10'"), ('lr: 1:30.5', "not '1:30.5'"),
    ('lr: .nan', "'lr' must be"), ('lr: .inf', "'lr' must"), ('lr: -.inf', "'lr' must"),
    ('lr: 1e999', "'lr' must be finite"), ('lr: !!float .nan', "'lr' must be finite"),
    (f'epochs: 1{"0" * 400}', "'epochs' must be finite"), (f'lr: 1{"0" * 400}', "'lr' must be finite"),
    (f'lr: 1{"0" * 5000}', 'digits'), ('views: [.inf, 1e999]', "'views' must be finite"),
    ('epochs: 2024-05-01', 'epochs'), (b'output: \xff', 'is not UTF-8 .byte 8'),
    ('epochs:\t3', 'line 1: not valid YAML: found character'),
    ('epochs: 3\n---\nlr: 2', 'line 2: not valid YAML: but found another document'),
    ('- a', 'must hold keys and values'), ('1: 2', "unknown key '1'"), ('null: x', "unknown key 'None'"),
    ('[a]: b', 'line 1: a key must be a word'), ('{a: b}: c', 'a key must be a word'),
    ('? - a\n: b', 'a key must be a word'), ('moco: {1: 2}', "unknown key 'moco.1'"),
    ('"a\\nb": 1', "unknown key 'a b'"), ('moco: {dim: 3, dim: 4}', "key 'dim' stands twice"),
    ('views: &a [*a]', "'views' must hold one value, or a list"), ('moco: &a [*a]', "'moco' must hold keys .dim"),
    (LAUGHS, "'views' must hold one value"), (MERGES, "unknown key 'a0'"),
    ('views: ' + '[' * 10 ** 5, 'not valid YAML'), ('views: ' + '[' * 40 + ']' * 40, 'must'),
    ('views: {a: b}', "'views' must hold one"), ('output: "a\\0b"', 'holds a character'),
    ('output: "a\\nb"', 'holds a ch'), ('output: "\\ud800"', 'holds a character'),
    ('output: ' + 'x' * 300, 'longer than a name'), ('output: ' + 'x/' * 3000, 'longer than a name'),
    ('a: !!int foo', 'not valid YAML'), ('a: !!int ""', 'not valid'), ('a: !!bool x', 'not valid YAML'),
    ('a: !!timestamp x', 'not valid YAML'), ('epochs: !!set {a}', 'must hold one'),
    ('epochs: !!binary aGFs', 'must hold one'), ('epochs: !!python/tuple [1]', 'not valid'),
    ('output: !text x', 'not valid'), ('epochs: [', 'not valid YAML'), ('a: b: c', 'not valid YAML'),
    ('\0', 'not valid YAML'), (b'\x80beton', 'not UTF-8')])
def test_what_no_config_can_hold_is_one_line(tmp_path, text, words):
    with pytest.raises(Fail, match=words) as error:
        read(tmp_path, text)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


@pytest.mark.parametrize('change, words', [
    ('epochs=', "'epochs' must be int"), ('epochs.x=3', "'epochs' must hold one"),
    ('moco=3', "'moco' must hold keys"), ('=3', "unknown key ''"), ('moco..dim=3', "unknown key 'moco.'"),
    ('--epochs=3', "unknown key '--epochs'"), ('epochs=[', 'not valid YAML'), ('epochs=0x10', 'must be int'),
    ('beton=[a', 'not valid YAML'), ('lr=nan', 'must be'), ('output=$NOWHERE', 'is not set'),
    ('output=a\nb', 'holds a character'), ('epochs', 'usage: python')])
def test_what_no_key_can_be_given_is_one_line(tmp_path, change, words):
    with pytest.raises(Fail, match=words) as error:
        read(tmp_path, '', change)
    assert len(str(error.value).splitlines()) == 1


def test_names_of_the_users_own(tmp_path):
    """`!each`: any names, under each the keys that stand there, with their defaults."""
    defaults = 'output: a\nlatent:\n  chunks: !each {std: 0.0, walker: w}\n'
    path = tmp_path / 'x.yaml'
    path.write_text('latent: {chunks: {1-5: {std: 1}, 0: {}}}')
    found = lambda *changes: load_config(defaults, [str(path), *changes])['latent']['chunks']
    assert default_config(defaults)['latent']['chunks'] == {}
    assert found() == {'1-5': {'std': 1.0, 'walker': 'w'}, '0': {'std': 0.0, 'walker': 'w'}}
    assert found('latent.chunks.1-5.walker=v', 'latent.chunks.7.std=2') == {
        '1-5': {'std': 1.0, 'walker': 'v'}, '0': {'std': 0.0, 'walker': 'w'}, '7': {'std': 2.0, 'walker': 'w'}}
    assert found('latent.chunks={}') == {} and found('latent.chunks={}', 'latent.chunks.3.std=1').keys() == {'3'}
    for change, words in (('latent.chunks=3', "'latent.chunks' must hold names, and under each std, walker: 3"),
                          ('latent.chunks.1-5=3', "'latent.chunks.1-5' must hold keys .std, walker.: 3"),
                          ('latent.chunks.1-5.sdt=3', "unknown key 'latent.chunks.1-5.sdt'; did you mean"),
                          ('latent.chunks.1-5.std=x', "'latent.chunks.1-5.std' must be float")):
        with pytest.raises(Fail, match=words):
            found(change)


def test_experiment_files_by_any_name(tmp_path, monkeypatch):
    assert read(tmp_path, 'epochs: 7', name='a=b/exp=1.yaml') == {'epochs': 7}
    monkeypatch.chdir(tmp_path)
    Path('a=b.yaml').write_text('epochs: 8')
    assert load_config(DEFAULTS, ['a=b.yaml', 'lr=2'])['epochs'] == 8
    os.mkfifo('pipe')  # opening it would wait for ever
    Path('big.yaml').write_bytes(b'#' * 1_000_002)
    for name, words in ((str(tmp_path), 'is a folder'), ('none.yaml', 'no such file'), ('big.yaml/x', 'no such file'),
                        ('x/a=c.yaml', 'no such file'), ('/dev/zero', 'is not an experiment'),
                        ('big.yaml', 'is not an experiment'), ('pipe', 'is not an exp'),
                        ('x' * 300, 'cannot be read: File name too long'), ('a\0b', 'cannot be read')):
        with pytest.raises(Fail, match=words) as error:
            load_config(DEFAULTS, [name])
        assert str(error.value).startswith(name[:9]) and '\n' not in str(error.value)


@pytest.mark.parametrize('device', ['gpu', 'tpu', 'CPU', 'cuda:', 'cuda:-1', 'cuda:a', 'cuda0', 'mps', '', 'cuda:1,2'])
def test_a_device_that_is_none(device):
    with pytest.raises(Fail, match=f"device: '{re.escape(device)}' is none of auto, cpu, cuda, cuda:0"):
        Processes(device)


def test_a_gpu_by_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for device, expected in (('cuda:1', 'cuda:1'), ('cuda:0', 'cuda:0'), ('cuda', 'cuda:0'), ('auto', 'cuda:0'),
                             ('cpu', 'cpu')):
        assert Processes(device, group=False).device == torch.device(expected)
    assert chosen == [torch.device(f'cuda:{k}') for k in (1, 0, 0, 0)]
    with pytest.raises(Fail, match='device: GPU 2 asked for, and torch sees 2, counted from 0'):
        Processes('cuda:2', group=False)
    for key, value in {'RANK': '2', 'WORLD_SIZE': '3', 'LOCAL_RANK': '2', 'MASTER_ADDR': 'here',
                       'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Fail, match='device: cuda:1 is one GPU, and there are 3 processes'):
        Processes('cuda:1', group=False)
    with pytest.raises(Fail, match='GPU 2 asked for, .* start fewer processes'):
        Processes('cuda', group=False)


def test_an_output_that_is_in_the_way_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'link').symlink_to('nowhere')
    (tmp_path / 'done').mkdir()
    (tmp_path / 'done/config.yaml').write_text('')
    for name in ('file', 'file/below', 'file/far/below', 'link'):
        with pytest.raises(Fail, match=f"output: {tmp_path}/{name.split('/')[0]} is a file, or a link to nowhere"):
            run_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ('new', 'new/er', 'done', '.'):
        assert run_folder(name) == Path(name) and not (tmp_path / 'new').exists()
    monkeypatch.setattr(os, 'access', lambda *_: False)  # a read-only file system: permissions do not stop root
    with pytest.raises(Fail, match=f'output: new: {tmp_path} cannot be written into'):
        run_folder('new')
    assert run_folder('done') == Path('done')  # its result can still be shown


# ---------------------------------------------------------------------------------------------------------------------
# Every stage

def config_of(stage, *changes):
    paths = sorted((ROOT / 'yamls' / stage).glob('*.yaml'))
    path, = [path for path in paths if not path.name.startswith('bigbigan')][:1] or paths[:1]  # one with images
    return load_config(STAGES[stage].DEFAULTS, [str(path), *changes], NULLABLE.get(stage, ()))


def check(stage, config):
    """All that says of a config, cheaply, whether the stage can work with it."""
    STAGES[stage].check(config, *([] if stage in ('fg_proportion', 'gen_views', 'view_eval') else [1]))
    processes = Processes(config['device'], group=False)
    if 'precision' in config:
        precision_dtype(config['precision'], processes.device)
    if 'shard' in config:
        shard(config['shard'], processes)
    if 'normalization' in config:
        normalization(config['normalization'], NORMALIZATIONS['clip'])
    for view in ('view_1', 'view_2') if stage == 'pretrain' else ():
        recipe_row({'size': config['image_size'], **config[view]}, view)
    if stage in ('linear_eval', 'semi_eval'):
        crops = config.get('linear', config)
        size = config['image_size'] or 224
        recipe_row({'size': size, 'crop_scale': crops['crop_scale'], 'flip': crops['flip']}, 'crops')
        recipe_row({'size': size, 'resize': config['resize'] or size}, 'resize')


@pytest.mark.parametrize('stage', STAGES)
def test_an_output_in_the_way_is_said_before_any_work(stage, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(Fail, match=f'output: {tmp_path}/file is a file'):
        STAGES[stage].main(config_of(stage, f'output={tmp_path}/file/below'))


def test_a_size_that_nobody_has_written_down_may_not_enlarge_the_images(tmp_path):
    write_beton(tmp_path / 'a.beton', coloured_samples(), 12, {})
    loader = labelled(tmp_path / 'a.beton', {'size': 16, 'resize': 16, 'crop_scale': None}, Processes('cpu'))
    assert check_size(loader, {'image_size': 16}) is None
    assert check_size(loader, {'image_size': 32}).endswith('of 16 px (median of the shorter side) are enlarged')
    with pytest.raises(Fail, match='image_size: views of 224 px from .* 16 px .* in .*a.beton: set image_size=16, or'):
        check_size(loader, {'image_size': 224})
    assert 'are enlarged' in check_size(loader, {'image_size': 224}, meant=224)
    network = build_backbone('resnet18', stem='cifar', width=8)
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'other.pt')  # of others: says no size, so 224
    inputs = [f'checkpoint={tmp_path}/other.pt', *(f'{part}_beton={tmp_path}/a.beton' for part in ('train', 'test'))]
    for stage in ('linear_eval', 'semi_eval'):
        with pytest.raises(Fail, match='image_size: views of 224 px from stored images of 16 px'):
            STAGES[stage].main(load_config(STAGES[stage].DEFAULTS, [
                str(ROOT / 'yamls' / stage / 'cifar10.yaml'), *inputs, 'image_size=', f'output={tmp_path}/out']))
        assert not (tmp_path / 'out').exists()


SENSELESS = {  # key=value; ...
    'pretrain': """optimizer.momentum=1; optimizer.momentum=2.5; moco.momentum=1; mocov3.momentum=1; byol.momentum=1;
        moco.temperature=1e-9; mocov3.momentum_end=1.1; optimizer.lr=1e9; optimizer.weight_decay=1;
        moco.temperature=1e9; epochs=10000000; image_size=1000000000; data.num_workers=1000000;
        batch_size=1000000000000; moco.queue=1000000000; output=; view_1.crop_scale=[1]; view_1.jitter=text;
        view_1.jitter=[0.4, null, 0.4, 0.1]; view_2.blur_sigma=[[1], [2]];
        view_1.jitter=["0.4", "0.4", "0.4", "0.1"]; data.beton=[1]; data.beton=[]; optimizer.clip_grad=text;
        normalization=[[1, 2, 3], [1, 2, "x"]]; normalization=[[1, 2, 3], [1, 2, .nan]]; device=gpu;
        knn.temperature=1e-5; optimizer.exclude_1d=3; save_every_steps=a; quality.clip.image_size=text; seed=-1;
        data.swap=a; view_1.randaugment=0.5; view_2.randaugment_magnitude=[10]; simclr.negative_mixing=-1;
        nnclr.queue=0; supcon.temperature=0; optimizer.final_lr=-1; data.online.images_per_epoch=-1;
        data.online.chunks.1.std=-1; view_1.resize=text; view_generated.blur_prob=2; view_generated.gray_prob=-0.1;
        backbone.width=1000000; vicreg.variance=-1; data.alpha=1.1""",
    'linear_eval': """linear.momentum=1; linear.lr=1e9; linear.more_lrs=[[1]]; linear.more_lrs=[1e9];
        linear.milestones=[a]; linear.weight_decay=1; knn.temperature=1e-5; image_size=-1; image_size=0; resize=a;
        backbone.heads=0; seed=-1; checkpoint=; linear.final_share=1.5; metric=top2; linear.batch_size=10000000;
        backbone.heads=text""",
    'semi_eval': """momentum=1; lr_head=1e9; milestones=[null]; gamma=2; weight_decay=2; subset.share=nan;
        resize=[1]; test_beton=; subset.share=0; log_every=0; num_workers=0; backbone.heads=[6]; seed=1e9""",
    'view_eval': """clip.image_size=text; batch=1000000000000; images=1; examples=0; num_workers=1000000; pairs=;
        images=x; size=10; size=text""",
    'detect_eval': """train_sizes=[null]; momentum=1; lr=1e9; anchors=[a, b, c, d, e]; steps=[x];
        max_size=1000000000; warmup=-1; regions=0; dataset.root=; batch_size=0; channels=1000000;
        normalization=text""",
    'fg_proportion': """dataset.subset=0; dataset.subset=abc; sign=a; sign=2; foreground_share=1;
        foreground_share=0; pca=[1]; num_workers=1000000; output=; dataset.root=; batch_size=0; clip.image_size=0;
        shard=4/4; device=tpu""",
    'gen_views': """generator.guidance_scale=-1; generator.fallbacks=[3]; dataset.subset=0; pack=a;
        views_per_image=1000000; grid=0; image_size=text; output=; beton_quality=0; noise_level=1000;
        generator.steps=1000000; proportions=; latent.truncation=-1; latent.psi=2; latent.anchors=0;
        latent.kind=gan; latent.chunks=3; latent.chunks.1-5=3; latent.chunks.1-5.std=-1; latent.chunks.1-5.stdd=1;
        generator.kind=gan; generator.noise.truncation=-1; generator.noise.label=-1;
        generator.mask=3; generator.mask.keep_border=-1; generator.mask.share=1.1;
        generator.mask.block=text; generator.mask.decoder=jax; generator.mask.steps=0; generator.mask.temperature=-1;
        generator.mask.sharpness=0; generator.mask.labels=3; generator.mask.guidance=-1""",
    'train_walker': """chunks=; lr=0; samples=-1; batch_size=1; stop_loss=-1; estimator.temperature=0; first=both;
        walker=random; start=zero; view.flip=2; view.jitter=[1]; normalization=text; latent.model=; seed=-1;
        latent.size=1; image_size=0; output=""",
    'train_discriminator': """beton=; width=0; epochs=0; batch_size=0; lr=0; image_size=1; latent.model=; output="""}


@pytest.mark.parametrize('stage, change', [(stage, change.strip()) for stage in SENSELESS
                                           for change in SENSELESS[stage].split(';')])
def test_accepted_though_senseless_no_more(stage, change):
    block = change.partition('.')[0].replace('moco', 'mocov2', change.startswith('moco.'))
    method = [f'method={block}'] if block in pretrain.METHODS else []
    check(stage, config_of(stage, *method))
    with pytest.raises(Fail, match=change.partition('=')[0].rpartition('.')[2]) as error:
        check(stage, config_of(stage, *method, change))
    assert '\n' not in str(error.value)


def every_text():
    """(stage, text) of all experiments, and of one of each stage with all its keys written down."""
    for stage, module in STAGES.items():
        for path in sorted((ROOT / 'yamls' / stage).glob('*.yaml')):
            yield stage, path.read_text()
        yield from [(stage, yaml.safe_dump(config_of(stage), sort_keys=False))] * 10  # as likely as the others together


VALUES = ['', 'null', '0', '-1', '1', '3', '1e30', '-1e-30', '.nan', '.inf', '-.inf', 'nan', '1' + '0' * 400,
          '1e999', '2.5', '1000000000', '999999999999999999', 'text', "''", '"a\\0b"', '"\\ud800"', '[]', '[1]',
          '[a]', '[null]', '[[1]]', '[.nan, 1]', '[0.1, 0.2]', '{}', '{a: b}', '{1: 2}', '2024-05-01', '12:30',
          '0x10', 'true', 'no', '~', '~/x', '~nobody/x', '$NOWHERE', '*a', '&a [*a]', '!!set {a}', '!!int x', '#',
          '- a', '"', "'", '%', '@', 'x' * 5000, '[[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]', '[1, 2, 3, 4, 5]',
          '[1, 1, 1, .inf]', 'cuda:7', 'fp16', '\\', 'ä', '/']


def mutated(text, random):
    """The bytes of an experiment with something wrong, and arguments for the command line."""
    lines, kind = text.splitlines(), random.randrange(8)
    number = random.choice([k for k, line in enumerate(lines) if ':' in line])
    if kind < 3:
        lines[number] = f'{lines[number].partition(":")[0]}: {random.choice(VALUES)}'
    elif kind == 3:
        lines[number:number + random.randint(1, 3)] = [lines[number]] * random.choice([0, 2])
    elif kind == 4:
        lines[number] = random.choice(' \t-?:') + lines[number]
    content = '\n'.join(lines).encode()
    if kind == 5:
        at = random.randrange(len(content))
        content = content[:at] + random.randbytes(random.randint(1, 4)) + content[at + random.randint(0, 9):]
    changes = []
    if kind > 5:
        keys = list(flat(yaml.safe_load(text)))
        changes = [f'{random.choice(keys)}{random.choice(["", "", "", ".x"])}={random.choice(VALUES)}'
                   for _ in range(random.randint(1, 2))]
    return content, changes


def damage(folder, seed, n):
    """Run n mutations; returns how many were accepted."""
    draw, texts, accepted = random.Random(seed), list(every_text()), 0
    path = folder / 'mutated.yaml'
    for number in range(n):
        stage, text = draw.choice(texts)
        content, changes = mutated(text, draw)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                check(stage, load_config(STAGES[stage].DEFAULTS, [str(path), *changes], NULLABLE.get(stage, ())))
            accepted += 1
        except Fail as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (number, stage, changes, str(error))
        except Exception as error:
            raise AssertionError(f'mutation {number} of seed {seed}: {stage} {changes}: {error!r}') from error
    return accepted


def test_whatever_is_wrong_with_an_experiment_is_one_line(tmp_path, capfd):
    accepted = damage(tmp_path, seed=0, n=500)
    assert 50 < accepted < 450  # what is damaged is neither always nor never harmless
    assert capfd.readouterr() == ('', '')
