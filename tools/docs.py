"""Write the pages in docs/ and README.md from the notebooks.

    python tools/docs.py            write the pages and README.md
    python tools/docs.py --readme   write README.md and its pictures only
    python tools/docs.py --check    write nothing; fail when a page is out of step with its notebook

nbdev runs the exported cells and puts the documentation of each symbol in their place; the rest is text.
The same notebooks give the same bytes: nothing here depends on the time or the machine.
"""

import argparse
import base64
import os
import posixpath
import re
import sys
import textwrap
import warnings
from functools import partial
from itertools import groupby
from pathlib import Path

from bs4 import BeautifulSoup
from fastcore.nbio import read_nb
from nbdev import processors
from nbdev.process import Processor
from nbdev.showdoc import show_doc

from symbols import Symbol, definitions, table

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {'CHANGELOG.md': 'docs/changelog.md', 'CONTRIBUTING.md': 'docs/contributing.md'}  # pages that are not notebooks
CALLOUTS = {'note': 'note', 'tip': 'tip', 'important': 'info', 'warning': 'warning', 'caution': 'danger'}  # Quarto's name: the theme's
PICTURES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
LINK = re.compile(r'(?P<code>`+).+?(?P=code)|(?P<bang>!?)\[(?P<text>[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)?)\]\((?P<target>[^()\s]+)\)')
APART = re.compile(r'(^(?P<fence>`{3,}|~{3,}).*?^(?P=fence) *$|^\$\$.*?\$\$ *$)', re.M | re.S)  # blocks of code, formulas
ATTRS = re.compile(r'(?<=[)\]])\{([.#]|[\w-]+=)[^}\n]*\}|^(?P<heading>#+ .*?) +\{[.#][^}\n]*\} *$', re.M)  # {.class}, {width=50%}
LIST = re.compile(r'^(?![-*+>|#]\s|\d+\.\s)(\S.*)\n(?=([-*+]|1\.) )', re.M)  # one that follows a line of text at once


# ---- Which notebook becomes which page. Paths are strings, relative to the root. ----


def notebooks():
    "All notebooks, in reading order"
    found = (p.relative_to(ROOT) for p in (ROOT / 'nbs').rglob('*.ipynb'))
    return sorted(p.as_posix() for p in found if not any(part[0] in '._' for part in p.parts))


def page_of(nb):
    "`nbs/index.ipynb` -> `docs/index.md`, `nbs/00_augment.ipynb` -> `docs/api/augment.md`, `nbs/tutorials/x.ipynb` -> `docs/tutorials/x.md`"
    if nb == 'nbs/index.ipynb':
        return 'docs/index.md'
    folder, name = posixpath.split(posixpath.relpath(nb, 'nbs'))
    return f'docs/{folder or "api"}/{re.sub("^[0-9]+[a-z]?_", "", name).removesuffix(".ipynb")}.md'


def slug(heading):
    "The anchor that the site and code hosts give to `heading`"
    return re.sub(r'[^\w\- ]', '', heading).strip().lower().replace(' ', '-')


def exported(nb):
    "Name -> definition of all that `nb` exports and documents"
    cells = (c for c in read_nb(ROOT / nb).cells if c.cell_type == 'code' and c.directives.keys() & {'export', 'exports'})
    return {k: v for c in cells if 'hide' not in c.directives for k, v in definitions(c.source).items() if k[0] != '_'}


# ---- What nbdev makes of a notebook ----


class InOrder(Processor):
    "nbdev documents the symbols of one cell from last to first; this turns them round"

    def begin(self):
        runs = groupby(self.nb.cells, key=lambda c: getattr(c, 'has_sd', False))
        self.nb.cells = [c for documented, run in runs for c in (reversed(list(run)) if documented else run)]


class ShowDocs(processors.exec_show_docs):
    def begin(self):
        super().begin()
        self.k.user_ns['show_doc'] = partial(show_doc, renderer=Symbol)


