"A short `make torture`: each kind of trial some times, and what the command prints and writes"

import pytest
import torture

LONG = 'kill-comparison', 'kill-experiment', 'flip-experiment', 'flip-result'
BY_THE_CLOCK = (
    'stop-',
    'worker-',
    'two-',
)  # no two runs of these are alike; test_interrupts and test_processes do the same


@pytest.mark.slow
def test_nothing_is_lost():
    names = [o for o in torture.TRIALS if o not in LONG and not o.startswith(BY_THE_CLOCK)]
    counts = torture.torture(names, minutes=2, each=1)
    assert {o: failed for o, (n, failed) in counts.items() if failed} == {}
    assert {n for n, _ in counts.values()} == {1}


@pytest.mark.parametrize('found,code', [('', 0), ('it was lost', 1)])
def test_a_failure_can_be_tried_again(monkeypatch, tmp_path, capfd, found, code):
    def lose(rng, folder):
        print('before', rng.integers(10**9))
        torture.check(not found, found)

    monkeypatch.setattr(torture, 'TRIALS', {'lose-all': (1, 'All is lost', lose)})
    assert torture.main(['--each', '3', '--seed', '5', '--out', str(tmp_path)]) == code
    page = (tmp_path / 'torture.md').read_text()
    assert f'| `lose-all` | All is lost | 3 | {3 * code} |' in page and 'Seed 5' in page
    printed = capfd.readouterr().out
    assert printed.count('lose-all 2: it was lost\n  again: --only lose-all --trial 2 --seed 5') == code
    numbers = {o for o in printed.splitlines() if o.startswith('before')}
    assert torture.main(['--only', 'lose', '--trial', '2', '--seed', '5', '--out', str(tmp_path / 'none')]) == code
    again = [o for o in capfd.readouterr().out.splitlines() if o.startswith('before')]
    assert len(numbers) == 3 * code and len(again) == code and {*again} <= numbers
    assert not (tmp_path / 'none').exists()


def test_a_trial_that_dies_or_hangs_has_failed(monkeypatch):
    trials = {
        'dies': (1, '', lambda *args: torture.os._exit(3)),
        'hangs': (1, '', lambda *args: torture.time.sleep(99)),
    }
    monkeypatch.setattr(torture, 'TRIALS', trials)
    monkeypatch.setattr(torture, 'LIMIT', 0.5)
    counts = torture.torture([*trials], each=1)
    assert counts['dies'] == (1, ('it ended with 3',)) and 'not done after' in counts['hangs'][1][0]


def test_unknown_names(capsys):
    with pytest.raises(SystemExit):
        torture.main(['--only', 'nothing'])
    assert 'kill-training' in capsys.readouterr().err
