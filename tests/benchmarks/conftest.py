import gc
import pickle

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Benchmarks collect garbage before they measure, which takes long among the objects of all test modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Benchmarks set the number of threads of their process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here():
    """In place of `in_fresh_process`: what is asked and answered is pickled as it is there, and called in this one."""

    def call(function, *arguments, threads=None, limit=None, timeout=0.0):
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))  # noqa: S301
        return pickle.loads(pickle.dumps(function(*arguments)))  # noqa: S301

    return call
