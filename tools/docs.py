"""Write the pages in docs/ and README.md from the notebooks.

    python tools/docs.py            write the pages and README.md
    python tools/docs.py --readme   write README.md and its pictures only
    python tools/docs.py --check    write nothing; fail when a page is out of step with its notebook

nbdev hides cells and puts the documentation of symbols in the place of their code, nbconvert makes Markdown of the
rest. The same notebooks give the same bytes: nothing here depends on the time or the machine.
"""

import argparse
import os
import re
import sys
import warnings
from configparser import ConfigParser
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from nbdev import processors
from nbdev.doclinks import nbglob
from nbdev.showdoc import show_doc
from traitlets.config import Config

from symbols import Symbol

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    'ARCHITECTURE.md': 'docs/architecture.md',
    'CHANGELOG.md': 'docs/changelog.md',
    'CONTRIBUTING.md': 'docs/contributing.md',
    'benchmarks/photos.md': 'docs/photos.md',
    'benchmarks/policies.md': 'docs/benchmarks.md',
    'benchmarks/self_training.md': 'docs/self_training.md',
    'benchmarks/results.md': 'docs/speed.md',
    'benchmarks/matrix.md': 'docs/matrix.md',
    'benchmarks/torture.md': 'docs/torture.md',
}  # pages that are not notebooks
README_PICTURES = ('docs/images/index/', 'docs/images/badges/')
PICTURES = {'benchmarks/photos.png': 'docs/images/photos.png'}  # and pictures that are no cell's
INSIDE = ('docs/api/cli/', 'docs/api/experiment/')  # whose names are linked in their own pages only
FOR_QUARTO = {'FrontmatterProc', 'add_links', 'add_fold'}  # steps of nbdev that write what only Quarto reads
BARS = re.compile(r'(?s)<style.*?</style>\s*|<div>\s*<progress.*?</div>| (?:border|class|style)="[^"]*"|^\s+', re.M)
BLOCKS = r'^(?P<fence>`{3,}).*?^(?P=fence)|^\$\$.*?\$\$|^#[^\n]*'  # these stay as they are
CODE = r'(?P<ticks>`+)(?P<code>.+?)(?P=ticks)'
LINK = r'(?P<text>!?\[[^\[\]]*\])\((?P<target>[^()\s]+)\)'
WORDS = re.compile('|'.join([BLOCKS, CODE, LINK]), re.M | re.S)
CONFIG = Config({'CoalesceStreamsPreprocessor': {'enabled': True}})
CONFIG.ExtractOutputPreprocessor.extract_output_types = {'image/png'}
CONFIG.ExtractOutputPreprocessor.output_filename_template = '{cell_index}_{index}{extension}'
TEMPLATE = """
{%- extends 'markdown/index.md.j2' %}
{% block input %}

```python
{{ cell.source }}
```
{% endblock %}
{% block stream %}

```text
{{ output.text }}
```
{% endblock %}
{% block data_text %}

```text
{{ output.data['text/plain'] | strip_ansi }}
```
{% endblock %}
{% block data_png %}

![{{ output.metadata.heading }}]({{ output.metadata.filenames['image/png'] }})
{% endblock %}
"""

BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {value}">
<rect width="{width}" height="20" rx="3" fill="#3f51b5"/>
<path d="M3 0h{left}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#555"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="8" y="14">{label}</text><text x="{x}" y="14" text-anchor="middle">{value}</text></g></svg>
"""


class ShowDocs(processors.exec_show_docs):
    "nbdev's step that documents symbols, in the form given in symbols.py"

    def begin(self):
        super().begin()
        # nbdev puts the symbols of a cell from last to first
        runs = groupby(self.nb.cells, key=lambda c: hasattr(c, 'has_sd'))
        self.nb.cells = [c for documented, run in runs for c in (reversed(list(run)) if documented else run)]
        self.k.user_ns['show_doc'] = partial(show_doc, renderer=Symbol)


class Processed(processors.FilterDefaults):
    "nbdev's steps for documentation"

    def base_procs(self):
        procs = [p for p in super().base_procs() if p.__name__ not in FOR_QUARTO]
        return [ShowDocs if p is processors.exec_show_docs else p for p in procs]


class Tidy(Preprocessor):
    "Away with what is meant for a terminal or for Jupyter: directives, warnings, progress bars, styles"

    heading = ''

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == 'markdown':
            self.heading = re.sub(r'[`\[\]]', '', [self.heading, *re.findall(r'^#+ +(.*)', cell.source, re.M)][-1])
        elif cell.cell_type == 'code':
            cell.metadata['transient'] = {'remove_source': bool(re.search(r'^#\| *echo: *false', cell.source, re.M))}
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
            cell.outputs = [o for o in cell.outputs if self.shown(o)]
        return cell, resources

    def shown(self, o):
        "Tidy one output; is anything left of it?"
        if o.output_type == 'stream':
            o.text = re.sub(r'.*█.*\n?|\x1b\[[0-9;]*m|[ \r]+$', '', o.text, flags=re.M).strip('\n')
            return o.name == 'stdout' and o.text
        o.metadata['heading'] = self.heading
        if 'text/html' in o.data:
            o.data['text/html'] = BARS.sub('', o.data['text/html']).strip()
        return o.data.get('text/html', True)


def importing(module):
    "How the names of a page are had, as Markdown"
    everything, names = (set(import_module(f'fixmatch_fastai.{o}').__all__) for o in ('all', module))
    lines = [f'from fixmatch_fastai.{o} import *' for o in ('all', *[module] * (not names <= everything))]
    return '\n'.join(['```python', *lines, '```'])


def page_of(nb):
    "`nbs/index.ipynb` -> `docs/index.md`, `nbs/tutorials/x.ipynb` -> `docs/tutorials/x.md`, all else to `docs/api/`"
    if nb == 'nbs/index.ipynb':
        return 'docs/index.md'
    folder, name = dirname(nb[4:]), re.sub('^[0-9]+[a-z]?_', '', Path(nb).stem)
    return normpath(join('docs', '' if folder == 'tutorials' else 'api', folder, f'{name}.md'))


def converted(nb):
    "The Markdown of `nb`, and its pictures by their paths"
    cells = read_nb(nb)
    Processed()(cells)
    for cell in cells.cells:
        cell.metadata = {}  # how long it ran is in there
    exporter = MarkdownExporter(config=CONFIG, raw_template=TEMPLATE, preprocessors=[Tidy])
    pictures = {'output_files_dir': f'docs/images/{page_of(nb)[5:-3]}'}
    text, resources = exporter.from_notebook_node(nbformat.reads(nb2str(cells), 4), pictures)
    if module := re.search(r'"#\| *default_exp +([\w.]+)', Path(nb).read_text(encoding='utf-8')):
        text = text.replace('<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->', importing(module[1]), 1)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources['outputs']


def linked(text, source, dest, names):
    "`text` of `source` as it reads at `dest`: notebooks become pages, names of symbols lead to their documentation"

    def from_dest(page):
        return relpath(page, dirname(dest) or '.')

    def link(m):
        if m['code']:
            name = m['code'].removesuffix('()')
            page, _, anchor = names.get(name, '').partition('#')
            # `fit` and `run` of those rooms are elsewhere the Learner's, or a user's own
            if page.startswith(INSIDE) and dirname(page) != dirname(dest) and not name.startswith('fixmatch_'):
                page = ''
            return f'[{m[0]}]({"" if page == dest else from_dest(page)}#{anchor})' if page else m[0]
        page, _, anchor = (m['target'] or '').partition('#')
        if not page or re.match('[a-z]+:', page):
            return m[0]
        if not page.startswith('docs/images/'):
            path = normpath(join(dirname(source), page))
            if not Path(path).exists():
                sys.exit(f'{source} links to {m["target"]}, which does not exist: correct the link.')
            if path.endswith('.ipynb'):
                page = page_of(path)
            else:
                stays = dest == 'README.md' or path.startswith('docs/')
                page = path if stays else (TEXTS | PICTURES).get(path)
        return f'{m["text"]}({from_dest(page)}{anchor and "#" + anchor.lower()})' if page else m['text'][1:-1]

    return WORDS.sub(link, text)


def badges():
    "What a reader asks first, as small pictures that need no network"
    ini = ConfigParser(delimiters=['='])
    ini.read('settings.ini', encoding='utf-8')
    fastai = re.search(r'fastai>=(\S+)', ini['DEFAULT']['requirements'])[1]
    values = {
        'python': f'{ini["DEFAULT"]["min_python"]}+',
        'fastai': f'{fastai}+',
        'licence': ini['DEFAULT']['license'],
    }
    for label, value in values.items():
        left, right = (8 * len(o) + 12 for o in (label, value))
        svg = BADGE.format(label=label, value=value, left=left, right=right, width=left + right, x=left + right / 2)
        yield f'docs/images/badges/{label}.svg', svg.encode()


def build():
    "Path -> bytes of every generated file"
    pages = {dest: (source, Path(source).read_text(encoding='utf-8')) for source, dest in TEXTS.items()}
    names, files = {}, {}
    for nb in sorted(map(str, nbglob('nbs'))):
        page = page_of(nb)
        text, pictures = converted(nb)
        files |= pictures
        pages |= dict.fromkeys([page] + ['README.md'] * (page == 'docs/index.md'), (nb, text))
        for name in re.findall(r'^### `([\w.]+)`$', text, re.M):
            called = name.replace('DataLoaders.', 'dls.').replace('Learner.', 'learn.')
            names |= dict.fromkeys([name, called], f'{page}#{name.lower().replace(".", "")}')
    files |= {dest: Path(source).read_bytes() for source, dest in PICTURES.items()} | dict(badges())
    return files | {dest: linked(text, source, dest, names).encode() for dest, (source, text) in pages.items()}


def main():
    parser = argparse.ArgumentParser(description='Write the pages in docs/ and README.md from the notebooks.')
    parser.add_argument('--readme', action='store_true', help='README.md and its pictures only')
    parser.add_argument('--check', action='store_true', help='write nothing; fail when a page is out of step')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    there = {o.as_posix() for pattern in ('*.md', 'images/**/*.png') for o in Path('docs').rglob(pattern)}
    files = dict.fromkeys(there) | build()  # None: to be removed
    changed = sorted(k for k, v in files.items() if v != (Path(k).read_bytes() if Path(k).exists() else None))
    if args.readme:
        changed = [
            k for k in changed if k == 'README.md' or k.startswith(('docs/images/index/', 'docs/images/badges/'))
        ]
    if args.check:
        sys.exit(f'Out of step with the notebooks: {", ".join(changed)}; run `make docs`.' if changed else 0)
    for path in map(Path, changed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if files[path.as_posix()] is None else path.write_bytes(files[path.as_posix()])
    print(f'{len(files)} files from the notebooks, {len(changed)} of them changed.')


if __name__ == '__main__':
    main()
