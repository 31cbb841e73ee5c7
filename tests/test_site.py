"What makes and checks the site finds what it is there to find"

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import site_hooks  # noqa: E402
from check_site import failures  # noqa: E402


def test_each_kind_of_broken_link(tmp_path):
    (tmp_path / 'api').mkdir()
    (tmp_path / 'a.png').write_bytes(b'')
    (tmp_path / 'api/two.html').write_text('<h2 id="there">x</h2><a href="../one.html">back</a><a href="#there">here</a><a href="#gone">nowhere</a>')
    (tmp_path / 'one.html').write_text("""
        <img src="a.png"><img src="data:image/png;base64,xx"><img src="b.png"><script src="https://elsewhere.org/x.js"></script>
        <a href="https://elsewhere.org">fine</a><a href="api/two.html#there">fine</a><a href="api/two.html#missing">x</a><a href="api/three.html">x</a><a href="api/two.md">x</a>
        <link rel="next" href="https://elsewhere.org/two.html"><link rel="stylesheet" href="none.css">""")
    found = list(failures(tmp_path))
    assert [o.split(':')[0] for o in found] == [
        'api/two.html links to #gone, and there is no such heading',
        'one.html links to b.png, and there is no b.png',
        'one.html loads https',
        'one.html links to none.css, and there is no none.css',
        'one.html links to api/two.html#missing, and there is no such heading',
        'one.html links to api/three.html, and there is no api/three.html',
        'one.html links to api/two.md, and there is no api/two.md',
    ]


def test_formulas_that_would_be_shown_as_written():
    page = SimpleNamespace(file=SimpleNamespace(src_path='x.md'))
    formula = r'<span class="arithmatex">\(\hat{{y}} = {} T(u)\)</span>'
    shown = site_hooks.on_page_content(formula.format(r'\mathrm{argmax}\ '), page)
    assert shown.startswith('<math') and '\\' not in shown
    with pytest.raises(SystemExit, match=r'x\.md: \\arg in the formula .* is not known'):
        site_hooks.on_page_content(formula.format(r'\arg\max'), page)