class Processed(processors.FilterDefaults):
    "nbdev's steps, less those that write for Quarto"

    def base_procs(self):
        p = processors
        return [p.populate_language, p.add_show_docs, InOrder, p.hide_line, p.filter_stream_, p.clean_show_doc, ShowDocs, p.rm_export, p.clean_magics, p.hide_]


def processed(nb):
    "The cells of `nb` as its readers see them: exported code documented, hidden cells gone"
    here = os.getcwd()
    os.chdir((ROOT / nb).parent)  # where notebooks run
    os.environ['IN_TEST'] = '1'  # so that a cell with nbdev_export() does nothing
    try:
        res = read_nb(ROOT / nb)
        Processed()(res)
        return res.cells
    except Exception as e:
        raise SystemExit(f'The exported code of {nb} must run by itself, but: {e}') from e
    finally:
        os.chdir(here)
        del os.environ['IN_TEST']


# ---- Outputs ----


def plain(text):
    "`text` as a terminal would leave it: no colours, no finished progress bars"
    text = re.sub(r'\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])', '', text)
    lines = [line.rstrip('\r').split('\r')[-1].rstrip() for line in text.split('\n')]
    return '\n'.join(line for line in lines if not re.search(r'[█▏▎▍▌▋▊▉]|<(Figure size|Axes|matplotlib)\b', line)).strip('\n')


def html(text):
    "HTML as Markdown tables where it is tables, else as it is, without styles and progress bars"
    soup = BeautifulSoup(text, 'html.parser')
    for o in soup('progress'):
        box = o.find_parent('div')
        (o if box is None or box.find('table') else box).decompose()
    for o in soup(['style', 'script']):
        o.decompose()
    if soup.find(['svg', 'img']) or any(o.get('rowspan', '1') != '1' or o.get('colspan', '1') != '1' for o in soup(['td', 'th'])):
        return re.sub(r'\n\s*\n', '\n', str(soup)).strip()
    parts = [pipes(o) for o in soup('table')]
    for o in soup('table'):
        o.decompose()
    return '\n\n'.join(o for o in [*parts, ' '.join(soup.get_text(' ').split())] if o)


def pipes(tab):
    "One HTML table as a Markdown table, columns of numbers to the right"
    head, body = [], []
    for tr in tab('tr'):
        row = [re.sub(r'([\\`*$]|\b_|_\b)', r'\\\1', o.get_text(' ', strip=True)).replace('<', '&lt;') for o in tr(['td', 'th'])]
        (head if tr.find_parent('thead') else body).append(row)
    if not head and body:
        head = [body.pop(0)]
    if not head:
        return ''
    n = max(map(len, head + body))
    head, body = ([row + [''] * (n - len(row)) for row in o] for o in (head, body))
    numbers = [body and all(re.fullmatch(r'[-+]?[\d.,:]+(e[-+]?\d+)?%?|nan|', row[i], re.I) for row in body) for i in range(n)]
    names = [' '.join(filter(None, col)) for col in zip(*head, strict=True)]  # pandas writes the index's name in a row of its own
    return table([names, *body], ['---:' if o else '---' for o in numbers])


def fenced(text, lang):
    ticks = max((len(o) for o in re.findall('`{3,}', text)), default=2) + 1
    return f'{"`" * ticks}{lang}\n{text}\n{"`" * ticks}'


# ---- A page ----


