"""Start and end of a stage. Imports nothing that takes time: a mistake in the YAML is answered before torch is there.

    if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
        run(check, DEFAULTS)

    import torch
    ...
    if __name__ == '__main__':
        run(main, DEFAULTS)
"""
import errno
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from config import Fail, load_config


def run(stage, defaults, nullable=()):
    """Entry point of a script: config, then stage(config); what the user can mend is one line and exit code 2."""
    open_streams()
    try:
        stage(load_config(defaults, sys.argv[1:], nullable))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = mendable(error)
        if line:
            say(f'{Path(sys.argv[0]).name}: {line}', sys.stderr)
        elif not group():
            raise
        else:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(2 if line else 1) if group() else sys.exit(2)  # the other ranks may wait in a collective: leave it so
    finally:
        if group():
            group().destroy_process_group()


def mendable(error):
    """What the user is to be told of an error that is no bug, in a line; None of a bug."""
    text = ' '.join(str(error).split())
    if isinstance(error, Fail):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # met by the log; else see atomic()
        return f'{error.strerror}: make room, and the same command goes on'
    if isinstance(error, OSError) and error.filename and error.errno in (
            errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return f'{error.filename}: {error.strerror}: mend that, or name another in the YAML'
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search(NO_MEMORY, text):
        return ('out of memory' + f': {text[:200]}' * bool(text) + '; set a smaller batch (batch_size, batch), image '
                'or network; pretrain.py runs on more GPUs, in half precision or with a larger accumulate')
    if isinstance(error, RuntimeError) and re.search(LOST_WORKER, str(error)):
        return (f"a process that decodes images is lost ({str(error).strip().splitlines()[-1][:120]}): memory or "
                '/dev/shm is too small; set num_workers=0, or give a container more (docker run --shm-size=8g)')
    return None


LOST_WORKER = (r'DataLoader worker \(pid.*(killed|exited)|[Pp]in memory thread exited|'
               r'(allocate shared memory|shm|mmap|resize).*(No space left|Cannot allocate)')

NO_MEMORY = r"out of memory|[Nn]ot enough memory|can't allocate memory"


def group():
    """torch.distributed where this process belongs to a group, else None; does not import it."""
    found = sys.modules.get('torch.distributed')
    return found if found and found.is_initialized() else None


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


def ranks():
    """(rank, world, local rank) of this process: as torchrun says, in all of its variables, or alone."""
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not {'RANK', 'WORLD_SIZE', 'LOCAL_RANK'} & set(given):  # an address alone may be left from a job's script
        return 0, 1, 0
    if len(given) < len(names):
        absent = ', '.join(name for name in names if name not in given)
        raise Fail(f"{', '.join(given)} set in the environment, but not {absent}: start several processes with "
                   'torchrun, which sets them all'
                   + ' (srun starts torchrun once a node, as in slurm/pretrain.sbatch)' * ('SLURM_PROCID' in os.environ)
                   + ', or unset them for a single one')
    for name in names:
        if name != 'MASTER_ADDR' and not given[name].strip().isdecimal():
            raise Fail(f'{name}={given[name]} in the environment is not a number: torchrun sets it; unset it, with '
                       f"{', '.join(n for n in names if n != name)}, for a single process")
    rank, world, local_rank = (int(given[name]) for name in names[:3])
    if rank >= world:
        raise Fail(f'RANK={rank} in the environment must be below WORLD_SIZE={world}: torchrun sets both; unset them '
                   'for a single process')
    return rank, world, local_rank
