"The documentation of one symbol as Markdown, for nbdev's show_doc: heading, signature, docstring, arguments, methods."

import inspect
import re
import sys
from importlib import import_module

from fastcore.docments import ShowDocRenderer

WIDTH = 84  # a longer signature gets a line for each argument


def table(head, rows):
    rows = [f'| {name} | ' + ' '.join(doc.split()).replace('|', r'\|') + ' |' for name, doc in rows if doc]
    return '\n'.join([f'| {head} | meaning |', '| --- | --- |', *rows]) if rows else ''


def exported(name):
    "The object called `name`, from whichever room has it: that of a notebook has no source"
    import_module('fixmatch_fastai.all')
    rooms = [m for k, m in sys.modules.items() if k.startswith('fixmatch_fastai.')]
    return next(vars(m)[name] for m in rooms if getattr(vars(m).get(name), '__module__', None) == m.__name__)


class Symbol(ShowDocRenderer):
    def _repr_markdown_(self):
        heading = f'{"#" * self.title_level} `{self.nm}`\n\n```python\n'
        if hasattr(self.sym, '_fields'):  # a NamedTuple says everything itself
            return heading + inspect.getsource(exported(self.nm)) + '```'
        args = [('returns' if name == 'return' else f'`{name}`', arg.docment) for name, arg in self.dm.dm.items()]
        if '.' in self.nm and not self.docs and not any(doc for _, doc in args):
            return ''  # an event of fastai's, such as `FixMatch.before_batch`: nobody calls it
        parts = [f'{heading}{self.signature()}\n```', self.docs]
        parts += [table('argument', args), table('method', self.methods())]
        return '\n\n'.join(o for o in parts if o)

    def signature(self):
        "As code: without comments, which go to the table, and without names of modules"
        if inspect.isclass(self.sym) and '__init__' not in vars(self.sym):
            return f'class {self.nm}({", ".join(o.__name__ for o in self.sym.__bases__)})'
        returns = self.dm.dm['return'].anno
        returns = '' if returns is inspect.Parameter.empty else f' -> {inspect.formatannotation(returns)}'
        short = lambda o: re.sub(r':NoneType|(?<=[:> ])([A-Za-z_]\w*\.)+', '', o).replace(' | ', '|')
        args, returns = [short(o) for o, _ in self.dm.params], short(returns)
        sig = f'{self.nm}({", ".join(args)}){returns}'
        return sig if len(sig) <= WIDTH else '\n    '.join([f'{self.nm}(', *(f'{o},' for o in args)]) + f'\n){returns}'

    def methods(self):
        "The public methods and properties with a docstring, each as it is called"
        for name, o in vars(self.sym).items() if inspect.isclass(self.sym) else ():
            o = o.__func__ if isinstance(o, classmethod) else o
            if name[0] != '_' and (inspect.isfunction(o) or isinstance(o, property)):
                args = f'({", ".join(list(inspect.signature(o).parameters)[1:])})' if inspect.isfunction(o) else ''
                yield f'`{name}{args}`', o.__doc__