class Page:
    "The Markdown of notebook or text `source` as it reads at the place `dest`, and the pictures it shows"

    def __init__(self, source, dest, names):
        self.source, self.dest, self.names = source, dest, names
        self.pictures, self.heading = {}, ''
        self.folder = f'docs/images/{page_of(source).removeprefix("docs/").removesuffix(".md")}' if source.endswith('.ipynb') else ''

    def notebook(self, cells):
        text = '\n\n'.join(o for cell in cells for o in self.cell(cell) if o)
        return re.sub(r'\n{3,}(?=#)', '\n\n', text).strip() + '\n'

    def cell(self, cell):
        if cell.cell_type == 'markdown':
            yield self.attached(self.prose(cell.source), cell)
        elif cell.cell_type == 'code':
            says = {k: v.strip().lower() for k, v in cell.directives_.items()}
            if says.get('include') == 'false':
                return
            if cell.source.strip() and says.get('echo') != 'false' and 'show_doc(' not in cell.source:
                yield fenced(re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip(), cell.metadata.get('language', 'python'))
            if says.get('output') != 'false':
                yield from self.outputs(cell)

    def outputs(self, cell):
        caption = cell.directives_.get('fig-cap', '').strip(' "\'')
        printed = ''
        for o in cell.get('outputs', []):
            if o['output_type'] == 'stream':
                printed += ''.join(o['text']) if o['name'] == 'stdout' else ''
                continue
            if o['output_type'] not in ('display_data', 'execute_result'):
                continue
            yield self.text(printed)
            printed, data = '', {k: ''.join(v) if isinstance(v, list) else v for k, v in o['data'].items()}
            picture = next((k for k in PICTURES if k in data), None)
            if 'text/markdown' in data:
                yield self.prose(data['text/markdown'])
            elif picture:
                raw = data[picture].encode() if picture == 'image/svg+xml' else base64.b64decode(data[picture])
                yield f'![{caption or self.heading}]({self.picture(raw, PICTURES[picture])})'
            elif 'text/html' in data:
                yield html(data['text/html'])
            else:
                yield self.text(data.get('text/plain', ''))
        yield self.text(printed)
        yield caption and f'*{caption}*'

    def text(self, text):
        return fenced(plain(text), 'text') if plain(text) else ''

    def picture(self, raw, ext, name=None):
        "Keep a picture, and return where it is as seen from the page"
        path = f'{self.folder}/{name or f"{len(self.pictures) + 1}.{ext}"}'
        self.pictures[path] = raw
        return self.seen(path)

    def seen(self, path):
        return posixpath.relpath(path, posixpath.dirname(self.dest) or '.')

    def attached(self, text, cell):
        "`text` with the pictures that were pasted into `cell`"
        for name, data in cell.get('attachments', {}).items():
            kind = next(k for k in PICTURES if k in data)
            text = text.replace(f'attachment:{name}', self.picture(base64.b64decode(data[kind]), PICTURES[kind]))
        return text

    def prose(self, text):
        "Markdown of a notebook as the site and code hosts understand it"
        text = re.sub(r'\A---\n.*?\n---\n', '', text.strip() + '\n', flags=re.S)
        parts = APART.split(text)
        text = ''.join(o if i % 3 == 1 else self.words(o) for i, o in enumerate(parts) if i % 3 != 2)
        return self.callouts(text).strip()

    def words(self, text):
        "Text between blocks of code"
        for o in re.findall(r'^#+ +(.*?)#*$', text, flags=re.M):
            self.heading = re.sub(r'[`\[\]]', '', o).strip()
        text = ATTRS.sub(lambda m: m['heading'] or '', text)
        text = LINK.sub(self.link, text)
        text = LIST.sub(r'\1\n\n', text)  # it needs an empty line above
        return '\n'.join(line if line.startswith('#') else self.symbols(line) for line in text.split('\n'))

    def symbols(self, line):
        "Link names of symbols to their documentation"

        def f(m):
            page, _, anchor = self.names.get(m[1], '').partition('#')
            return f'[{m[0]}]({"" if page == self.dest else self.seen(page)}#{anchor})' if page else m[0]

        return re.sub(r'(?<![`\[])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])', f, line)

    def link(self, m):
        "Links between notebooks become links between pages"
        if m['code']:
            return m[0]
        bang, text, target = m['bang'], LINK.sub(self.link, m['text']), m['target']
        path, _, anchor = target.partition('#')
        if not path or re.match(r'[a-z]+:', path):
            return f'{bang}[{text}]({target})'
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.source), path))
        if not (ROOT / path).exists():
            raise SystemExit(f'{self.source} links to {target}, which does not exist: correct the link.')
        if bang:
            return f'![{text}]({self.picture((ROOT / path).read_bytes(), None, posixpath.basename(path))})'
        if path in notebooks():
            path, anchor = page_of(path), slug(anchor.replace('-', ' ')) if anchor else ''
        if self.dest.startswith('docs/'):
            path = TEXTS.get(path, path)
            if not path.startswith('docs/'):
                return text  # the site holds pages only
        return f'[{text}]({self.seen(path)}{anchor and "#" + anchor})'

    def callouts(self, text):
        "`::: {.callout-note}` boxes; what else Quarto keeps between colons is shown without a box"

        def f(m):
            kind, body = re.search(r'callout-(\w+)', m[1]), m[2].strip()
            if not kind:
                return body + '\n'
            title = re.search(r'title="([^"]*)"', m[1]) or re.match(r'#+ +(.*)\n', body)
            body = re.sub(r'\A#+ +.*\n', '', body).strip()
            if self.dest == 'README.md':
                return textwrap.indent(f'[!{kind[1].upper()}]\n' + (f'**{title[1]}**\n\n' if title else '') + body, '> ', lambda _: True) + '\n'
            return f'!!! {CALLOUTS.get(kind[1], "note")}' + (f' "{title[1]}"' if title else '') + '\n\n' + textwrap.indent(body, '    ') + '\n'

        return re.sub(r'^:{3,} *([^\s:][^\n]*)\n(.*?)^:{3,} *$\n?', f, text + '\n', flags=re.M | re.S)


