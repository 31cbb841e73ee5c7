"The benchmark of self-training: every method, an interrupt, and the committed table"

import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
import self_training  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize('method', self_training.METHODS)
def test_every_method_of_self_training_takes_its_steps(method, digits):
    few = digits[::6]
    comparison = self_training.FewLabels(few, 10, steps=10, mu=1, num_workers=0, n_test=100, flip=False)
    row = self_training.run(comparison, 'digits', method, 0)
    assert list(row) == self_training.COLUMNS and row['n_test'] == len(few) - 200
    assert 0 <= row['accuracy'] <= 1 and 0 <= row['pseudo_acc'] <= 1
    before = {'supervised': 0, 'FixMatch': 0, 'Meta Pseudo Labels': 0, 'Noisy Student': 20}
    assert row['all_steps'] == 10 + before.get(method, 10)


@pytest.mark.slow
def test_an_interrupted_benchmark_of_self_training_goes_on(tmp_path, monkeypatch, capsys, few_digits):
    args = '--labels 10 --seeds 2 --steps 10 --workers 0 --only supervised self-distillation'.split()
    args += ['--images', str(few_digits), '--out', str(tmp_path)]
    runs, real = [], self_training.run

    def run(comparison, images, method, seed):
        runs.append((method, seed))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return real(comparison, images, method, seed)

    monkeypatch.setattr(self_training, 'run', run)
    with pytest.raises(KeyboardInterrupt):
        self_training.main(args)
    self_training.main(args)
    assert runs[2:] == [('supervised', 1), ('supervised', 1), ('self-distillation', 1)]
    rows = pd.read_csv(tmp_path / 'self_training.csv')
    text = (tmp_path / 'self_training.md').read_text()
    acc = 100 * rows[rows.method == 'supervised'].accuracy
    assert f'| supervised | {acc.mean():.1f} ± {acc.std():.1f} | – | – | 10 |' in text
    assert '10 steps, 2 seeds, 40 test images' in text
    with pytest.raises(SystemExit):
        self_training.main(['--only', 'MixMatch'])
    assert "there is no method ['MixMatch']" in capsys.readouterr().err


def test_the_committed_page_of_self_training_is_made_of_its_runs():
    runs, page = (ROOT / f'benchmarks/self_training.{o}' for o in ('csv', 'md'))
    assert self_training.table(pd.read_csv(runs)) == page.read_text()
