"""What every stage needs and nothing else: YAML config, process group, atomic files, log, stop signal."""
import difflib
import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml


class Fail(Exception):
    """A problem the user can mend: printed as one line (what, where, how), exit code 2."""


# ---------------------------------------------------------------------------------------------------
# Config: a YAML block of defaults in the script, an experiment's YAML on top, key.sub=value on top of that

class _Loader(yaml.SafeLoader):
    """safe_load that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key written twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise Fail(f"line {key.start_mark.line + 1}: key '{key.value}' stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float',
    re.compile(r'^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$'), list('-+0123456789.'))


def _read_yaml(text, where):
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except Fail as error:
        raise Fail(f'{where}: {error}') from None
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        raise Fail(f"{where}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: "
                   f"{getattr(error, 'problem', None) or error}") from None


def _fits(default, value):
    if default is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(default))


def check_keys(given, known, where, prefix=''):
    """Raises Fail unless `given` is a dict with keys of `known` alone. prefix: what they stand under ('moco.')."""
    if not isinstance(given, dict):
        raise Fail(f"{where}: expected the keys {', '.join(known)}, not {given!r}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), [str(k) for k in known], 1, 0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(map(str, known))}"
            raise Fail(f"{where}: unknown key '{prefix}{key}'; {hint}")


def _merge(config, defaults, changes, where, prefix='', nullable=()):
    """Write `changes` over `config`. In `defaults` every allowed key stands with a value of its type (null: any)."""
    check_keys(changes, defaults, where, prefix)
    for key, value in changes.items():
        name, default = f'{prefix}{key}', defaults[key]
        if isinstance(default, dict) and default:
            if not isinstance(value, dict):
                raise Fail(f"{where}: '{name}' must hold keys ({', '.join(default)}), not {value!r}")
            _merge(config[key], default, value, where, f'{name}.', nullable)
        elif not _fits(default, value) and not (value is None and name in nullable):
            raise Fail(f"{where}: '{name}' must be {type(default).__name__} (like {default!r}), not {value!r}")
        else:
            config[key] = float(value) if isinstance(default, float) and value is not None else value


def load_config(defaults, argv, nullable=()):
    """Defaults (YAML text) <- experiment file (argv[0]) <- 'key.sub=value' (the rest).

    Keys of `nullable` may be set to null though their default is not. Returns a nested dict."""
    defaults, config = (_read_yaml(defaults, 'defaults') for _ in range(2))
    files = [a for a in argv if '=' not in a]
    if len(files) != 1:
        raise Fail(f"usage: python {Path(sys.argv[0]).name} EXPERIMENT.yaml [key.sub=value ...]")
    path = Path(files[0])
    if not path.is_file():
        near = [str(p) for p in sorted(Path('yamls').rglob('*.yaml')) if p.parent.name == Path(sys.argv[0]).stem]
        raise Fail(f"{path}: no such file{'; there are ' + ', '.join(near[:6]) if near else ''}")
    changes = _read_yaml(path.read_text(encoding='utf-8'), path)
    changes = {} if changes is None else changes
    if not isinstance(changes, dict):
        raise Fail(f'{path}: must hold keys and values, not {type(changes).__name__}')
    _merge(config, defaults, changes, path, nullable=nullable)
    for argument in argv:
        if '=' in argument:
            name, text = argument.split('=', 1)
            change = _read_yaml(text, argument)  # nothing after = is null
            for key in reversed(name.split('.')):
                change = {key: change}
            _merge(config, defaults, change, 'command line', nullable=nullable)
    return config


def changed_keys(old, new, ignore=(), prefix=''):
    """Dotted names of the keys in which two configs differ, with both values; `ignore` may differ."""
    names = [f'{prefix}{k}' for k in {**old, **new}]
    found = []
    for name, key in zip(names, {**old, **new}):
        a, b = old.get(key), new.get(key)
        if name in ignore or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, ignore, f'{name}.')
        else:
            found.append(f'{name} (was {a!r}, now {b!r})')
    return found


def run(stage, defaults, nullable=()):
    """Entry point of a script: config, then stage(config); what the user can mend is one line and exit code 2."""
    open_streams()
    try:
        stage(load_config(defaults, sys.argv[1:], nullable))
    except (Fail, OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # met by the log; the rest is atomic()
                error = f'{error.strerror}: make room, and the same command goes on'
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
                error = f'{error.filename}: {error.strerror}: change its permissions, or name another in the YAML'
            else:
                raise
        elif isinstance(error, RuntimeError):
            if not re.search(LOST_WORKER, str(error)):
                raise
            error = (f"a process that decodes images is lost ({str(error).strip().splitlines()[-1][:120]}): memory or "
                     '/dev/shm is too small; set num_workers=0, or give a container more (docker run --shm-size=8g)')
        say(f'{Path(sys.argv[0]).name}: {error}', sys.stderr)
        os._exit(2) if dist.is_initialized() else sys.exit(2)  # the other ranks may wait in a collective
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


LOST_WORKER = (r'DataLoader worker \(pid.*(killed|exited)|[Pp]in memory thread exited|'
               r'(allocate shared memory|shm|mmap|resize).*(No space left|Cannot allocate)')


def open_streams():
    """Names of files may hold what the terminal's encoding cannot print; a closed standard stream gets a stand-in, or
    the next file to be opened would take its number, and what a library prints would land in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        with suppress(AttributeError):  # a notebook's or a test's own
            getattr(sys, name).reconfigure(errors='backslashreplace')


