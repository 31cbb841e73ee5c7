"""Run the tests with the versions that people have on Kaggle and Colab.

    python tools/compat.py                            in all environments, one after another
    python tools/compat.py kaggle -- -k matrix -x     in one; what follows -- goes to pytest

An environment is .venv with other versions of a few packages on top, in .venv-<name>: small, and made in seconds.
Python, torch and torchvision are those of .venv.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parent.parent
# all that fastai and timm need of an age of their own, so that nothing is left for pip to decide: torch stays
COMMON = {'Pillow': '11.3.0', 'fastprogress': '1.0.5', 'fasttransform': '0.0.2', 'plum-dispatch': '2.5.8'}
ENVS = {
    'kaggle': {'fastai': '2.8.7', 'fastcore': '1.12.42', 'timm': '1.0.26', **COMMON},
    'colab': {'fastai': '2.8.8', 'fastcore': '2.2.12', 'timm': '1.0.28', **COMMON},
}
IMPORTED = ['fastai', 'fastcore', 'torch', 'torchvision', 'timm', 'PIL']
# run in the environment: what is imported, what is installed, and which requirements of `names` are not met
LOOK = """
import importlib, json, platform, sys, warnings
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
warnings.simplefilter('ignore')
modules, names = json.loads(sys.argv[1])
def unmet(name):
    for o in map(Requirement, requires(name) or []):
        if o.marker and not o.marker.evaluate({'extra': ''}): continue
        try: found = version(o.name)
        except PackageNotFoundError: found = None
        if found is None or not o.specifier.contains(found, prereleases=True):
            yield f'{name} needs {o}, but there is {found}'
imported = {o: importlib.import_module(o).__version__.split('+')[0] for o in modules}
print(json.dumps(dict(
    python=platform.python_version(), imported=imported, installed={o: version(o) for o in names},
    unmet=[u for o in names for u in unmet(o)], package=importlib.import_module('fixmatch_fastai').__file__)))
"""


def look(python, names=()):
    "What `python` imports, and whether the requirements of `names` are met"
    look = [python, '-c', LOOK, json.dumps([IMPORTED, list(names)])]
    res = subprocess.run(look, cwd=ROOT, capture_output=True, text=True)
    if res.returncode:
        sys.exit(f'{res.stderr}\n{python} can not import what the tests need.')
    return json.loads(res.stdout.splitlines()[-1])


def versions(found):
    "Of Python and of what is imported, by the names of packages"
    return {'Python': found.get('python'), **{'Pillow' if k == 'PIL' else k: v for k, v in found['imported'].items()}}


def in_one_line(found):
    return ', '.join(f'{name} {version}' for name, version in versions(found).items())


def check(name, pins, found):
    "Are the versions that are imported those wanted? Each failure is a sentence"
    there = found['installed'] | versions(found)
    for package, version in pins.items():
        if there.get(package) != version:
            yield f'{name} should have {package} {version}, but imports {there.get(package)}.'
    yield from (f'{name}: {o}.' for o in found['unmet'])
    if not Path(found['package']).is_relative_to(ROOT):
        yield f'{name} tests {found["package"]}, not the package beside it.'


def python_of(name):
    "The Python of an environment, which is made if it is not there or not as it should be"
    path, pins = ROOT / f'.venv-{name}', ENVS[name]
    python, stamp = path / Path(sysconfig.get_path('scripts')).name / Path(sys.executable).name, path / '.made'
    below = sysconfig.get_path('purelib')
    made = json.dumps([sys.version, below, pins])
    if stamp.exists() and stamp.read_text(encoding='utf-8') == made:
        return str(python)
    print(f'Making {path.name} ...', flush=True)
    rmtree(path, ignore_errors=True)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', path], check=True)
    where = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    own = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    # these come behind the environment's own packages
    Path(own, 'below.pth').write_text(f'{below}\n{ROOT}\n', encoding='utf-8')
    pip = [sys.executable, '-m', 'pip', '--python', python, '--disable-pip-version-check', '-qq']
    subprocess.run([*pip, 'install', '--no-deps', *(f'{k}=={v}' for k, v in pins.items())], check=True)
    stamp.write_text(made, encoding='utf-8')
    return str(python)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index('--') if '--' in argv else len(argv)
    names, options = argv[:end] or list(ENVS), argv[end + 1 :]
    if unknown := set(names) - set(ENVS):
        sys.exit(f'There is no environment {", ".join(sorted(unknown))}: use {" or ".join(ENVS)}, or none for all.')
    failed = []
    for name in names:
        python = python_of(name)
        found = look(python, ENVS[name])
        print(f'--- {name}: {in_one_line(found)}', flush=True)
        if wrong := list(check(name, ENVS[name], found)):
            remedy = f'Remove .venv-{name} and run this again, or correct the versions in tools/compat.py.'
            sys.exit('\n'.join([*wrong, remedy]))
        if status := subprocess.run([python, '-m', 'pytest', '-p', 'no:cacheprovider', *options], cwd=ROOT).returncode:
            failed.append(f'{name} (exit status {status})')
    sys.exit(f'The tests fail with the versions of {" and ".join(failed)}.' if failed else 0)


if __name__ == '__main__':
    main()
