"""common.py: the environment that a stage runs in: launchers, locks, standard streams, tensorboard."""
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import start  # noqa: E402
from common import Log, Processes, ranks, shard  # noqa: E402
from config import Fail  # noqa: E402

TORCHRUN = {'RANK': '1', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


@pytest.fixture
def environment(monkeypatch):
    """set(**variables): those of torchrun, and no others."""
    def set_to(**variables):
        for name in [*TORCHRUN, 'SLURM_PROCID']:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return set_to


# ---------------------------------------------------------------------------------------------------
# Launchers

def test_ranks_of_torchrun_or_of_a_single_process(environment):
    environment(**TORCHRUN)
    assert ranks() == (1, 4, 1)
    environment()
    assert ranks() == (0, 1, 0)
    environment(MASTER_ADDR='node1', MASTER_PORT='29500')  # exported by a job's script
    assert ranks() == (0, 1, 0)


@pytest.mark.parametrize('given, absent', [
    (('WORLD_SIZE',), 'RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    (('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'), 'LOCAL_RANK'),
    (('LOCAL_RANK',), 'RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT'),
    (('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), 'MASTER_ADDR, MASTER_PORT')])
def test_half_a_launcher_is_named(environment, given, absent):
    environment(**{name: TORCHRUN[name] for name in given})
    words = f"^{', '.join(given)} set in the environment, but not {absent}: .*torchrun"
    with pytest.raises(Fail, match=words) as error:
        ranks()
    assert 'srun' not in str(error.value) and '\n' not in str(error.value)
    environment(**{name: TORCHRUN[name] for name in given}, SLURM_PROCID='0')
    with pytest.raises(Fail, match='srun starts torchrun'):
        ranks()


@pytest.mark.parametrize('change', [{'WORLD_SIZE': 'four'}, {'RANK': '-1'}, {'LOCAL_RANK': '0.5'},
                                    {'MASTER_PORT': 'http'}])
def test_ranks_that_are_no_numbers(environment, change):
    environment(**{**TORCHRUN, **change})
    with pytest.raises(Fail, match='^{}={} in the environment is not a number'.format(*next(iter(change.items())))):
        ranks()


@pytest.mark.parametrize('change, words', [
    ({'ID': '3'}, 'SLURM_ARRAY_TASK_COUNT, SLURM_ARRAY_TASK_MIN, SLURM_ARRAY_TASK_MAX is no number'),
    ({'ID': 'x', 'COUNT': '4', 'MIN': '0', 'MAX': '3'}, 'SLURM_ARRAY_TASK_ID is no number'),
    ({'ID': '9', 'COUNT': '4', 'MIN': '0', 'MAX': '3'}, 'which chunks are whose does not follow'),
    ({'ID': '1', 'COUNT': '4', 'MIN': '0', 'MAX': '3', 'STEP': '0'}, 'which chunks are whose does not follow')])
def test_half_an_array_is_one_line(environment, monkeypatch, change, words):
    environment()
    for name, value in change.items():
        monkeypatch.setenv(f'SLURM_ARRAY_TASK_{name}', value)
    with pytest.raises(Fail, match=words):
        shard('', Processes('cpu', group=False))


def test_rank_beyond_the_world(environment):
    environment(**{**TORCHRUN, 'RANK': '4'})
    with pytest.raises(Fail, match='RANK=4 in the environment must be below WORLD_SIZE=4'):
        ranks()


# ---------------------------------------------------------------------------------------------------
# One process a run folder

HOLDER = """
import os, sys, time
from common import Log
log = Log(sys.argv[1], {})
if os.fork() == 0:  # a worker that outlives it
    os.close(1)
    time.sleep(600)
print('locked', flush=True)
time.sleep(600)
"""


def test_two_processes_in_one_run_folder(tmp_path):
    with subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path / 'run'], cwd=ROOT, stdout=subprocess.PIPE,
                          start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == b'locked\n'
            before = (tmp_path / 'run/log.jsonl').read_bytes()
            with pytest.raises(Fail, match='run: another process is at work in it; .*output=.*torchrun') as error:
                Log(tmp_path / 'run', {'mine': True})
            assert '\n' not in str(error.value) and (tmp_path / 'run/log.jsonl').read_bytes() == before
            assert 'mine' not in (tmp_path / 'run/config.yaml').read_text()
            Log(tmp_path / 'run', {}, alone=False).close()
            Log(tmp_path / 'run', {}, main=False).close()
            holder.kill()
            holder.wait()
            Log(tmp_path / 'run', {}).close()  # nothing is left to be removed by hand
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'lockf', refuse)
    log = Log(tmp_path, {})
    log.write(step=1)
    log.close()
    assert 'the file system knows no locks: a second process in it would go unnoticed' in capsys.readouterr().err
    assert (tmp_path / 'log.jsonl').read_text().endswith('{"step": 1}\n')


def test_copies_of_a_file_that_differ_between_processes(monkeypatch):
    processes = Processes('cpu')
    processes.agree([1, 2], 'pairs.beton')  # alone

    def gathered(values, mine):
        values[:] = found
    monkeypatch.setattr(common.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(common.dist, 'all_gather_object', gathered)
    processes.world, found = 3, [[1, 2]] * 3
    processes.agree([1, 2], 'pairs.beton')
    found = [[1, 2], [1, 2], [1, 3]]
    with pytest.raises(Fail, match='^pairs.beton: process 2 reads another content there than process 0: copies'):
        processes.agree([1, 2], 'pairs.beton')


@pytest.mark.parametrize('error', [
    MemoryError(), MemoryError('Unable to allocate 7.45 TiB for an array'),
    RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def fails(config):
        raise error
    monkeypatch.setattr(sys, 'argv', ['pretrain.py'])
    monkeypatch.setattr(start, 'load_config', lambda *_: {})
    with pytest.raises(SystemExit) as left:
        start.run(fails, '')
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith('pretrain.py: out of memory') and 'set a smaller batch' in line
    assert str(error)[:40] in line


def test_a_bug_in_one_of_several_processes_does_not_wait_for_the_others(monkeypatch, capfd):
    def fails(config):
        raise ValueError('a bug')
    left = []
    monkeypatch.setattr(start, 'load_config', lambda *_: {})
    monkeypatch.setattr(start, 'group', lambda: common.dist)
    monkeypatch.setattr(start.os, '_exit', lambda code: left.append(code) or sys.exit(code))
    monkeypatch.setattr(common.dist, 'destroy_process_group', lambda: left.append('after'))
    with pytest.raises(SystemExit):
        start.run(fails, '')
    assert left == [1, 'after'] and 'ValueError: a bug' in capfd.readouterr().err  # 'after': there is no exit here
    monkeypatch.setattr(start, 'group', lambda: None)
    with pytest.raises(ValueError):
        start.run(fails, '')


def test_memory_that_torch_cannot_get_is_recognised():
    for take in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            take()
        assert isinstance(error.value, MemoryError) or re.search(start.NO_MEMORY, str(error.value))


def test_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    found = common.versions.__wrapped__()
    assert found['git'] is None and found['torch'] and found['numpy']


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(Fail, match='file/run: cannot be written: Not a directory; set another output='):
        Log(tmp_path / 'file/run', {})


# ---------------------------------------------------------------------------------------------------
# Standard streams, tensorboard

STAGE = r"""
import os, sys
import common, start
def stage(config):
    log = common.Log(config['output'], config)
    for k in range(3):
        log.write(f'line {k} of caf\udce9.jpg \u00e9', path='caf\udce9.jpg', step=k)
    common.save_json(log.folder / 'results.json', {'path': 'caf\udce9.jpg'})
    log.close()
    common.answered(log.folder / 'nothing.json', {}, (), common.Processes('cpu'))
    if config['fail']:
        raise common.Fail('caf\udce9.jpg: is bad')
start.run(stage, "{output: '', fail: false}")
"""


def stage(tmp_path, *arguments, shell='exec "$@"'):
    (tmp_path / 'a.yaml').write_text(f'output: {tmp_path}/caf\u00e9  # \u00e9\n', encoding='utf-8')
    ascii_only = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    environment = {**os.environ, **(ascii_only if 'ascii' in arguments else {})}
    return subprocess.run(
        ['bash', '-c', f'set -o pipefail; {shell}', 'bash', sys.executable, '-c', STAGE, str(tmp_path / 'a.yaml'),
         *(a for a in arguments if '=' in a)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_names_that_the_terminal_cannot_print(tmp_path):
    done = stage(tmp_path, 'ascii', f'output={tmp_path}/run')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert done.stdout.splitlines()[0] == r'line 0 of caf\udce9.jpg \xe9'
    assert (tmp_path / 'run/results.json').is_file() and (tmp_path / 'run/log.jsonl').read_text().count('udce9') == 3
    done = stage(tmp_path, 'ascii', f'output={tmp_path}/run', 'fail=true')
    assert done.returncode == 2 and done.stderr == '-c: caf\\udce9.jpg: is bad\n'
    assert stage(tmp_path).returncode == 0 and (tmp_path / 'caf\u00e9/results.json').is_file()


@pytest.mark.parametrize('shell', ['"$@" | true', '"$@" > /dev/full', '"$@" >&-', '"$@" 2>&-', '"$@" <&- >&- 2>&-'])
def test_nobody_listens(shell, tmp_path):
    done = stage(tmp_path, f'output={tmp_path}/run', shell=shell)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (tmp_path / 'run/results.json').is_file()
    assert (tmp_path / 'run/log.jsonl').read_text().count('\n') == 4


@pytest.mark.parametrize('broken', ['absent', 'writing'])
def test_tensorboard_that_fails_costs_one_line(broken, tmp_path, monkeypatch, capsys):
    from torch.utils import tensorboard
    if broken == 'absent':
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    else:
        def add_scalar(*_):
            raise RuntimeError('the writing thread\nis gone')
        monkeypatch.setattr(tensorboard.SummaryWriter, 'add_scalar', add_scalar)
    log = Log(tmp_path, {}, tensorboard=True)
    log.write('first', step=1, loss=0.5)
    log.write('second', step=2, loss=0.5)
    log.close()
    out, err = capsys.readouterr()
    assert out == 'first\nsecond\n' and err.count('\n') == 1 and err.startswith('tensorboard: goes without')
    assert (tmp_path / 'log.jsonl').read_text().endswith('{"step": 2, "loss": 0.5}\n')


def test_a_log_line_cut_by_a_kill_takes_no_next_one_along(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"step": 1}\n{"step": 2, "lo')
    log = Log(tmp_path, {})
    log.write(step=3)
    log.close()
    lines = (tmp_path / 'log.jsonl').read_text().split('\n')
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "lo'] and json.loads(lines[3]) == {'step': 3} and len(lines) == 5