def say(line, stream=None):
    """Print, but to nobody where nobody listens any more (`| head`, a terminal that is gone, a full disk)."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        with suppress(OSError):  # what is left in the buffer would fail again, at the latest at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------------------------
# Processes

def ranks():
    """(rank, world, local rank) of this process: as torchrun says, in all of its variables, or alone."""
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not {'RANK', 'WORLD_SIZE', 'LOCAL_RANK'} & set(given):  # an address alone may be left from a job's script
        return 0, 1, 0
    if len(given) < len(names):
        raise Fail(f"{', '.join(given)} set in the environment, but not "
                   f"{', '.join(name for name in names if name not in given)}: start several processes with torchrun, "
                   'which sets them all' + (' (srun starts torchrun once a node, as in slurm/pretrain.sbatch)' if
                                      'SLURM_PROCID' in os.environ else '') + ', or unset them for a single one')
    for name in names:
        if name != 'MASTER_ADDR' and not given[name].strip().isdecimal():
            raise Fail(f'{name}={given[name]} in the environment is not a number: torchrun sets it; unset it, with '
                       f"{', '.join(n for n in names if n != name)}, for a single process")
    rank, world, local_rank = (int(given[name]) for name in names[:3])
    if rank >= world:
        raise Fail(f'RANK={rank} in the environment must be below WORLD_SIZE={world}: torchrun sets both; unset them '
                   'for a single process')
    return rank, world, local_rank


class Processes:
    """rank, local_rank, world and device of this process; a process group exists under torchrun (and with group)."""

    def __init__(self, device='auto', group=True):
        self.rank, self.world, self.local_rank = ranks()
        cuda = torch.cuda.is_available() if device == 'auto' else device.startswith('cuda')
        if cuda and not torch.cuda.is_available():
            raise Fail("device: cuda asked for, but torch sees no GPU; set device=auto or device=cpu")
        self.device = torch.device('cuda', self.local_rank) if cuda else torch.device('cpu')
        if cuda:
            torch.cuda.set_device(self.device)  # before anything allocates, or every rank opens a context on GPU 0
        if group and os.environ.get('RANK') and not dist.is_initialized():
            backend = 'cpu:gloo,cuda:nccl' if cuda else 'gloo'
            # rank 0 may check a beton of hundreds of GB, or fetch a dataset, before the others hear of it again
            dist.init_process_group(backend, timeout=timedelta(hours=2), **({'device_id': self.device} if cuda else {}))

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
        task, tasks, low, high, step = (int(os.environ.get(f'SLURM_ARRAY_TASK_{name}', default)) for name, default in
                                        (('ID', 0), ('COUNT', 1), ('MIN', 0), ('MAX', 0), ('STEP', 1)))
        if (high - low) // step + 1 != tasks:  # such as --array=3,7,8, the failed ones of an earlier array
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

    def leave(self, log, where):
        """Say where the stage was left, and end the process."""
        log.write(f'{self.name or "stop signal"}: {where}')  # of several processes another one may have got it
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
# Files

def lock(file, how=None):
    """Lock an open file until it is closed or the process ends, however it ends; raises BlockingIOError while another
    process has it. how: fcntl.flock (default) or .lockf. Returns whether the file system knows locks: Lustre and NFS
    often do not."""
    try:
        (how or fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    return True


def atomic(path, write, once=False):
    """write(temporary_path), then rename: a reader sees the old file or the new one, never half of one. once: a file
    that is there stays as it is, so that of two processes that make the same one the first counts for both."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.uname().nodename}.{os.getpid()}.tmp{path.suffix}')
    temporary.unlink(missing_ok=True)  # of a killed process with this number; it may be a link to the finished file
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        if once:
            with suppress(OSError):  # it is there, or the file system has no links
                os.link(temporary, path)
        if not once or not path.exists():
            os.replace(temporary, path)
    except OSError as error:
        raise Fail(f'{path}: cannot be written: {error.strerror or error}') from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state):
    atomic(path, lambda p: torch.save(state, p))


