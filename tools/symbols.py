"The documentation of one exported function or class as Markdown: heading, signature, docstring, arguments, methods."

import ast
import inspect
import re

from fastcore.docments import ShowDocRenderer
from nbdev.doclinks import patch_name

WIDTH = 84  # a longer signature gets a line for each argument
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def definitions(source):
    "Name -> definition in a cell's `source`; what is patched into a class is called `Class.name`"
    res = {}
    for o in ast.parse(source).body:
        if isinstance(o, DEFS):
            o.lines = source.splitlines()
            names = patch_name(o)
            res |= dict.fromkeys([names] if isinstance(names, str) else names, o)
    return res


def code(node):
    return '' if node is None else ast.unparse(node).replace(' | ', '|')


def written_args(f):
    "Argument -> annotation, default and comment of the definition `f`, as the author wrote them; comments are left to fastcore"
    pos = f.args.posonlyargs + f.args.args
    defaults = [None] * (len(pos) - len(f.args.defaults)) + f.args.defaults + f.args.kw_defaults
    res = {a.arg: (code(a.annotation), code(d), '') for a, d in zip(pos + f.args.kwonlyargs, defaults, strict=True)}
    return res | {'return': (code(f.returns), '', '')}


def written_fields(cls):
    "The same for the fields of a NamedTuple or dataclass"
    fields = (o for o in cls.body if isinstance(o, ast.AnnAssign))
    return {o.target.id: (code(o.annotation), code(o.value), cls.lines[o.end_lineno - 1].partition('#')[2].strip()) for o in fields}


def brief(o):
    "An annotation or a default as text, without module names and addresses"
    if o is inspect.Parameter.empty:
        return ''
    text = o.__name__ if inspect.isclass(o) or inspect.isroutine(o) else repr(o)
    return re.sub(r'\b([A-Za-z_]\w*\.)+(?=[A-Za-z_])| at 0x[0-9a-f]+', '', text)


def table(rows, align=None):
    "A Markdown table, the first of `rows` being its header"
    rows = [[' '.join(c.split()).replace('|', r'\|') for c in row] for row in rows]
    rows.insert(1, align or ['---'] * len(rows[0]))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


class Symbol(ShowDocRenderer):
    "What `show_doc` shows; `known` holds the definitions in all notebooks"

    known = {}

    def _repr_markdown_(self):
        sig, rows = self.signature()
        parts = [f'{"#" * self.title_level} `{self.nm}`', f'```python\n{sig}\n```', self.docs]
        if any(row[3] for row in rows):
            rows = [[name, anno and f'`{anno}`', default and f'`{default}`', doc] for name, anno, default, doc in rows]
            used = [i for i in range(4) if any(row[i] for row in rows)]
            parts.append(table([[row[i] for i in used] for row in [['argument', 'type', 'default', 'meaning'], *rows]]))
        if methods := list(self.methods()):
            parts.append(table([['method', 'meaning'], *methods]))
        return '\n\n'.join(o for o in parts if o)

    def written(self):
        "Argument -> annotation, default and comment; `None` if it is all inherited from another package"
        if not inspect.isclass(self.sym):
            node = self.known.get(self.nm)
            return written_args(node) if isinstance(node, DEFS[:2]) else {}
        for cls in self.sym.__mro__:
            node = self.known.get(cls.__name__)
            if isinstance(node, ast.ClassDef):
                init = next((o for o in node.body if getattr(o, 'name', '') == '__init__'), None)
                if init:
                    return written_args(init)
                if hasattr(cls, '_fields') or hasattr(cls, '__dataclass_fields__'):
                    return written_fields(node)

    def signature(self):
        "The signature as code, and a row for each argument: name, type, default, meaning"
        P, args, rows, returns, star = inspect.Parameter, [], [], '', False
        as_written, comments = self.written(), getattr(self.dm, 'dm', {})
        if as_written is None:
            bases = [o.__name__ for o in self.sym.__bases__ if o is not object]
            return (f'class {self.nm}({", ".join(bases)})' if bases else f'{self.nm}()'), []
        for name, p in self.sig.parameters.items() if self.sig else ():
            if name in ('self', 'cls'):
                continue
            anno, default, doc = as_written.get(name) or (brief(p.annotation), brief(p.default), '')
            if p.kind == P.KEYWORD_ONLY and not star:
                args.append('*')
            star = star or p.kind in (P.KEYWORD_ONLY, P.VAR_POSITIONAL)
            shown = {P.VAR_POSITIONAL: '*', P.VAR_KEYWORD: '**'}.get(p.kind, '') + name
            args.append(shown + (anno and f':{anno}') + (default and f'={default}'))
            rows.append([f'`{shown}`', anno, default, doc or comments.get(name, {}).get('docment') or ''])
        if 'return' in as_written and not inspect.isclass(self.sym):
            anno, doc = as_written['return'][0], comments.get('return', {}).get('docment') or ''
            returns = anno and f' -> {anno}'
            rows += [['returns', anno, '', doc]] if doc else []
        sig = f'{self.nm}({", ".join(args)}){returns}'
        if len(sig) > WIDTH:
            sig = '\n    '.join([f'{self.nm}(', *(f'{a},' for a in args)]) + f'\n){returns}'
        return sig, rows

    def methods(self):
        "The public methods with a docstring, each as it is called"
        for o in getattr(self.known.get(self.nm), 'body', ()) if inspect.isclass(self.sym) else ():
            if isinstance(o, DEFS[:2]) and o.name[0] != '_' and ast.get_docstring(o):
                plain = any(isinstance(d, ast.Name) and d.id.endswith('property') for d in o.decorator_list)
                args = [a.arg for a in o.args.posonlyargs + o.args.args + o.args.kwonlyargs if a.arg not in ('self', 'cls')]
                yield f'`{o.name}`' if plain else f'`{o.name}({", ".join(args)})`', ast.get_docstring(o)
