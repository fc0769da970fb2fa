"""Fixtures that several test files share."""
import signal

import pytest
import torch


@pytest.fixture(scope='module')
def one_thread():
    """For stages that run in this process: sums are made in the same order as in a sub-process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signal_handlers():
    """A stage that ran in this process leaves its own behind: pytest would not end on SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
