"""Build the package as a release would be built, and use it as a stranger would.

    python tools/check_wheel.py                 leaves nothing behind
    python tools/check_wheel.py --keep dist     leaves sdist and wheel in dist/, and prints how to upload them

sdist, then a wheel from that sdist, installed into an empty folder and imported from there. All in a temporary folder,
without network. Each failure is one sentence.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'fixmatch_fastai'
TREE = ['settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', PACKAGE]
TREE += ['nbs', 'tests', 'tools']  # which must stay outside
IMPORT = f"""
from pathlib import Path
import {PACKAGE}.all
file = Path({PACKAGE}.all.__file__).resolve()
assert file.is_relative_to(Path.cwd().parent/'installed'), f'imported from {{file}}'
"""


def run(*args, cwd, **env):
    "Run Python quietly; on failure show what it printed"
    res = subprocess.run([sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    if res.returncode:
        command = ' '.join(map(str, args))[:200].strip()
        sys.exit(f'{res.stdout}{res.stderr}\nThe wheel check failed at: python {command}')
    return res.stdout


def expect(ok, sentence):
    if not ok:
        sys.exit(sentence)


def keep(files, folder, version):
    "Copy what is to be uploaded, and print how"
    folder.mkdir(exist_ok=True)
    kept = [copy2(o, folder) for o in files]
    print(f'\nTo release {version}:\n')
    print(f'    git tag v{version} && git push origin v{version}')
    print(f'    python -m twine upload {" ".join(str(Path(o).relative_to(Path.cwd())) for o in kept)}')


def main():
    parser = argparse.ArgumentParser(description='Build the package, install it elsewhere and import it.')
    parser.add_argument('--keep', type=Path, help='folder for sdist and wheel')
    args = parser.parse_args()
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    newest = re.search('^## (.*)', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[1].split()[0]
    expect(
        not args.keep or newest == ini['DEFAULT']['version'],
        f'CHANGELOG.md begins with {newest}, but the version is {ini["DEFAULT"]["version"]}: set it in settings.ini, '
        f'CITATION.cff, CHANGELOG.md and {PACKAGE}/__init__.py.',
    )
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        source, dist, installed, elsewhere = (tmp / o for o in ('source', 'dist', 'installed', 'elsewhere'))
        source.mkdir()
        elsewhere.mkdir()
        for o in TREE:
            expect((ROOT / o).exists(), f'{o} is missing: a release needs it.')
            ignored = ignore_patterns('__pycache__', '.*', 'models')
            copytree(ROOT / o, source / o, ignore=ignored) if (ROOT / o).is_dir() else copy2(ROOT / o, source / o)
        files = [
            *(ROOT / PACKAGE).rglob('*.py'),
            *(ROOT / PACKAGE).rglob('*.html'),
        ]
        wanted = {o.relative_to(ROOT).as_posix() for o in files}

        run('-m', 'build', '--no-isolation', '--outdir', dist, source, cwd=tmp)  # the sdist, and the wheel from it
        sdists, wheels = list(dist.glob('*.tar.gz')), list(dist.glob('*.whl'))
        expect(len(sdists) == len(wheels) == 1, 'The build did not give one sdist and one wheel.')
        expect(wheels[0].name.endswith('-py3-none-any.whl'), f'{wheels[0].name} is not a pure Python wheel.')
        inside = set(ZipFile(wheels[0]).namelist())
        expect(wanted <= inside, f'The wheel lacks {", ".join(sorted(wanted - inside))}: see setup.py.')
        strange = sorted(o for o in inside - wanted if not o.split('/')[0].endswith('.dist-info'))
        expect(not strange, f'The wheel holds more than the package: {", ".join(strange)}.')

        pip = ['-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', '--no-deps', '--no-index']
        run(*pip, '--target', installed, wheels[0], cwd=tmp)
        run('-c', IMPORT, cwd=elsewhere, PYTHONPATH=str(installed))
        for script in ini['DEFAULT']['console_scripts'].split('\n'):
            name = script.split('=')[0].strip()
            command = installed / 'bin' / name
            expect(command.exists(), f'The wheel installs no command `{name}`: see console_scripts in settings.ini.')
            usage = run(command, '--help', cwd=elsewhere, PYTHONPATH=str(installed))
            expect('usage' in usage.lower(), f'`{name} --help` shows no usage.')
        print(f'{wheels[0].name} builds from its sdist, installs and imports.')
        if args.keep:
            keep([*sdists, *wheels], args.keep.resolve(), ini['DEFAULT']['version'])


if __name__ == '__main__':
    main()
