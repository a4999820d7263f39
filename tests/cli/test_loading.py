"""What is imported inside is left out of garbage collection; what comes later is not."""

import gc

import pytest

from autoquant.cli.loading import loading


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()
    gc.enable()


def test_what_is_loaded_is_set_aside_and_collection_goes_on():
    with loading():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)
    later = []
    assert any(o is later for o in gc.get_objects())
    assert not any(o is kept for o in gc.get_objects())


def test_collection_stays_off_where_the_user_turned_it_off():
    gc.disable()
    with loading():
        pass
    assert not gc.isenabled()


def test_collection_goes_on_where_an_import_fails():
    with pytest.raises(ImportError), loading():
        raise ImportError("no module")
    assert gc.isenabled()
