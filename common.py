"""What every stage needs and nothing else: processes, stop signal, resuming, log; its start and end are in start.py."""
import ctypes
import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from config import Fail, changed_keys
from files import atomic, load_checkpoint, load_json, lock, save_json
from start import ranks, say


# ---------------------------------------------------------------------------------------------------
# Processes

class Processes:
    """rank, local_rank, world and device of this process; a process group exists under torchrun (and with group)."""

    def __init__(self, device='auto', group=True):
        self.rank, self.world, self.local_rank = ranks()
        self.device = self._device(device)
        cuda = self.device.type == 'cuda'
        if cuda:
            torch.cuda.set_device(self.device)  # before anything allocates, or every rank opens a context on GPU 0
        else:
            keep_memory()
        if group and os.environ.get('RANK') and not dist.is_initialized():
            backend = 'cpu:gloo,cuda:nccl' if cuda else 'gloo'
            # rank 0 may check a beton of hundreds of GB, or fetch a dataset, before the others hear of it again
            dist.init_process_group(backend, timeout=timedelta(hours=2), **({'device_id': self.device} if cuda else {}))

    def _device(self, name):
        wanted = re.fullmatch(r'auto|cpu|cuda(?::(\d+))?', name)
        if not wanted:
            raise Fail(f"device: '{name}' is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
        if name == 'cpu' or name == 'auto' and not torch.cuda.is_available():
            return torch.device('cpu')
        if not torch.cuda.is_available():
            raise Fail('device: cuda asked for, but torch sees no GPU; set device=auto or device=cpu')
        if wanted[1] and self.world > 1:
            raise Fail(f'device: {name} is one GPU, and there are {self.world} processes; set device=cuda (each takes '
                       'its own), and CUDA_VISIBLE_DEVICES to choose')
        number, there = int(wanted[1] or self.local_rank), torch.cuda.device_count()
        if number >= there:
            raise Fail(f'device: GPU {number} asked for, and torch sees {there}, counted from 0'
                       + '; start fewer processes' * (wanted[1] is None))
        return torch.device('cuda', number)

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if dist.is_initialized():
            dist.barrier()

    def any(self, flag):
        """True on every process when it is true on one (all of them must call)."""
        if not dist.is_initialized():
            return bool(flag)
        total = torch.tensor(float(bool(flag)))  # on the CPU, through gloo: asked every step, must not wait for the GPU
        dist.all_reduce(total)
        return total.item() > 0

    def of_first(self, value):
        """The `value` of the first process, on every process."""
        box = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(box)
        return box[0]

    def agree(self, value, what):
        """Raises Fail on every process where `value`, of a file that all of them read, is not the same on all."""
        if dist.is_initialized():
            values = [None] * self.world
            dist.all_gather_object(values, value)
            if other := [rank for rank, found in enumerate(values) if found != values[0]]:
                raise Fail(f'{what}: process {other[0]} reads another content there than process 0: copies on several '
                           'machines must be the same')


def keep_memory():
    """The process keeps the memory that it frees, up to its peak: glibc hands large blocks back to the system, and the
    next step on a CPU gets the same ones again a page fault at a time."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)           # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def shard(text, processes):
    """(first, step) of the chunks that this process takes: first, first + step, first + 2 step, ...

    text: 'i/n' by hand, i from 0; empty: the task of a Slurm array, where this is one. torchrun's processes share what
    falls to their task."""
    task, tasks = 0, 1
    if text:
        match = re.fullmatch(r'(\d+)/(\d+)', text)
        task, tasks = (int(g) for g in match.groups()) if match else (0, 0)
        if task >= tasks:
            raise Fail(f"shard: must be i/n with 0 <= i < n (0/4, 1/4, 2/4, 3/4), not '{text}'")
    elif 'SLURM_ARRAY_TASK_ID' in os.environ:
        names = [f'SLURM_ARRAY_TASK_{name}' for name in ('ID', 'COUNT', 'MIN', 'MAX', 'STEP')]
        wrong = [name for name in names if not os.environ.get(name, '1' if name.endswith('STEP') else '').isdecimal()]
        if wrong:
            raise Fail(f'SLURM_ARRAY_TASK_ID is set in the environment, but {", ".join(wrong)} is no number: Slurm '
                       'sets them all; unset it, or set shard=i/n')
        task, tasks, low, high, step = (int(os.environ.get(name, 1)) for name in names)
        # not so: --array=3,7,8, the failed ones of an earlier array
        if step < 1 or not low <= task <= high or (high - low) // step + 1 != tasks:
            raise Fail(f'Slurm array of {tasks} tasks between {low} and {high}: which chunks are whose does not follow '
                       'from these; submit the same array again (what is finished is not done again), or set shard=i/n')
        task = (task - low) // step
    return task * processes.world + processes.rank, tasks * processes.world


def precision_dtype(precision, device):
    """auto | fp32 | bf16 | fp16 -> dtype for autocast (torch.float32: none). auto: bf16 where the hardware has it."""
    if precision not in ('auto', 'fp32', 'bf16', 'fp16'):
        raise Fail(f"precision: '{precision}' is unknown; there are auto, fp32, bf16, fp16")
    if precision == 'fp16' and device.type != 'cuda':
        raise Fail('precision: fp16 needs a GPU; set precision=bf16 or fp32')
    if precision == 'auto':
        if device.type == 'cuda':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # AMX has it too; half the time of fp32 with either (measured)
            fast = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()
        precision = 'bf16' if fast else 'fp32'
    return {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]


class StopSignal:
    """SIGTERM and SIGUSR1 (what Slurm sends before it preempts) set a flag; the stage saves and leaves."""
    exit_code = 128 + signal.SIGTERM  # not 0: a chain of stages must not go on with half a result

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._set)

    def _set(self, number, frame):
        self.name = signal.Signals(number).name

    def __bool__(self):
        return self.name is not None

    def leave(self, log, where, requeue=False):
        """Say where the stage was left, and end the process. requeue: ask Slurm for another turn before."""
        log.write(f'{self.name or "stop signal"}: {where}')  # of several processes another one may have got it
        if requeue and log.main:
            log.write(self.requeue())
        log.close()
        sys.exit(self.exit_code)

    @staticmethod
    def requeue():
        """Ask Slurm to start this job again (the same command then resumes). Returns what came of it, for the log."""
        job = os.environ.get('SLURM_JOB_ID')
        if job is None:
            return 'not requeued: this is no Slurm job'
        try:
            result = subprocess.run(['scontrol', 'requeue', job], capture_output=True, text=True, timeout=60)
            problem = result.stderr.strip() or f'exit code {result.returncode}' if result.returncode else ''
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = error
        return f'not requeued: scontrol requeue {job}: {problem}' if problem else f'job {job} is requeued'


# ---------------------------------------------------------------------------------------------------
# Resuming

def earlier(path, config, ignore, anew=False, needs=()):
    """What an earlier run wrote into `path`, .json or a checkpoint, or None where there is nothing. Where its config
    differs in other keys than `ignore` it is a Fail, or, to begin anew, None. needs: the keys that it must have."""
    if not path.is_file():
        return None
    mend = 'delete it to start again'
    saved = load_json(path, mend) if path.suffix == '.json' else load_checkpoint(path, mend)
    if not isinstance(saved, dict) or not isinstance(saved.get('config'), dict):
        raise Fail(f'{path}: is not what this stage writes there (no config in it); {mend}, or set another output=')
    changed = changed_keys(saved['config'], config, ignore)
    if changed and not anew:
        raise Fail(f"{path} was made with another config: {'; '.join(changed)}. Go back to it, delete that file, "
                   'or set another output=')
    absent = [key for key in needs if key not in saved]
    if absent and not changed:
        raise Fail(f"{path}: is not what this stage writes there (lacks {', '.join(absent)}); {mend}")
    return None if changed else saved


def answered(path, config, ignore, processes, anew=False):
    """Whether an earlier run has answered the same question; then what it found is printed. See `earlier`."""
    old = earlier(path, config, ignore, anew, needs=('summary',))
    if old and processes.main:
        say(f"{old['summary']} (finished before: {path})")
    return old is not None


def random_states():
    """States of the generators that training draws from (the loaders draw from hashes and have none)."""
    state = {'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(saved, model, optimizer, scaler, processes):
    """Put a saved state in place; returns the step that it was saved at. random: of each process, or of the first."""
    for name, part in (('model', model), ('optimizer', optimizer), ('scaler', scaler)):
        part.load_state_dict(saved[name])
    states = saved['random'] if isinstance(saved['random'], list) else [saved['random']]
    state = states[processes.rank if len(states) == processes.world else 0]
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
    return saved['step']


# ---------------------------------------------------------------------------------------------------
# Log

@functools.cache
def versions():
    found, git = {}, None
    for name in 'torch torchvision ffcv diffusers open_clip_torch timm numpy numba'.split():
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with suppress(OSError):  # a machine without git
        git = subprocess.run(['git', '-C', str(Path(__file__).parent), 'rev-parse', '--short', 'HEAD'],
                             capture_output=True, text=True).stdout.strip() or None
    return {'python': sys.version.split()[0], **found, 'git': git}


class Log:
    """Run folder of a stage: config.yaml, versions.json, log.jsonl (appended on resume), tensorboard if asked.

    Only rank 0 writes; on other ranks every call does nothing. alone: a second process with this folder is a Fail."""

    def __init__(self, folder, config, main=True, tensorboard=False, alone=True):
        self.main, self.folder, self.board, self.lock = main, Path(folder), None, None
        if not main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if alone:
                self.lock = open(self.folder / '.lock', 'ab')
                locked = lock(self.lock, fcntl.lockf)  # not flock: workers that outlive a kill would inherit it
            path = self.folder / 'log.jsonl'
            cut = path.is_file() and path.read_bytes()[-1:] not in (b'', b'\n')  # by a kill; it takes none along
            self.file = open(path, 'a', buffering=1, encoding='utf-8')
            self.file.write('\n' * cut)
        except BlockingIOError:
            raise Fail(f'{self.folder}: another process is at work in it; wait for it, or set another output=. '
                       'Several processes of one run are started with torchrun (srun alone starts as many runs)'
                       ) from None
        except OSError as error:
            raise Fail(f'{error.filename or self.folder}: cannot be written: {error.strerror}; set another output='
                       ) from None
        if alone and not locked:
            say(f'{self.folder}: the file system knows no locks: a second process in it would go unnoticed', sys.stderr)
        atomic(self.folder / 'config.yaml', lambda p: p.write_text(yaml.safe_dump(config, sort_keys=False)))
        save_json(self.folder / 'versions.json', versions())
        self.file.write(json.dumps({'command': ' '.join(sys.argv), 'time': time.strftime('%Y-%m-%d %H:%M:%S')}) + '\n')
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder / 'tensorboard')
            except Exception as error:  # not installed, or one of its many dependencies is of a wrong version
                self.without_board(error)

    def write(self, line=None, **values):
        """values -> one JSON line and tensorboard scalars at values['step']; line -> standard output."""
        if not self.main:
            return
        if values:
            self.file.write(json.dumps(values) + '\n')
            try:
                for key, value in values.items() if self.board else ():
                    if key != 'step' and isinstance(value, (int, float)):
                        self.board.add_scalar(key, value, values.get('step', 0))
            except Exception as error:  # that of its writing thread, whatever it was
                self.without_board(error)
        if line:
            say(line)

    def without_board(self, error):
        self.board = None
        say(f"tensorboard: goes without, log.jsonl has all figures ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]})", sys.stderr)

    def close(self):
        if self.main:
            self.file.close()
            if self.board:
                with suppress(Exception):
                    self.board.close()
            if self.lock:
                self.lock.close()
