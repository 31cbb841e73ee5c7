"What makes and checks the site finds what it is there to find"

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import site_hooks

ROOT = Path(__file__).parent.parent

BROKEN = """
[heading](photos.md#gone) ![picture](b.png) [page](three.md) [here](#nowhere) [built](index.html) [absolute](/abs.md)

[elsewhere, fine](https://elsewhere.org) [heading, fine](photos.md#photos-measured)
"""


@pytest.mark.slow
def test_each_kind_of_broken_link(tmp_path):
    for o in ('docs', 'tools'):
        shutil.copytree(ROOT / o, tmp_path / o)
    shutil.copy(ROOT / 'mkdocs.yml', tmp_path)
    with (tmp_path / 'docs/matrix.md').open('a') as f:
        f.write(BROKEN)
    mkdocs = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
    env = os.environ | {'NO_MKDOCS_2_WARNING': '1'}
    built = subprocess.run(mkdocs, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert built.returncode
    found = [o for o in built.stderr.splitlines() if o.startswith('WARNING')]
    assert len(found) == 6 and all("'matrix.md'" in o for o in found)
    for target in ('photos.md', 'b.png', 'three.md', '#nowhere', 'index.html', '/abs.md'):
        assert any(target in o for o in found)


def page(name='x.md'):
    return SimpleNamespace(file=SimpleNamespace(src_path=name))


@pytest.mark.parametrize('html', [
    '<script defer src="https://elsewhere.org/x.js">',
    '<img alt="x" src="//elsewhere.org/x.png">',
    '<link rel="stylesheet" href="https://elsewhere.org/x.css">',
])  # fmt: skip
def test_what_is_loaded_from_another_host(html):
    with pytest.raises(SystemExit, match=r'x\.md loads something from another host'):
        site_hooks.on_post_page(html, page())


def test_what_is_only_linked_to_another_host():
    html = '<a href="https://elsewhere.org">x</a><img src="a.png"><link rel="next" href="https://elsewhere.org">'
    assert site_hooks.on_post_page(html, page()) == html


def test_formulas_that_would_be_shown_as_written():
    formula = r'<span class="arithmatex">\(\hat{{y}} = {} T(u)\)</span>'
    shown = site_hooks.on_page_content(formula.format(r'\mathrm{argmax}\ '), page())
    assert shown.startswith('<math') and '\\' not in shown
    with pytest.raises(SystemExit, match=r'x\.md: \\arg in the formula .* is not known'):
        site_hooks.on_page_content(formula.format(r'\arg\max'), page())


def test_names_of_inner_rooms_are_linked_in_these_alone():
    spec = importlib.util.spec_from_file_location('write_docs', ROOT / 'tools/docs.py')
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    names = {
        'fit': 'docs/api/cli/training.md#fit',
        'fixmatch_train': 'docs/api/cli/train.md#fixmatch_train',
        'FixMatch': 'docs/api/callback.md#fixmatch',
    }
    linked = {dest: docs.linked('`fit` `fixmatch_train` `FixMatch`', dest, dest, names).split() for dest in (
        'docs/api/ema.md', 'docs/api/cli/train.md')}  # fmt: skip
    assert linked['docs/api/ema.md'] == [
        '`fit`',
        '[`fixmatch_train`](cli/train.md#fixmatch_train)',
        '[`FixMatch`](callback.md#fixmatch)',
    ]
    assert linked['docs/api/cli/train.md'] == [
        '[`fit`](training.md#fit)',
        '[`fixmatch_train`](#fixmatch_train)',
        '[`FixMatch`](../callback.md#fixmatch)',
    ]
