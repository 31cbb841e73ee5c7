"`fixmatch_check`: exit codes, files that are listed, and that nothing is written"

import shutil

from cli_runs import *  # noqa: F403  fixtures
from cli_runs import DATA, KNOWN, SMALL, exit_code, options

from fixmatch_fastai.cli.check import check_command
from fixmatch_fastai.cli.folders import find_images


def check(*args, data=DATA):
    return exit_code(check_command, *data, *SMALL[:-2], *args, '--no-speed')


def test_check_says_whether_there_are_problems(there, tmp_path, capsys):
    before = sorted(there.rglob('*'))
    assert check() == 0
    assert 'labels' in (out := capsys.readouterr().out) and '0 problems' in out and 'damaged.png' in out
    shutil.copy(find_images(options()).valid['2'][0], tmp_path / 'copied.png')
    assert check(data=[*DATA, tmp_path]) == 1
    assert 'In validation too:\n' in (out := capsys.readouterr().out) and 'copied.png' in out and '1 problem' in out
    assert sorted(there.rglob('*')) == before


def test_check_answers_wrong_names(there, capsys):
    for option in ('policy', 'recipe', 'arch', 'forward'):
        assert check(f'--{option}', 'none') == 2
        assert capsys.readouterr().err.startswith(f'fixmatch_check: --{option} none is not known')


def test_check_looks_at_weights_on_disk(there, weights, capsys):
    assert exit_code(check_command, *DATA, *KNOWN[:-2], '--weights', weights, '--no-speed') == 0
    assert '0 problems' in capsys.readouterr().out


def test_either_spelling_of_labelled(there):
    assert check(data=['--labelled', 'labeled', '--unlabelled', 'unlabeled']) == 0
    assert check(data=['--labelled=labeled', '--unlabelled', 'unlabeled']) == 0