def load_checkpoint(path):
    """A checkpoint on the CPU, unpickled without running code."""
    path = Path(path)
    if not path.is_file():
        raise Fail(f'{path}: no such checkpoint')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        names = re.findall(r'GLOBAL (\S+)', str(error))
        with suppress(Exception):  # all of them, where the file is of a kind that can be searched
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path) or names
        if names:
            raise Fail(f"{path}: holds objects of {', '.join(names)}, whose code would have to run to read it: load it "
                       'where you trust it and save its state_dict alone') from None
        raise Fail(f'{path}: cannot be read as a checkpoint ({type(error).__name__}: '
                   f'{str(error).splitlines()[0][:120]}); delete it to start again') from None


def earlier(path, config, ignore, anew=False):
    """What an earlier run wrote into `path`, .json or a checkpoint, or None where there is nothing. Where its config
    differs in other keys than `ignore` it is a Fail, or, to begin anew, None."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text()) if path.suffix == '.json' else load_checkpoint(path)
    changed = changed_keys(saved['config'], config, ignore)
    if changed and not anew:
        raise Fail(f"{path} was made with another config: {'; '.join(changed)}. Go back to it, or set another output=")
    return None if changed else saved


def answered(path, config, ignore, processes, anew=False):
    """Whether an earlier run has answered the same question; then what it found is printed. See `earlier`."""
    old = earlier(path, config, ignore, anew)
    if old and processes.main:
        say(f"{old['summary']} (finished before: {path})")
    return old is not None


def save_json(path, value, once=False):
    atomic(path, lambda p: p.write_text(json.dumps(value, indent=1) + '\n'), once)


def random_states():
    """States of the generators that training draws from (the loaders draw from hashes and have none)."""
    state = {'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_states(state):
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def restore(saved, model, optimizer, scaler, processes):
    """Put a saved state in place; returns the step that it was saved at. random: of each process, or of the first."""
    for name, part in (('model', model), ('optimizer', optimizer), ('scaler', scaler)):
        part.load_state_dict(saved[name])
    states = saved['random'] if isinstance(saved['random'], list) else [saved['random']]
    set_random_states(states[processes.rank if len(states) == processes.world else 0])
    return saved['step']


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------
# Log

def versions():
    names = 'torch torchvision ffcv diffusers open_clip_torch timm numpy numba'.split()
    found = {n: metadata.version(n) for n in names if _installed(n)}
    git = None
    with suppress(OSError):  # a machine without git
        git = subprocess.run(['git', '-C', str(Path(__file__).parent), 'rev-parse', '--short', 'HEAD'],
                             capture_output=True, text=True).stdout.strip() or None
    return {'python': sys.version.split()[0], **found, 'git': git}


def _installed(name):
    try:
        metadata.version(name)
        return True
    except metadata.PackageNotFoundError:
        return False


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
                lock(self.lock, fcntl.lockf)  # not flock: workers that outlive a killed process would inherit it
            self.file = open(self.folder / 'log.jsonl', 'a', buffering=1, encoding='utf-8')
        except BlockingIOError:
            raise Fail(f'{self.folder}: another process is at work in it; wait for it, or set another output=. '
                       'Several processes of one run are started with torchrun (srun alone starts as many runs)'
                       ) from None
        except OSError as error:
            raise Fail(f'{error.filename or self.folder}: cannot be written: {error.strerror}; set another output='
                       ) from None
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
