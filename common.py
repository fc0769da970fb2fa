"""What every stage needs and nothing else: YAML config, process group, atomic files, log, stop signal."""
import difflib
import errno
import fcntl
import json
import os
import random
import re
import reprlib
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

    def __init__(self, problem):
        super().__init__(' '.join(str(problem).splitlines()))  # names and texts of others may hold line breaks


# ---------------------------------------------------------------------------------------------------
# Config: a YAML block of defaults in the script, an experiment's YAML on top, key.sub=value on top of that

_shown = reprlib.Repr()  # for error lines: no value is too large for one, and none too deep
_shown.maxstring, _shown.maxother, _shown.maxlevel = 120, 120, 2


class _Loader(yaml.SafeLoader):
    """safe_load of what a config may hold: keys are words, each written once, 1e-4 is a number (YAML 1.1 wants 1.0e-4),
    010 is 10 (there 8), and dates, 0x10, 1_000, 1:30 and .nan are texts."""

    yaml_implicit_resolvers = {
        first: [(tag, expression) for tag, expression in pairs if tag.endswith(('bool', 'null', 'merge'))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            line = f'line {key.start_mark.line + 1}'
            if not isinstance(key, yaml.ScalarNode):
                raise Fail(f'{line}: a key must be a word')
            if key.value in seen:
                raise Fail(f"{line}: key '{key.value}' stands twice")
            seen.add(key.value)
        return node

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())  # '<<' of '<<' would swell


for _kind, _digits in (('int', r'[0-9]+$'), ('float', r'([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$')):
    _Loader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile('[-+]?' + _digits), list('-+0123456789.'))
_Loader.add_constructor('tag:yaml.org,2002:int', lambda loader, node: int(loader.construct_scalar(node)))


class _DefaultsLoader(_Loader):
    """`!int null`: null or what the tag says (!texts: a text or a list). The value of such a key becomes the types."""


for _tag, _types in (('text', str), ('int', int), ('float', float), ('bool', bool), ('texts', (str, list))):
    _DefaultsLoader.add_constructor(f'!{_tag}', lambda loader, node, types=_types: types)


def _read_yaml(text, where, loader=_Loader):
    try:
        return yaml.load(text, loader)  # a SafeLoader
    except Fail as error:
        raise Fail(f'{where}: {error}') from None
    except Exception as error:  # PyYAML raises nearly everything: `!!bool x` is a KeyError, deep nesting ends the stack
        mark = getattr(error, 'problem_mark', None)
        raise Fail(f"{where}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: "
                   f"{getattr(error, 'problem', None) or str(error) or repr(error)}") from None


