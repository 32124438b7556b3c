import pytest
import torch


@pytest.fixture(autouse=True)
def seed_and_one_thread():
    torch.manual_seed(1904)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small, threads that wait for one another cost several times the work
    yield
    torch.set_num_threads(threads)
