"The tool that runs the tests with other versions notices when it does not"

import sys
from pathlib import Path

import fastai
import pytest

import compat

PACKAGE = Path(compat.ROOT) / 'fixmatch_fastai/__init__.py'


def wrong(imported='2.8.7', package=PACKAGE, unmet=()):
    "What `compat.check` finds where fastai 2.8.7 and plum-dispatch 2.5.8 should be"
    pins = {'fastai': '2.8.7', 'plum-dispatch': '2.5.8'}
    found = dict(imported={'fastai': imported}, installed=pins, package=str(package), unmet=list(unmet))
    return list(compat.check('kaggle', pins, found))


def test_wrong_versions_are_noticed():
    assert wrong() == []
    assert wrong(imported='2.8.12') == ['kaggle should have fastai 2.8.7, but imports 2.8.12.']
    unmet = 'timm needs torch, but there is None'
    assert wrong(unmet=[unmet]) == [f'kaggle: {unmet}.']
    (sentence,) = wrong(package='/elsewhere/fixmatch_fastai/__init__.py')
    assert 'not the package beside it' in sentence


@pytest.mark.slow
def test_versions_are_those_imported():
    here = compat.look(sys.executable, ['fastai', 'timm'])
    assert here['imported']['fastai'] == fastai.__version__ and here['unmet'] == []
    assert f'fastai {fastai.__version__}' in compat.in_one_line(here)


def test_unknown_environment():
    with pytest.raises(SystemExit, match='no environment nowhere: use kaggle or colab'):
        compat.main(['nowhere', '--', '-x'])