def _null_types(value):
    """Of a default that is null: what may stand in its place."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, type) else ()


def default_config(defaults):
    """The config that the defaults (YAML text) alone give."""
    def without_types(value):
        return None if _null_types(value) else \
            {k: without_types(v) for k, v in value.items()} if isinstance(value, dict) else value
    return without_types(_read_yaml(defaults, 'defaults', _DefaultsLoader))


def _plain(value, problem, depth=0):
    """A value with $NAME and ~ expanded. problem(text): the Fail for what no key of any stage can hold."""
    if isinstance(value, list) and depth < 2 and len(value) <= 1000:
        return [_plain(entry, problem, depth + 1) for entry in value]
    if isinstance(value, str):
        for name in re.findall(r'\$(\w+|\{\w+\})', value):
            if name.strip('{}') not in os.environ:
                raise problem(f'names ${name}, which is not set in the environment')
        value = os.path.expanduser(os.path.expandvars(value))
        if value.startswith('~'):
            raise problem('begins with the name of a user who is not there')
        if re.search(r'[\0-\x1f\ud800-\udfff]', value):
            raise problem('holds a character that no name has (a control character, or what is not UTF-8)')
        if max(len(part.encode()) for part in value.split('/')) > 255 or len(value.encode()) > 4000:
            raise problem('is longer than a name can be (255 bytes)')
    elif isinstance(value, (int, float)):
        if not abs(value) < 2 ** 63:  # so with nan
            raise problem('must be finite and have at most 18 digits')
    elif value is not None:
        raise problem('must hold one value, or a list of values')
    return value


def _fits(default, value):
    if default is None:
        return True
    for kind in _null_types(default) or (type(default),):
        if isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool):
            return True
    return value is None and bool(_null_types(default))


def check_keys(given, known, where, prefix=''):
    """Raises Fail unless `given` is a dict with keys of `known` alone. prefix: what they stand under ('moco.')."""
    if not isinstance(given, dict):
        raise Fail(f"{where}: expected the keys {', '.join(known)}, not {_shown.repr(given)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:100], [str(k) for k in known], 1, 0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(map(str, known))}"
            raise Fail(f"{where}: unknown key '{prefix}{str(key)[:100]}'; {hint}")


def _merge(config, defaults, changes, where, prefix='', nullable=()):
    """Write `changes` over `config`. In `defaults` every allowed key stands with a value of its type, or the types of
    one that is null (null itself: any)."""
    check_keys(changes, defaults, where, prefix)
    for key, value in changes.items():
        name, default = f'{prefix}{key}', defaults[key]
        types = _null_types(default)

        def problem(text):
            return Fail(f"{where}: '{name}' {text}: {_shown.repr(value)}")
        if isinstance(default, dict) and default:
            if not isinstance(value, dict):
                raise problem(f"must hold keys ({', '.join(default)})")
            _merge(config[key], default, value, where, f'{name}.', nullable)
            continue
        value = _plain(value, problem)
        if not _fits(default, value) and not (value is None and name in nullable):
            kind = ' or '.join(t.__name__ for t in types) + ' or null' if types else \
                f'{type(default).__name__} (like {default!r})'
            text = str in (*types, type(default)) and isinstance(value, (int, float))
            raise Fail(f"{where}: '{name}' must be {kind}, not {_shown.repr(value)}" + '; put it in quotes' * text)
        number = (isinstance(default, float) or float in types) and value is not None
        config[key] = float(value) if number else value


def _at_command_line(text, default, argument):
    """The value of key=text. Where a text is due it is the text as it stands, without YAML's comments and dates."""
    types = _null_types(default)
    if types and text in ('', 'null', '~'):
        return None
    if isinstance(default, str) or types[:1] == (str,) and not (list in types and text.startswith('[')):
        return text
    return _read_yaml(text, argument)  # nothing after = is null


