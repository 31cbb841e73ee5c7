"Formulas as MathML, which browsers show without scripts; and no page asks another host for anything."

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S)
FETCHED = re.compile(
    r'<(?:img|script|iframe|source)\b[^>]*\ssrc="(?:https?:)?//[^"]*'
    r'|<link\b[^>]*rel="stylesheet"[^>]*"(?:https?:)?//[^"]*'
)
LETTERS = str.maketrans('1CENPQRZ', '𝟙ℂ𝔼ℕℙℚℝℤ')  # browsers take the letter itself, not the attribute


def on_page_content(content, page, **_):
    def formula(m):
        try:
            res = convert(html.unescape(m['tex']).strip(), display='block' if m['tag'] == 'div' else 'inline')
        except Exception as e:
            sentence = f'cannot show the formula {m["tex"]!r} ({e!r}): write it more simply.'
            raise SystemExit(f'{page.file.src_path}: {sentence}') from e
        if unknown := re.search(r'>(\\[a-zA-Z]+)', res):  # it would be shown as it is written
            sentence = f'{unknown[1]} in the formula {m["tex"]!r} is not known: write it another way.'
            raise SystemExit(f'{page.file.src_path}: {sentence}')
        return re.sub(r' mathvariant="double-struck">(\w)', lambda m: '>' + m[1].translate(LETTERS), res)

    content = FORMULA.sub(formula, content)
    # code in tables: code hosts want the backslash
    return re.sub(r'<t[dh].*?</t[dh]>', lambda m: m[0].replace(r'\|', '|'), content, flags=re.S)


def on_post_page(output, page, **_):
    if fetched := FETCHED.search(output):
        sentence = f'loads something from another host: keep a copy in docs/ ({fetched[0]}).'
        raise SystemExit(f'{page.file.src_path} {sentence}')
    return output
