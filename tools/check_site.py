"""Build the site and follow every link in it: pages, pictures, scripts and anchors are there, and no page asks another host for anything.

python tools/check_site.py
"""

import os
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from os.path import normpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LOADED = {('img', 'src'), ('script', 'src'), ('link', 'href'), ('iframe', 'src'), ('source', 'src'), ('video', 'src')}  # what a browser fetches by itself
NAMED = {'canonical', 'next', 'prev', 'edit'}  # links in the head that only name a page


class Page(HTMLParser):
    "What a page links to, what it loads, and its anchors"

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {v for k in ('id', 'name') if (v := attrs.get(k))}
        for name in ('href', 'src'):
            if (target := attrs.get(name)) is None or tag == 'link' and attrs.get('rel') in NAMED:
                continue
            (self.loads if (tag, name) in LOADED else self.links).append(target)


def failures(site):
    "One sentence for each link that leads nowhere"
    pages = {o.relative_to(site).as_posix(): Page(o.read_text(encoding='utf-8')) for o in sorted(site.rglob('*.html'))}
    for name, page in pages.items():
        if name == '404.html':  # it is shown at any address, so its links are absolute
            continue
        for target in page.loads + page.links:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                if target in page.loads and url.scheme != 'data':
                    yield f'{name} loads {target} from another host: keep a copy in docs/.'
                continue
            file = normpath(Path(name).parent / unquote(url.path)) if url.path else name
            if file not in pages and (site / file / 'index.html').exists():
                file = normpath(f'{file}/index.html')
            if not (site / file).is_file():
                yield f'{name} links to {target}, and there is no {file}: correct the link in the notebook.'
            elif url.fragment and file in pages and unquote(url.fragment) not in pages[file].anchors:
                yield f'{name} links to {target}, and there is no such heading: correct the anchor in the notebook.'


def main():
    with tempfile.TemporaryDirectory() as tmp:
        build = [Path(sys.executable).with_name('mkdocs'), 'build', '--strict', '--quiet', '--site-dir', tmp]
        if subprocess.run(build, cwd=ROOT, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}).returncode:
            sys.exit('The site cannot be built: see above.')
        found = list(failures(Path(tmp)))
        n = len(list(Path(tmp).rglob('*.html')))
    print('\n'.join(found) if found else f'{n} pages, no broken link', file=sys.stderr if found else sys.stdout)
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