def load_config(defaults, argv, nullable=()):
    """Defaults (YAML text) <- experiment file <- 'key.sub=value' (the other arguments).

    Keys of `nullable` may be set to null though their default is not; what keys that are null may hold instead stands
    in the defaults as a tag. In texts ~ and $NAME are expanded. Returns a nested dict."""
    config, defaults = default_config(defaults), _read_yaml(defaults, 'defaults', _DefaultsLoader)
    changes = [a for a in argv if '=' in a and '/' not in a.partition('=')[0] and not os.path.isfile(a)]
    files = [a for a in argv if a not in changes]
    if len(files) != 1:
        raise Fail(f"usage: python {Path(sys.argv[0]).name} EXPERIMENT.yaml [key.sub=value ...]")
    path, = files
    try:
        if os.path.exists(path) and not os.path.isdir(path) and (
                not os.path.isfile(path) or os.path.getsize(path) > 1_000_000):  # a pipe, a device, a beton
            raise Fail(f'{path}: is not an experiment file')
        text = Path(path).read_bytes()
        found = _read_yaml(text.decode('utf-8-sig'), path)
    except (FileNotFoundError, NotADirectoryError):
        near = [str(p) for p in sorted(Path('yamls').rglob('*.yaml')) if p.parent.name == Path(sys.argv[0]).stem]
        raise Fail(f"{path}: no such file{'; there are ' + ', '.join(near[:6]) if near else ''}") from None
    except UnicodeDecodeError as error:
        raise Fail(f'{path}: is not UTF-8 (byte {error.start}): save it as UTF-8') from None
    except IsADirectoryError:
        raise Fail(f'{path}: is a folder; name a YAML file in it') from None
    except (OSError, ValueError) as error:
        raise Fail(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise Fail(f'{path}: must hold keys and values, not {type(found).__name__}')
    _merge(config, defaults, found, path, nullable=nullable)
    for argument in changes:
        name, text = argument.split('=', 1)
        default = defaults
        for key in name.split('.'):
            default = default.get(key) if isinstance(default, dict) else None
        change = _at_command_line(text, default, argument)
        for key in reversed(name.split('.')):
            change = {key: change}
        _merge(config, defaults, change, 'command line', nullable=nullable)
    return config


def flat(config, prefix=''):
    """Nested dict -> {'key.sub': value}."""
    parts = [flat(v, f'{prefix}{k}.') if isinstance(v, dict) else {f'{prefix}{k}': v} for k, v in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def check_values(config, allowed):
    """Raises Fail where a value is none of those that a stage can work with; what may be null, may.

    allowed: {dotted key, or the last part of several: rule}, a rule being what must be named ('file'; of a list each),
    (lowest, highest) of a number or of each in a list, whole where lowest is, or a list of the values that there are"""
    for key, value in flat(config).items():
        rule = allowed.get(key, allowed.get(key.rpartition('.')[2]))
        if isinstance(rule, str):
            names = value if isinstance(value, list) and value else [value]
            if not all(isinstance(name, str) and name for name in names):
                raise Fail(f'{key}: must name a {rule} ({key}=...)')
        elif isinstance(rule, tuple):
            for number in value if isinstance(value, list) else [value] if value is not None else []:
                kinds = (int,) if isinstance(rule[0], int) else (int, float)
                if type(number) not in kinds or not rule[0] <= number <= rule[1]:
                    raise Fail(f"{key}: {_shown.repr(number)} must be a {'whole ' * (kinds == (int,))}number from "
                               f'{rule[0]} to {rule[1]}')
        elif rule and value is not None and value not in rule:
            near = difflib.get_close_matches(str(value), map(str, rule), 1, 0.7)
            raise Fail(f"{key}: {_shown.repr(value)} is none of {', '.join(map(str, rule))}"
                       + ''.join(f"; did you mean '{name}'?" for name in near))


def run_folder(output):
    """The folder that a stage writes into, as a Path. Raises Fail where it cannot be made or written into; nothing is
    made yet. (One that is full may be read alone: it may hold the finished result.)"""
    folder = Path(output)
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        raise Fail(f'output: {place} is a file, or a link to nowhere, where {folder} is to be a folder; set another '
                   'output=')
    if not os.access(place, os.W_OK | os.X_OK) and not os.path.isfile(folder / 'config.yaml'):
        raise Fail(f'output: {folder}: {place} cannot be written into (read-only, or of another user); set another '
                   'output=')
    return folder


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
        absent = ', '.join(name for name in names if name not in given)
        raise Fail(f"{', '.join(given)} set in the environment, but not {absent}: start several processes with "
                   'torchrun, which sets them all' + (' (srun starts torchrun once a node, as in slurm/pretrain.sbatch)' if
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
        self.device = self._device(device)
        cuda = self.device.type == 'cuda'
        if cuda:
            torch.cuda.set_device(self.device)  # before anything allocates, or every rank opens a context on GPU 0
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

def lock(file, how=fcntl.flock):
    """Lock an open file until it is closed or the process ends, however it ends; raises BlockingIOError while another
    process has it. Returns whether the file system knows locks: Lustre and NFS often do not."""
    try:
        how(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    def write(temporary):
        with open(temporary, 'wb') as file:  # of a path torch.save puts the name into the file: no two would be equal
            try:
                torch.save(state, file)
            except RuntimeError as error:  # from its writer, also where the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error
    atomic(path, write)


def damage(path):
    """What a file that could not be read is by its first bytes, and what mends it: two texts, empty where none show."""
    path, again = Path(path), 'copy or download it again'
    try:
        with open(path, 'rb') as file:
            head, size = file.read(1024), path.stat().st_size
            text, length = head.removeprefix(b'\xef\xbb\xbf').lstrip().lower(), int.from_bytes(head[:8], 'little')
            file.seek(max(0, size - 66_000))  # where a zip archive, as torch.save and np.savez write, has its end
            whole = b'PK\5\6' in file.read()
            file.seek(8)
            entries = json.loads(file.read(length)) if head[8:9] == b'{' and length < min(size, 1e8) else {}
    except OSError as error:
        return f'cannot be read ({error.strerror})', again
    except ValueError:
        entries = {}
    if not size:
        return 'is empty', again
    if not head.strip(b'\0'):
        return 'begins with zeros: it was not written to the end', again
    if text.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself', '`git lfs pull` fetches that'
    if text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml')):
        return 'is a web page, not the file itself', again
    if head.startswith(b'PK\3\4') and not whole:
        return 'is cut short', again
    if isinstance(entries, dict) and head[8:9] == b'{' and length < 1e8:
        ends = [8 + length, *(8 + length + e['data_offsets'][1] for e in entries.values() if 'data_offsets' in e)]
        if max(ends) > size:
            return 'is cut short', again
        if path.suffix != '.safetensors':
            return 'is in the format of safetensors', 'let its name end in .safetensors'
    if head.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')):
        return 'is compressed', 'unpack it first'
    if head[257:262] == b'ustar' and path.suffix != '.tar':
        return 'is a tar archive', 'unpack it first'
    if path.suffix == '.json':
        try:
            return ('', again) if isinstance(json.loads(path.read_bytes()), (dict, list)) else ('is no JSON', again)
        except (OSError, ValueError):
            return 'is no JSON, or cut short', again
    if path.suffix != '.yaml' and not set(head) - set(range(32, 127)) - set(b'\t\r\n'):
        return 'is text', again
    if path.suffix == '.safetensors' and head[8:9] != b'{':
        return 'is not in the format of safetensors', again
    return '', again


def unreadable(path, error, mend=None, what=''):
    """The Fail for a file whose reading ended in `error`. mend: how to get it again, where we know. what: it should be.
    """
    found, usual = damage(path)
    if not found:
        found = f"cannot be read{what and f' as {what}'} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return Fail(f'{path}: {found}; {mend or usual}')


def load_checkpoint(path, mend=None):
    """A checkpoint on the CPU, unpickled without running code. mend: what the user should do about a damaged one."""
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
        if names and not damage(path)[0]:
            raise Fail(f"{path}: holds objects of {', '.join(names)}, whose code would have to run to read it: load it "
                       'where you trust it and save its state_dict alone') from None
        raise unreadable(path, error, mend, 'a checkpoint') from None


def load_json(path, mend=None):
    """The dict that a .json holds."""
    try:
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f'holds {type(found).__name__}')
        return found
    except (OSError, ValueError) as error:
        raise unreadable(path, error, mend) from None


def load_arrays(path, mend=None, keys=None, mmap_mode=None):
    """The arrays of a .npz, a dict with at least `keys`; without keys the one array of a .npy."""
    try:
        found = np.load(path, mmap_mode, allow_pickle=False)
        if isinstance(found, np.ndarray) != (keys is None):
            raise ValueError('holds one array' if keys else 'holds several arrays')
        if keys is None:
            return found
        with found:
            absent = [key for key in keys if key not in found]
            if absent:
                raise ValueError(f"holds no {', '.join(absent)}")
            return dict(found)
    except Exception as error:  # of numpy, zipfile and pickle
        raise unreadable(path, error, mend) from None


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
        raise Fail(f"{path} was made with another config: {'; '.join(changed)}. Go back to it, or set another output=")
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