# ---- All pages ----


def build(readme_only=False):
    "Path -> bytes of every generated file"
    names = {}
    for nb in reversed(notebooks()):
        Symbol.known |= exported(nb)
        names |= {name: f'{page_of(nb)}#{slug(name)}' for name in exported(nb)}
    names |= {o.replace('DataLoaders.', 'dls.').replace('Learner.', 'learn.'): page for o, page in names.items()}  # as they are called
    files = {}
    for nb in notebooks():
        if readme_only and nb != 'nbs/index.ipynb':
            continue
        cells = processed(nb)
        for dest in [page_of(nb)] + ['README.md'] * (nb == 'nbs/index.ipynb'):
            page = Page(nb, dest, names)
            files[dest] = page.notebook(cells).encode()
            files.update(page.pictures)
    for source, dest in TEXTS.items():
        if (ROOT / source).exists():
            files[dest] = (Page(source, dest, names).prose((ROOT / source).read_text(encoding='utf-8')) + '\n').encode()
    return {k: v for k, v in files.items() if k == 'README.md' or k.startswith('docs/images/index/')} if readme_only else files


def stale(files):
    "Generated files that no notebook asks for any more"
    there = [*(ROOT / 'docs').rglob('*.md'), *(o for o in (ROOT / 'docs/images').rglob('*') if o.is_file())]
    return sorted({o.relative_to(ROOT).as_posix() for o in there} - files.keys())


def main():
    parser = argparse.ArgumentParser(description='Write the pages in docs/ and README.md from the notebooks.')
    parser.add_argument('--readme', action='store_true', help='README.md and its pictures only')
    parser.add_argument('--check', action='store_true', help='write nothing; fail when a page is out of step')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    sys.path.insert(0, str(ROOT))
    files = build(args.readme)
    changed = [k for k, v in files.items() if not (ROOT / k).exists() or (ROOT / k).read_bytes() != v]
    gone = [] if args.readme else stale(files)
    if args.check:
        if changed or gone:
            sys.exit(f'Out of step with the notebooks: {", ".join(changed + gone)}; run `make docs`.')
        return
    for k in changed:
        (ROOT / k).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / k).write_bytes(files[k])
    for k in gone:
        (ROOT / k).unlink()
    print(f'{len(files)} files from the notebooks: {len(changed)} written, {len(gone)} removed.')


if __name__ == '__main__':
    main()
