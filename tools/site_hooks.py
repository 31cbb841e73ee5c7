"What mkdocs.yml cannot say by itself: the order of the pages, and formulas as MathML, which browsers show without scripts."

import html
import re

from latex2mathml.converter import convert

from docs import notebooks, page_of


def on_config(config):
    pages = [page_of(nb).removeprefix('docs/') for nb in notebooks()]
    config.nav = [
        {'Home': 'index.md'},
        {'Tutorials': [o for o in pages if o.startswith('tutorials/')]},
        {'API': [o for o in pages if o.startswith('api/')]},
        {'Project': ['changelog.md', 'contributing.md']},
    ]
    config.nav = [o for o in config.nav if all(o.values())]


def mathml(tex, display):
    res = convert(html.unescape(tex).strip(), display=display)
    return re.sub(r'<m[in] mathvariant="double-struck">(\w)</', lambda m: m[0].split()[0] + f'>{double_struck(m[1])}</', res)


def double_struck(c):
    "Browsers take the letter itself, not the attribute"
    special = dict(zip('CHNPQRZ', 'ℂℍℕℙℚℝℤ', strict=True))
    start = {c.isdigit(): 0x1D7D8 - ord('0'), c.isupper(): 0x1D538 - ord('A'), c.islower(): 0x1D552 - ord('a')}
    return special.get(c) or chr(ord(c) + start[True])


def on_page_content(content, page, **_):
    def formula(m):
        try:
            return mathml(m['tex'], 'block' if m['tag'] == 'div' else 'inline')
        except Exception as e:
            raise SystemExit(f'{page.file.src_path}: cannot show the formula {m["tex"]!r} ({e!r}): write it more simply.') from e

    content = re.sub(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', formula, content, flags=re.S)
    return re.sub(r'<t[dh].*?</t[dh]>', lambda m: m[0].replace(r'\|', '|'), content, flags=re.S)  # code in tables: code hosts want the backslash
