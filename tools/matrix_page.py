"""Write benchmarks/matrix.json and benchmarks/matrix.md, what works beside FixMatch, from the tests in tests/test_matrix.py.

python tools/matrix_page.py                  train all rows in .venv and with the versions of Kaggle and Colab
python tools/matrix_page.py --env newest     in .venv only; results of the others stay

Weights & Biases is too large to be set up for one row: `.venv/bin/pip install wandb` first, or that row is not run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import compat

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / 'tests') not in sys.path:
    sys.path.append(str(ROOT / 'tests'))
OUT = ROOT / 'benchmarks'
ENVS = {'newest': 'newest', 'kaggle': 'Kaggle', 'colab': 'Colab'}

CODE = re.compile(r"\w+='\w+'|[\w.]*(?:_|[a-z][A-Z]|[A-Z][A-Z][a-z])[\w.]*(?:\(\))?")  # in the name of a row

ABOUT = """# What works beside FixMatch

Every row is a test that trains a tiny network on digits with `FixMatch` and one more thing, as `make test` does each time; `make matrix` writes this page from the results. Each time it is checked that

- the steps are as many as they should be, and their losses and mask rates are finite;
- the weights differ from those of the same training with `lambda_u=0`: the unlabelled images had their effect;
- the columns of the progress table are in their places, and gone after the fit: `validate` returns loss and metrics alone;
- the user's loss function is back, no loader runs on, and predictions are probabilities.

What is checked beyond that stands in the table. *Works* means that all of it holds. Where an empty pool is combined, what holds is that it is said.

{versions}

*Kaggle* and *Colab* stand for the fastai, fastcore, timm and Pillow that were there in August 2026; Python, torch and torchvision are those of this machine, which are newer. `make test-compat` runs all other tests with these versions too.

