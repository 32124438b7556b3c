import pytest
from playground import Stock


@pytest.fixture(scope="session")
def stock(request, tmp_path_factory) -> Stock:
    """Data and trained networks that pages name, made when they are first named."""
    return Stock(tmp_path_factory.mktemp("docs"), request.getfixturevalue)
