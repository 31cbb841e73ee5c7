"Formulas as MathML, which browsers show without scripts; and no page asks another host for anything."

import html
import re

from latex2mathml.converter import convert

LETTERS = str.maketrans('1CENPQRZ', '𝟙ℂ𝔼ℕℙℚℝℤ')  # browsers take the letter itself, not the attribute


def on_page_content(content, page, **_):
    def formula(m):
        try:
            res = convert(html.unescape(m['tex']).strip(), display='block' if m['tag'] == 'div' else 'inline')
        except Exception as e:
            raise SystemExit(f'{page.file.src_path}: cannot show the formula {m["tex"]!r} ({e!r}): write it more simply.') from e
        if unknown := re.search(r'>(\\[a-zA-Z]+)', res):  # it would be shown as it is written
            raise SystemExit(f'{page.file.src_path}: {unknown[1]} in the formula {m["tex"]!r} is not known: write it another way.')
        return re.sub(r' mathvariant="double-struck">(\w)', lambda m: '>' + m[1].translate(LETTERS), res)

    content = re.sub(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', formula, content, flags=re.S)
    return re.sub(r'<t[dh].*?</t[dh]>', lambda m: m[0].replace(r'\|', '|'), content, flags=re.S)  # code in tables: code hosts want the backslash


def on_post_page(output, page, **_):
    fetched = re.search(r'<(?:img|script|iframe|source)\b[^>]*\ssrc="(?:https?:)?//[^"]*|<link\b[^>]*rel="stylesheet"[^>]*"(?:https?:)?//[^"]*', output)
    if fetched:
        raise SystemExit(f'{page.file.src_path} loads something from another host: keep a copy in docs/ ({fetched[0]}).')
    return output