Precision on these rows: the CPU has no mixed precision in fastai, so there the networks return half-precision logits. `python benchmarks/gpu_matrix.py --device cuda` trains the same rows on a GPU with `to_fp16`, `to_bf16` and channels-last; no GPU has run them yet.
"""


def results(cases):
    "Name of each row -> what came of it, from the test cases of a JUnit report"
    said = {}
    for case in cases:
        name = case.get('name').partition('[')[2].removesuffix(']')
        found = next((o for o in case if o.tag in ('skipped', 'failure', 'error')), None)
        why = '' if found is None else (found.get('message') or '').removeprefix('Skipped: ').split('\n')[0]
        kind = 'works' if found is None else 'not run' if found.tag == 'skipped' and 'xfail' not in found.get('type', '') else 'fails'
        said[name] = f'{kind}: {why}' if why else kind
    return said


def tests(python, *options):
    "Exit status and test cases of a run of pytest"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / 'report.xml'
        env = os.environ | {'OMP_NUM_THREADS': '1'}
        status = subprocess.run([python, '-m', 'pytest', '-p', 'no:cacheprovider', f'--junitxml={report}', *options], cwd=ROOT, env=env).returncode
        return status, ElementTree.parse(report).iter('testcase') if report.exists() else []


def measure(python):
    "What each row does with the packages of `python`"
    from matrix import ELSEWHERE

    status, cases = tests(python, 'tests/test_matrix.py::test_row')
    if status:
        sys.exit('A row fails: mend it, or say in its `broken` why it fails, before the page is written.')
    said = results(cases)
    for name, (file, which, _) in ELSEWHERE.items():
        status, cases = tests(python, file, '-k', which)
        cases = list(cases)
        if status not in (0, 5):  # 5: there is no such test
            sys.exit(f'A test of {name} fails.')
        skipped = all(any(o.tag == 'skipped' for o in case) for case in cases)
        said[name] = 'not run: there is no test yet' if status == 5 else 'not run: skipped' if skipped else 'works'
    return said


def table(rows, columns):
    return '\n'.join(f'| {" | ".join(o)} |' for o in [columns, ['---'] * len(columns), *rows])


def shown(name):
    "A row's name, with what is code in backticks"
    if ' ' not in name.replace(', ', ''):
        return ', '.join(f'`{o}`' for o in name.split(', '))
    return CODE.sub(r'`\g<0>`', name).replace('|', '\\|')


def notes(said, envs):
    "Why rows do not work, one line each"
    why = {}
    for name, by_env in said.items():
        for env, o in by_env.items():
            kind, _, reason = o.partition(': ')
            if kind != 'works':
                why.setdefault((name, kind, reason), []).append(envs[env])
    return [f'- {shown(name)}, {", ".join(where)}: {kind}{reason and ", as " + reason}' for (name, kind, reason), where in why.items()]


def page(data):
    "matrix.md from matrix.json"
    from matrix import ELSEWHERE, POLICIES, ROWS, THINGS

    envs = {o: ENVS[o] for o in data['environments']}
    versions = table([[envs[env], *v.values()] for env, v in data['environments'].items()], ['versions', *next(iter(data['environments'].values()))])
    parts = [ABOUT.format(versions=versions)]

    def of(name, env):
        return data['rows'][name].get(env, 'not run').split(':')[0]

    def section(title, names, says):
        said = {o: data['rows'][o] for o in names}
        lines = [[shown(o), says[o], *(of(o, env) for env in envs)] for o in names]
        parts.append(f'## {title}\n\n' + table(lines, ['beside FixMatch', 'what is checked', *envs.values()]) + '\n')
        if why := notes(said, envs):
            parts.append('\n'.join(why) + '\n')

    says = {o.name: o.says for o in ROWS}
    for title, rows in groupby((o for o in ROWS if o.group != 'Policies'), key=lambda o: o.group):
        section(title, [o.name for o in rows], says)
    section('With tests of their own', list(ELSEWHERE), {o: f'{what} (`{file}`)' for o, (file, _, what) in ELSEWHERE.items()})

    def cell(name):
        kinds = {env: of(name, env) for env in envs}
        return 'works' if set(kinds.values()) == {'works'} else '; '.join(f'{envs[env]}: {kind}' for env, kind in kinds.items())

    lines = [[shown(o), *(cell(o if thing == 'alone' else f'{o} with {thing}') for thing in THINGS)] for o in POLICIES]
    parts.append(
        '## Policies\n\nSome pseudo-labels count and move the weights, and the policy remembers what it has to, with the versions of all environments.\n'
    )
    parts.append(table(lines, ['policy', *THINGS]) + '\n')
    policies = {o.name: data['rows'][o.name] for o in ROWS if o.group == 'Policies'}
    if why := notes(policies, envs):
        parts.append('\n'.join(why) + '\n')
    return '\n'.join(parts)


def versions(found):
    "Of what is imported, as the page lists it"
    return {'Python': found['python'], **{('Pillow' if k == 'PIL' else k): v for k, v in found['imported'].items()}}


def main():
    parser = argparse.ArgumentParser(description='Write benchmarks/matrix.md from the tests in tests/test_matrix.py.')
    parser.add_argument('--env', nargs='*', choices=ENVS, default=list(ENVS), help='default: all')
    args = parser.parse_args()
    from matrix import ELSEWHERE, ROWS

    file = OUT / 'matrix.json'
    data = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {'environments': {}, 'rows': {}}
    for env in args.env:
        python = sys.executable if env == 'newest' else compat.python_of(env)
        found = compat.look(python)
        print(f'--- {env}: {compat.said(found)}', flush=True)
        said = measure(python)
        data['environments'][env] = versions(found)
        for name, o in said.items():
            data['rows'].setdefault(name, {})[env] = o
    data['environments'] = {o: data['environments'][o] for o in ENVS if o in data['environments']}
    data['rows'] = {name: {o: data['rows'][name][o] for o in ENVS if o in data['rows'][name]} for name in [o.name for o in ROWS] + list(ELSEWHERE)}
    file.write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')
    (OUT / 'matrix.md').write_text(page(data), encoding='utf-8')
    kinds = [o.split(':')[0] for said in data['rows'].values() for o in said.values()]
    print(', '.join(f'{kinds.count(o)} {o}' for o in dict.fromkeys(kinds)))


if __name__ == '__main__':
    main()
