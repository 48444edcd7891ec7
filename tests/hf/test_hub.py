import io
import logging
import warnings

import pytest

from gradfn.hf import hub


def test_quiet_puts_back_what_it_found():
    from tqdm.auto import tqdm

    before = tqdm.__init__, logging.root.manager.disable, warnings.filters[:]
    with hub.quiet():
        assert tqdm([1]).disable
        assert not logging.getLogger("transformers").isEnabledFor(logging.WARNING)
    assert (tqdm.__init__, logging.root.manager.disable, warnings.filters[:]) == before
    assert not tqdm([1], file=io.StringIO()).disable


def test_quiet_puts_it_back_after_an_error():
    from tqdm.auto import tqdm

    before = tqdm.__init__, logging.root.manager.disable
    with pytest.raises(KeyError), hub.quiet():
        raise KeyError
    assert (tqdm.__init__, logging.root.manager.disable) == before
