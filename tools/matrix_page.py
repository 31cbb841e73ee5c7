"""Write benchmarks/matrix.json and benchmarks/matrix.md, what works beside FixMatch, from the tests in tests/journeys.

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
sys.path += [str(ROOT / o) for o in ('tests', 'tests/journeys')]
ENVS = {'newest': 'newest', 'kaggle': 'Kaggle', 'colab': 'Colab'}

# what is code in the name of a row
CODE = re.compile(r"\w+='\w+'|[\w.]*(?:_|[a-z][A-Z]|[A-Z][A-Z][a-z])[\w.]*(?:\(\))?")

ABOUT = """# What works beside FixMatch

Every row is a test that trains a tiny network on digits with `FixMatch` and one more thing, as `make test` does each
time; `make matrix` writes this page from the results. Each time it is checked that

- the steps are as many as they should be, and their losses and mask rates are finite;
- the weights differ from those of the same training with `lambda_u=0`: the unlabelled images had their effect;
- the columns of the progress table are in their places, and gone after the fit: `validate` returns loss and metrics
  alone;
- the user's loss function is back, no loader runs on, and predictions are probabilities.

What is checked beyond that stands in the table. *Works* means that all of it holds. An empty pool works where the error
tells of it.

{versions}

*Kaggle* and *Colab* stand for the fastai, fastcore, timm and Pillow that were there in August 2026; Python, torch and
torchvision are those of this machine, which are newer. `make test-compat` runs all other tests with these versions too.

Precision on these rows: the CPU has no mixed precision in fastai, so there the networks return half-precision logits.
`python benchmarks/gpu_matrix.py --device cuda` trains the same rows on a GPU with `to_fp16`, `to_bf16` and
channels-last; no GPU has run them yet.
"""


def outcome(case):
    "`works`, `not run: why` or `fails: why`, of a test case of a JUnit report"
    found = next((o for o in case if o.tag in ('skipped', 'failure', 'error')), None)
    if found is None:
        return 'works'
    why = (found.get('message') or '').removeprefix('Skipped: ').split('\n')[0]
    return ('not run' if found.tag == 'skipped' else 'fails') + (why and f': {why}')


def run_tests(python, *options):
    "The test cases of a run of pytest, which must not fail"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / 'report.xml'
        pytest = [python, '-m', 'pytest', '-p', 'no:cacheprovider', f'--junitxml={report}', *options]
        if subprocess.run(pytest, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}).returncode:
            sys.exit('A test fails: mend it before the page is written.')
        return list(ElementTree.parse(report).iter('testcase'))


def measure(python):
    "What each row does with the packages of `python`"
    from matrix import ELSEWHERE

    cases = run_tests(python, 'tests/journeys/test_matrix.py::test_row')
    outcomes = {case.get('name').partition('[')[2].removesuffix(']'): outcome(case) for case in cases}
    for name, (file, _) in ELSEWHERE.items():
        kinds = {outcome(case) for case in run_tests(python, file)}
        outcomes[name] = 'works' if 'works' in kinds else 'not run: skipped'
    return outcomes


def table(rows, columns):
    return '\n'.join(f'| {" | ".join(o)} |' for o in [columns, ['---'] * len(columns), *rows])


def shown(name):
    "A row's name, with what is code in backticks"
    if ' ' not in name.replace(', ', ''):
        return ', '.join(f'`{o}`' for o in name.split(', '))
    return CODE.sub(r'`\g<0>`', name).replace('|', '\\|')


def notes(rows, envs):
    "Why rows do not work, one line each"
    why = {}
    for name, outcomes in rows.items():
        for env, o in outcomes.items():
            kind, _, reason = o.partition(': ')
            if kind != 'works':
                why.setdefault((name, kind, reason), []).append(envs[env])
    return [
        f'- {shown(name)}, {", ".join(where)}: {kind}{reason and ", as " + reason}'
        for (name, kind, reason), where in why.items()
    ]


def page(data):
    "matrix.md from matrix.json"
    from matrix import ELSEWHERE, POLICIES, ROWS, THINGS, beside

    envs = {o: ENVS[o] for o in data['environments']}
    versions = data['environments']
    columns = ['versions', *next(iter(versions.values()))]
    parts = [ABOUT.format(versions=table([[envs[o], *v.values()] for o, v in versions.items()], columns))]

    def kind(name, env):
        return data['rows'][name].get(env, 'not run').split(':')[0]

    def section(title, rows, columns, names):
        parts.append(f'## {title}\n\n{table(rows, columns)}\n')
        if why := notes({o: data['rows'][o] for o in names}, envs):
            parts.append('\n'.join(why) + '\n')

    checked = {o.name: o.says for o in ROWS} | {o: f'{what} (`{file}`)' for o, (file, what) in ELSEWHERE.items()}
    groups = {title: [o.name for o in rows] for title, rows in groupby(ROWS, key=lambda o: o.group)}
    policies = groups.pop('Policies')
    for title, names in (groups | {'With tests of their own': list(ELSEWHERE)}).items():
        rows = [[shown(o), checked[o], *(kind(o, env) for env in envs)] for o in names]
        section(title, rows, ['beside FixMatch', 'what is checked', *envs.values()], names)

    def cell(name):
        if name not in policies:
            return ''
        kinds = {kind(name, env) for env in envs}
        return kinds.pop() if len(kinds) == 1 else '; '.join(f'{envs[o]}: {kind(name, o)}' for o in envs)

    rows = [[shown(o), *(cell(beside(o, thing)) for thing in ['alone', *THINGS])] for o in POLICIES]
    section('Policies', rows, ['policy', 'alone', *THINGS], policies)
    parts.append(
        'Some pseudo-labels count and move the weights, and the policy remembers what it has to, with the versions of '
        'all environments. Beside other things are those that look at more than the unlabelled logits; for the rest '
        'stands `FixedThreshold`, which all the rows above have.\n'
    )
    return '\n'.join(parts)


def main():
    parser = argparse.ArgumentParser(description='Write benchmarks/matrix.md from the tests in tests/journeys.')
    parser.add_argument('--env', nargs='*', choices=ENVS, default=list(ENVS), help='default: all')
    args = parser.parse_args()
    from matrix import ELSEWHERE, ROWS

    file = ROOT / 'benchmarks/matrix.json'
    data = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {'environments': {}, 'rows': {}}
    for env in args.env:
        python = sys.executable if env == 'newest' else compat.python_of(env)
        found = compat.look(python)
        print(f'--- {env}: {compat.in_one_line(found)}', flush=True)
        for name, o in measure(python).items():
            data['rows'].setdefault(name, {})[env] = o
        data['environments'][env] = compat.versions(found)
    data['environments'] = {o: data['environments'][o] for o in ENVS if o in data['environments']}
    names = [o.name for o in ROWS] + list(ELSEWHERE)
    data['rows'] = {name: {o: data['rows'][name][o] for o in ENVS if o in data['rows'][name]} for name in names}
    file.write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')
    file.with_suffix('.md').write_text(page(data), encoding='utf-8')
    kinds = [o.split(':')[0] for outcomes in data['rows'].values() for o in outcomes.values()]
    print(', '.join(f'{kinds.count(o)} {o}' for o in dict.fromkeys(kinds)))


if __name__ == '__main__':
    main()
