"What commands share: options from signatures, mistakes in one sentence, progress; and that none of it loads torch"

import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

from fixmatch_fastai.cli.check import check_command
from fixmatch_fastai.cli.demo import fixmatch_demo
from fixmatch_fastai.cli.predict import fixmatch_predict
from fixmatch_fastai.cli.train import fixmatch_train
from fixmatch_fastai.console import CommandError, Progress, command, in_options, run_command, unknown_name

COMMANDS = [fixmatch_train, fixmatch_predict, check_command, fixmatch_demo]
ROOT = Path(__file__).parent.parent


@command(example='paint wall --colour red')
def paint(
    files: list,  # what to paint
    colour: str = 'white',  # of the paint
    coats: int = 1,
    wide: bool = False,
    dry: bool = True,
    share: float = None,
):
    "Paint files"
    if coats > 9:
        raise CommandError('too much')
    print(*files, colour, coats, wide, dry, share)


def test_options_are_those_of_the_signature(capsys):
    assert run_command(paint, ['wall', 'door', '--coats', 2, '--wide', '--no-dry', '--share=0.5']) == 0
    assert capsys.readouterr().out == 'wall door white 2 True False 0.5\n'
    assert run_command(paint, ['wall']) == 0
    assert capsys.readouterr().out == 'wall white 1 False True None\n'
    paint(['wall'], coats=3)
    assert capsys.readouterr().out == 'wall white 3 False True None\n'


@pytest.mark.parametrize(
    'args,text',
    [
        (['--color', 'red'], 'paint: option --color is not known: did you mean --colour?\n'),
        (['--color=red'], 'paint: option --color is not known: did you mean --colour?\n'),
        (['--coats', '10'], 'paint: too much\n'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, text, capsys):
    assert run_command(paint, ['wall', *args]) == 2
    assert capsys.readouterr().err == text


def test_names_are_suggested():
    names = ['fixed', 'flexmatch', 'freematch']
    assert 'did you mean flexmatch or freematch?' in str(unknown_name('--policy', 'flexmach', names))
    assert 'use for example fixed, flexmatch' in str(unknown_name('--policy', 'xyz', names))


def test_all_commands_are_installed():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(o.strip().split('=') for o in ini['DEFAULT']['console_scripts'].split('\n'))
    assert set(scripts) == {f'fixmatch_{o}' for o in ('train', 'predict', 'check', 'demo', 'experiment')}
    for name, target in scripts.items():
        module, func = target.split(':')
        func = getattr(import_module(module), func)
        if name != 'fixmatch_experiment':
            assert func.parser().prog == name


@pytest.mark.parametrize('func', COMMANDS)
def test_help_says_something_of_each_option(func, capsys):
    with pytest.raises(SystemExit) as e:
        run_command(func, ['--help'])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert 'Example: ' in out and out.startswith(f'usage: {func.parser().prog}')
    for option in func.parser().options:
        assert option.help and len(option.help) > 3


HEAVY = """
import sys
from fixmatch_fastai.console import run_command
from fixmatch_fastai.cli.check import check_command
from fixmatch_fastai.cli.demo import fixmatch_demo
from fixmatch_fastai.cli.predict import fixmatch_predict
from fixmatch_fastai.cli.train import fixmatch_train

def code(command, args):
    try: return run_command(command, args.split())
    except SystemExit as e: return e.code

folders = '--labeled . --unlabeled . --out run'
for command in (check_command, fixmatch_demo, fixmatch_predict, fixmatch_train):
    assert code(command, '--help') == 0
    assert code(command, '--polcy x') == 2
wrong = ['--epochs many', '--bs 0', '--recipe finetun', '--forward join', '--policy uba', '--labeled nowhere']
for args in [*wrong, '--weights gone.pth', '--lr -1']:
    assert code(fixmatch_train, f'{folders} {args}') == 2, args
assert code(fixmatch_train, '') == 2
assert code(fixmatch_predict, '--learner gone.pkl new') == 2
assert code(fixmatch_demo, '--data nowhere') == 2
loaded = {'torch', 'fastai', 'pandas', 'numpy', 'matplotlib', 'timm', 'sklearn', 'PIL'} & set(sys.modules)
assert not loaded, loaded
"""


def test_help_and_mistakes_load_nothing_heavy(tmp_path):
    res = subprocess.run([sys.executable, '-c', HEAVY], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert not list(tmp_path.iterdir())


def test_a_log_has_a_line_for_each_tenth(capsys):
    progress = Progress(1003)
    for i in range(1003):
        progress.update(i + 1)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1] == 'step 1,003 of 1,003'


def test_advice_is_in_words_of_the_command_line():
    slow = 'Let workers prepare images while the model trains: `dls.unlabeled_dl(files, num_workers=4)`.'
    assert in_options(slow) == 'Let workers prepare images while the model trains: --workers.'
    replaced = 'replaced, such as a.png (OSError): `learn.fix_match.damaged` lists them.'
    assert in_options(replaced) == 'replaced, such as a.png (OSError).'


@pytest.mark.slow
def test_advice_of_a_running_fit_is_in_words_of_the_command_line(make_dls, make_learner):
    learn = make_learner(make_dls(n_batches=110), fixmatch={'threshold': 1.0})
    with pytest.warns(UserWarning, match='No pseudo-label has counted') as found, learn.no_bar(), learn.no_logging():
        learn.fit(1)
    text = in_options(next(str(o.message) for o in found if 'No pseudo-label' in str(o.message)))
    assert '--policy freematch' in text and '`' not in text
